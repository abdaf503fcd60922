"""One process under contention: `python -m tests.torture.worker SECTIONS FOLDER`.

Takes the lock SECTIONS times, adds one to a counter without any other protection, and writes down
what it did.
"""

from __future__ import annotations

import sys
import time

import django


def main(sections: int, folder: str) -> None:
    """Run the critical sections."""
    django.setup()
    from distlock import lock
    from tests.app.models import Counter
    from tests.torture.history import Recorder
    from tests.torture.points import Points

    recorder = Recorder(folder)
    Points(recorder).install()
    for _ in range(sections):
        with lock("torture", wait=300) as lease:
            since = time.monotonic()
            value = Counter.objects.values_list("value", flat=True).get(name="torture")
            Counter.objects.filter(name="torture").update(value=value + 1)
            recorder.note("hold", since=since, until=time.monotonic(), token=lease.token)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
