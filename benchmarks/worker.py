"""The child's side of a measurement: one task of one contender, and its result as JSON.

    python -m benchmarks.worker '{"contender": ..., "url": ..., "task": ..., "arguments": {...}}'

The task prepares itself, calls ``ready()``, which says so and returns when the parent says "go",
and then works.
"""

from __future__ import annotations

import json
import os
import sys

from .contenders import CONTENDERS
from .tasks import TASKS


def ready() -> None:
    """Tell the parent, and wait for its word."""
    print("ready", flush=True)
    if not sys.stdin.readline():
        os._exit(1)  # the parent is gone


def main(text: str) -> None:
    job = json.loads(text)
    contender = CONTENDERS[job["contender"]](job["url"])
    print(json.dumps(TASKS[job["task"]](contender, ready, **job["arguments"])), flush=True)
    os._exit(0)  # what is held is left to its expiry: nobody waits for keepers or locks here


if __name__ == "__main__":
    main(sys.argv[1])
