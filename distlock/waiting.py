"""The one way to wait for a name: try, stand in line, try when woken, until the deadline.

Who wakes those who stand in line is told in `lookout.py`. Nobody relies on it for ever: if the
lookout is stuck, or its thread cannot run, each waiter tries by itself, once a second. Where
another connection would not see what is waited for (`TestCase`, a database in memory), there is no
lookout: each sleeps a little and tries.

The last try comes at the deadline itself, so that a lock freed at the last moment is not missed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .deadlines import Deadline, jitter
from .lookout import FIRST, GROWTH, LONGEST, Lookout, Name

T = TypeVar("T")

DOUBT = 1.0
"""Seconds after which a waiter asks itself whether anybody will wake it."""


@dataclass(frozen=True)
class Line:
    """Where to stand in line for a name."""

    lookout: Lookout
    key: Name


def wait_for(
    attempt: Callable[[float], T | None], deadline: Deadline, line: Line | None
) -> T | None:
    """Return what `attempt(waited)` gives as soon as that is not `None`.

    It is called at once, unless others of this process stand in line before, and then again until
    the deadline has passed.
    """
    if may_try_first(deadline, line):
        result = attempt(0.0)
        if result is not None or deadline.left <= 0:
            return result
    if line is None:
        return _poll(attempt, deadline)
    sleeper = Sleeper()
    granted = False
    try:
        line.lookout.join(line.key, sleeper)
        while sleeper.sleep(line.lookout, deadline):
            result = attempt(deadline.passed)
            if result is not None:
                granted = True
                return result
            line.lookout.look_soon(line.key)
    finally:
        line.lookout.leave(line.key, sleeper, granted=granted)
    return attempt(deadline.passed)


def may_try_first(deadline: Deadline, line: Line | None) -> bool:
    """Whether to try before standing in line: who does not wait goes before nobody for long."""
    return line is None or deadline.left <= 0 or not line.lookout.is_awaited(line.key)


class Sleeper:
    """A thread that stands in line."""

    def __init__(self) -> None:
        self._bell = threading.Event()

    def wake(self) -> None:
        """See `Waiter`."""
        self._bell.set()

    def sleep(self, lookout: Lookout, deadline: Deadline) -> bool:
        """Sleep until it is time to try; `False` if the deadline has passed."""
        while (left := deadline.left) > 0:
            if self._bell.wait(min(left, DOUBT)) or (left > DOUBT and not lookout.works):
                self._bell.clear()
                return True
        return False


def _poll(attempt: Callable[[float], T | None], deadline: Deadline) -> T | None:
    result, delay = None, FIRST
    left = deadline.left
    while result is None and left > 0:
        time.sleep(min(jitter(delay), left))
        delay = min(delay * GROWTH, LONGEST)
        left = deadline.left
        result = attempt(deadline.passed)
    return result
