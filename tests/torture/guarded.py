"""One process that protects a counter: `python -m tests.torture.guarded FENCE TTL FOLDER NAME`.

Works until there is a file `stop` in FOLDER, where it writes its history. Reads the counter NAME,
waits a little, writes it back plus one, leaves an entry of its own in the ledger (`history.py`),
waits again, and commits; paused, killed and cut off meanwhile. With `--die-at POINT` it kills
itself at one of the points of `points.py`; with `--deaf CHANCE` it loses answers to its COMMITs.

FENCE says what keeps a stale one out:

    guard     lease.guard() as the last statement of the transaction
    atomic    lock(.., atomic=True)
    inside    the lock is taken, and released, inside the transaction
    none      a lease around a transaction, as with any other lock: loses updates, and shows that
              the nemesis bites
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import django

STEP = 0.005
THINK = 0.05
"""Who asks again at once is there before all who wait."""
TELLS_HOW_IT_ENDED = ("atomic", "inside")
"""Here the release stands in the transaction, so that the row is a witness of a COMMIT whose answer
was lost: an error that is not `CommitOutcomeUnknown` says that nothing was committed."""


def main(argv: list[str]) -> None:
    """Work until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("fence", choices=FENCES)
    parser.add_argument("ttl", type=float)
    parser.add_argument("folder")
    parser.add_argument("name")
    parser.add_argument("--die-at", default="")
    parser.add_argument("--deaf", type=float, default=0.0)
    options = parser.parse_args(argv)
    django.setup()
    from tests.torture.history import Recorder
    from tests.torture.points import Points

    recorder = Recorder(options.folder)
    points = Points(recorder, options.die_at, options.deaf)
    tell_session(Path(options.folder))
    wait_for_the_server()
    points.install()
    for number in itertools.count():
        if (Path(options.folder) / "stop").exists():
            return
        attempt = Attempt(recorder, points, options, f"{os.getpid()}-{number}")
        points.committing = attempt.commits
        attempt.run()
        time.sleep(random.uniform(0, THINK))


def wait_for_the_server(limit: float = 60) -> None:
    """Return when it answers: it may have been killed a moment ago."""
    deadline = time.monotonic() + limit
    while not answers():
        assert time.monotonic() < deadline, "the server does not come back"
        time.sleep(0.1)


def answers() -> bool:
    """Whether the server does."""
    from django.db import Error, connection

    with contextlib.suppress(Error):
        connection.ensure_connection()
        return True
    return False


def tell_session(folder: Path) -> None:
    """Write down which session on the server this process's work goes to."""
    from django.db import connections
    from django.db.backends.signals import connection_created

    def created(connection: Any, **kwargs: object) -> None:
        if connection is connections["default"]:
            physical = connection.connection
            on_postgresql = hasattr(physical, "pgconn")
            session = physical.info.backend_pid if on_postgresql else physical.thread_id()
            (folder / f"{os.getpid()}.session").write_text(str(session))

    connection_created.connect(created, weak=False)


class Attempt:
    """One read, write and commit, and what is known of it."""

    def __init__(self, recorder: Any, points: Any, options: argparse.Namespace, key: str) -> None:
        self._recorder = recorder
        self._points = points
        self._key = key
        self.name = options.name
        self.ttl = options.ttl
        self._fence = options.fence
        self._token = 0
        self._wrote = 0
        self._sent = 0.0  # when COMMIT was sent, if it was
        self._committed = False

    def run(self) -> None:
        """Make the attempt, and note what became of it."""
        from django.db import Error, connection

        from distlock import CommitOutcomeUnknown, LockBusy, LockLost

        try:
            FENCES[self._fence](self)
        except LockBusy:
            pass
        except CommitOutcomeUnknown:
            self._recorder.note("unknown", token=self._token)
        except LockLost:
            self._recorder.note("lost", token=self._token)
            if not self._committed:
                self._outcome("failed")
        except Error:
            self._recorder.note("error", token=self._token)
            if not self._committed and (not self._sent or self._fence in TELLS_HOW_IT_ENDED):
                self._outcome("failed")
            with contextlib.suppress(Error):
                connection.close()
            time.sleep(0.05)

    def add_one(self, lease: Any) -> None:
        """Read, modify, write: without any row lock of its own."""
        from tests.app.models import Counter

        granted = time.monotonic()
        self._token = lease.token
        value = Counter.objects.values_list("value", flat=True).get(name=self.name)
        time.sleep(STEP)
        Counter.objects.filter(name=self.name).update(value=value + 1)
        Counter.objects.create(name=f"{self.name}/{self._key}/{lease.token}", value=value + 1)
        self._wrote = value + 1
        self._points.reach("in-body")
        time.sleep(STEP)
        now = time.monotonic()
        if not lease.lost:
            self._recorder.note(
                "hold", since=granted, until=now, token=lease.token, fence=self._fence
            )

    def commits(self) -> None:
        """Note that COMMIT is next: from now on the outcome is unknown, until it is known."""
        if self._wrote:
            self._sent = time.monotonic()
            self._outcome("unknown")

    def has_committed(self) -> None:
        """Note that it is done. The lease may still be found lost when its block ends."""
        self._committed = True
        self._outcome("ok")

    def _outcome(self, outcome: str) -> None:
        """Note what became of it; the last note counts."""
        if self._wrote:
            self._recorder.note(
                "commit",
                key=self._key,
                fence=self._fence,
                token=self._token,
                wrote=self._wrote,
                sent=self._sent,
                outcome=outcome,
            )


def guard(attempt: Attempt) -> None:
    """Guard as the last statement."""
    from django.db import transaction

    from distlock import lock

    with lock(attempt.name, ttl=attempt.ttl, wait=5) as lease:
        with transaction.atomic():
            attempt.add_one(lease)
            lease.guard()
        attempt.has_committed()


def atomic(attempt: Attempt) -> None:
    """A transaction of its own."""
    from distlock import lock

    with lock(attempt.name, ttl=attempt.ttl, wait=5, atomic=True) as lease:
        attempt.add_one(lease)
    attempt.has_committed()


def inside(attempt: Attempt) -> None:
    """The lock inside somebody's transaction."""
    from django.db import transaction

    from distlock import lock

    with transaction.atomic():
        with lock(attempt.name, ttl=attempt.ttl, wait=5) as lease:
            attempt.add_one(lease)
        time.sleep(STEP)
    attempt.has_committed()


def none(attempt: Attempt) -> None:
    """Nothing but the lease."""
    from django.db import transaction

    from distlock import lock

    with lock(attempt.name, ttl=attempt.ttl, wait=5) as lease:
        with transaction.atomic():
            attempt.add_one(lease)
        attempt.has_committed()


FENCES = {"guard": guard, "atomic": atomic, "inside": inside, "none": none}

if __name__ == "__main__":
    main(sys.argv[1:])
