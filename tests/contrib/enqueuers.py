"""Processes that call `enqueue_once`, and write the ids that they have created.

python -m tests.contrib.enqueuers hammer UNTIL CALLS   call it so often, with one key;
                                                           UNTIL is start, finish or either
python -m tests.contrib.enqueuers die                  die between commit and publish
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import nullcontext
from typing import Any

import django
from django.db import transaction

from distlock.contrib import _enqueue
from distlock.contrib.celery import enqueue_once
from tests.contrib import celery_app


def hammer(until: str, calls: int) -> None:
    """Queue the same again and again, every third time inside a transaction."""
    from tests.contrib import enqueued

    ends: Any = ("start", "finish") if until == "either" else (until,)
    for call in range(calls):
        with nullcontext() if call % 3 else transaction.atomic():
            end = ends[call % len(ends)]
            sent = enqueue_once(enqueued.hammered, until=end, queue="hammered")
        if sent.created:
            sys.stdout.write(f"{sent.result.id}\n")


def die() -> None:
    """Be killed in the callback that would publish."""
    from tests.contrib import enqueued

    def kill(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    _enqueue.publish = kill
    with transaction.atomic():
        sys.stdout.write(enqueue_once(enqueued.import_feed, (7,)).result.id)
        sys.stdout.flush()
    time.sleep(60)


if __name__ == "__main__":
    django.setup()
    celery_app.app.set_default()
    if sys.argv[1] == "die":
        die()
    else:
        hammer(sys.argv[2], int(sys.argv[3]))
