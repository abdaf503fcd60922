"""The named points of an attempt: what a process notes as it passes them, and where it dies.

The verbs of the store and Django's COMMIT are wrapped, in this process only; the package itself
knows nothing of it. A process that is told to die at a point kills itself there with SIGKILL, so
that no moment between two statements is left to chance. Or it loses the answers to some COMMITs.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from tests.torture.history import Recorder

POINTS = (
    "before-acquire",
    "after-acquire",  # granted, and nobody in the process knows it yet
    "in-body",
    "before-guard",
    "after-guard",
    "before-release",
    "after-release",
    "before-commit",  # the next byte would be the first of COMMIT
    "during-commit",  # COMMIT is sent, and its answer is not read
    "after-commit",  # committed, and nothing of what follows is done
)
PASSED_BY = {
    "guard": POINTS,
    "atomic": tuple(point for point in POINTS if not point.endswith("guard")),
    "inside": tuple(point for point in POINTS if not point.endswith("guard")),
}
"""Which points an attempt under each fence comes by."""

COMBINATIONS = [(fence, point) for fence, points in PASSED_BY.items() for point in points]

CHANCE = 0.5
"""How likely a process dies when it comes by its point: it is to do some work before."""


def nothing() -> None:
    """Do nothing."""


class Points:
    """The points of this process."""

    def __init__(self, recorder: Recorder, die_at: str = "", deaf: float = 0.0) -> None:
        self._recorder = recorder
        self._die_at = die_at
        self._deaf = deaf
        self.committing: Callable[[], None] = nothing
        """Called when the next thing to be sent is COMMIT."""

    def install(self) -> None:
        """Wrap what the points stand around."""
        from django.db import connections

        from distlock.backends import backend_for

        connection = connections["default"]
        store = type(backend_for(connection))
        for verb, name in (("grant", "acquire"), ("guard", "guard"), ("release", "release")):
            self._wrap_verb(store, verb, name)
        self._wrap_commit(type(connection), connection)

    def reach(self, point: str) -> None:
        """Come by a point, perhaps to die there."""
        if point == self._die_at and random.random() < CHANCE:
            self._die(point)

    def _wrap_verb(self, store: Any, verb: str, name: str) -> None:
        real = getattr(store, verb)

        def wrapped(*args: Any, **more: Any) -> Any:
            self.reach(f"before-{name}")
            began = time.monotonic()
            found = real(*args, **more)
            if verb == "grant":
                if found is None:
                    return None
                self._recorder.note("grant", since=began, token=found.token)
            self.reach(f"after-{name}")
            return found

        setattr(store, verb, wrapped)

    def _wrap_commit(self, wrapper: Any, work: Any) -> None:
        real = wrapper._commit

        def commit(connection: Any) -> None:
            if connection is not work:  # a private one, for lock statements
                real(connection)
                return
            self.reach("before-commit")
            self.committing()
            if self._die_at == "during-commit" and random.random() < CHANCE:
                send_commit(connection.connection)
                self._die("during-commit")
            if random.random() < self._deaf:
                self._recorder.note("deaf")
                hear_no_more(connection.connection)
            real(connection)
            self.reach("after-commit")

        wrapper._commit = commit

    def _die(self, point: str) -> None:
        self._recorder.note("killed", pid=os.getpid(), point=point)
        os.kill(os.getpid(), signal.SIGKILL)


def send_commit(physical: Any) -> None:
    """Send COMMIT, and read no answer."""
    if hasattr(physical, "pgconn"):
        physical.pgconn.send_query(b"COMMIT")
        while physical.pgconn.flush():
            time.sleep(0.001)
    else:
        physical.send_query(b"COMMIT")


def hear_no_more(physical: Any) -> None:
    """Let the next answer be lost: what is asked reaches the server, and then the line is dead."""
    with socket.socket(fileno=os.dup(physical.fileno())) as wire:
        wire.shutdown(socket.SHUT_RD)
