"""One process that protects a counter: `python -m tests.torture.guarded FENCE TTL FOLDER`.

Works until there is a file `stop` in FOLDER, where it writes its history. Reads the counter, waits
a little, writes it back plus one, waits again, and commits; paused, killed and cut off meanwhile.
FENCE says what keeps a stale one out:

    guard     lease.guard() as the last statement of the transaction
    atomic    lock(.., atomic=True)
    inside    the lock is taken, and released, inside the transaction
    none      nothing but the lease itself; loses updates, and shows that the nemesis bites
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import django

STEP = 0.005


def main(fence: str, ttl: float, folder: str) -> None:
    """Work until told to stop."""
    django.setup()
    from django.db import Error, connection

    from distlock import LockBusy, LockLost
    from tests.torture.history import Recorder

    recorder = Recorder(folder)
    for number in itertools.count():
        if (Path(folder) / "stop").exists():
            return
        attempt = Attempt(recorder, f"{os.getpid()}-{number}")
        try:
            FENCES[fence](attempt, ttl)
        except LockBusy:
            pass
        except LockLost:
            recorder.note("lost", token=attempt.token)
            if not attempt.committed:
                attempt.outcome("failed")
        except Error:
            recorder.note("error", token=attempt.token)
            # Before COMMIT was sent, nothing was committed; after that, nobody here can know.
            if not attempt.committed:
                attempt.outcome("unknown" if attempt.committing else "failed")
            with contextlib.suppress(Error):
                connection.close()
            time.sleep(0.05)


class Attempt:
    """One read, write and commit, and what is known of it. Unknown until it is known."""

    def __init__(self, recorder: Any, key: str) -> None:
        self._recorder = recorder
        self._key = key
        self.token = 0
        self.committing = False
        self.committed = False
        self._wrote = 0

    def add_one(self, token: int) -> None:
        """Read, modify, write: without any row lock of its own."""
        from tests.app.models import Counter

        self.token = token
        value = Counter.objects.values_list("value", flat=True).get(name="torture")
        time.sleep(STEP)
        Counter.objects.filter(name="torture").update(value=value + 1)
        self._wrote = value + 1
        time.sleep(STEP)

    def commits(self) -> None:
        """Note that COMMIT is next."""
        self.outcome("unknown")
        self.committing = True

    def has_committed(self) -> None:
        """Note that it is done. The lease may still be found lost when its block ends."""
        self.committed = True
        self.outcome("ok")

    def outcome(self, outcome: str) -> None:
        """Note what became of it; the last note counts."""
        if self._wrote:
            self._recorder.note(
                "commit", key=self._key, token=self.token, wrote=self._wrote, outcome=outcome
            )


def guard(attempt: Attempt, ttl: float) -> None:
    """Guard as the last statement."""
    from django.db import transaction

    from distlock import lock

    with lock("torture", ttl=ttl, wait=5) as lease:
        with transaction.atomic():
            attempt.add_one(lease.token)
            lease.guard()
            attempt.commits()
        attempt.has_committed()


def atomic(attempt: Attempt, ttl: float) -> None:
    """A transaction of its own."""
    from distlock import lock

    with lock("torture", ttl=ttl, wait=5, atomic=True) as lease:
        attempt.add_one(lease.token)
        attempt.commits()
    attempt.has_committed()


def inside(attempt: Attempt, ttl: float) -> None:
    """The lock inside somebody's transaction."""
    from django.db import transaction

    from distlock import lock

    with transaction.atomic():
        with lock("torture", ttl=ttl, wait=5) as lease:
            attempt.add_one(lease.token)
        attempt.commits()
        time.sleep(STEP)
    attempt.has_committed()


def none(attempt: Attempt, ttl: float) -> None:
    """Nothing but the lease."""
    from distlock import lock

    with lock("torture", ttl=ttl, wait=5) as lease:
        attempt.add_one(lease.token)
        attempt.commits()
        attempt.has_committed()


FENCES = {"guard": guard, "atomic": atomic, "inside": inside, "none": none}

if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3])
