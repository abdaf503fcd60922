"""The one way to wait for a name: try, stand in line, try when woken, until the deadline.

Who wakes those who stand in line is told in `lookout.py`. Nobody relies on it for ever: if the
lookout is stuck, or its thread cannot run, each waiter tries by itself, once a second. Where
another connection would not see what is waited for (`TestCase`, a database in memory), there is no
lookout: each sleeps a little and tries.

The last try comes at the deadline itself, so that a lock freed at the last moment is not missed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from .deadlines import Deadline, clock, jitter
from .lookout import Lookout
from .queues import FIRST, GROWTH, LONGEST, Name

T = TypeVar("T")

DOUBT = 1.0
"""Seconds after which a waiter asks itself whether anybody will wake it."""


@dataclass(frozen=True)
class Line:
    """Where to stand in line for a name."""

    lookout: Lookout
    key: Name
    ticket: Callable[[], int | None]
    """Whose turn it is, where that is settled between processes."""

    @property
    def is_empty(self) -> bool:
        """Whether nobody of this process stands in it."""
        return not self.lookout.is_awaited(self.key)


def wait_for(
    attempt: Callable[[float], T | None], deadline: Deadline, line: Line | None
) -> T | None:
    """Return what `attempt(waited)` gives as soon as that is not `None`, until the deadline."""
    if line is None:
        return _poll(attempt, deadline)
    sleeper = Sleeper(line.ticket)
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


async def await_for(
    attempt: Callable[[float], Awaitable[T | None]], deadline: Deadline, line: Line | None
) -> T | None:
    """Do what `wait_for` does in a task, which occupies no thread while it sleeps."""
    if line is None:
        return await _apoll(attempt, deadline)
    sleeper = TaskSleeper(line.ticket)
    granted = False
    try:
        line.lookout.join(line.key, sleeper)
        while await sleeper.sleep(line.lookout, deadline):
            result = await attempt(deadline.passed)
            if result is not None:
                granted = True
                return result
            line.lookout.look_soon(line.key)
    finally:
        line.lookout.leave(line.key, sleeper, granted=granted)
    return await attempt(deadline.passed)


class Sleeper:
    """A thread that stands in line."""

    def __init__(self, ticket: Callable[[], int | None]) -> None:
        self.ticket = ticket
        self._bell = threading.Event()
        self._seen = clock()

    @property
    def is_well(self) -> bool:
        """See `Waiter`."""
        return clock() - self._seen < 2 * DOUBT

    def wake(self) -> bool:
        """See `Waiter`."""
        self._bell.set()
        return True

    def sleep(self, lookout: Lookout, deadline: Deadline) -> bool:
        """Sleep until it is time to try; `False` if the deadline has passed."""
        while (left := deadline.left) > 0:
            self._seen = clock()
            if self._bell.wait(min(left, DOUBT)) or (left > DOUBT and not lookout.works):
                self._bell.clear()
                return True
        return False


class TaskSleeper:
    """A task that stands in line."""

    def __init__(self, ticket: Callable[[], int | None]) -> None:
        self.ticket = ticket
        self._loop = asyncio.get_running_loop()
        self._bell = asyncio.Event()
        self._woken = False
        self._seen = clock()

    @property
    def is_well(self) -> bool:
        """See `Waiter`."""
        return clock() - self._seen < 2 * DOUBT

    def wake(self) -> bool:
        """See `Waiter`."""
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._bell.set)
        except RuntimeError:  # its loop was closed, and the task will never go on
            return False
        return True

    async def sleep(self, lookout: Lookout, deadline: Deadline) -> bool:
        """Sleep until it is time to try; `False` if the deadline has passed."""
        while (left := deadline.left) > 0:
            self._seen = clock()
            # Not by asyncio.wait_for, which before Python 3.12 may swallow a cancellation.
            timer = self._loop.call_later(min(left, DOUBT), self._bell.set)
            try:
                await self._bell.wait()
            finally:
                timer.cancel()
            self._bell.clear()
            if self._woken or (left > DOUBT and not lookout.works):
                self._woken = False
                return True
        return False


def _poll(attempt: Callable[[float], T | None], deadline: Deadline) -> T | None:
    for nap in _naps(deadline):
        time.sleep(nap)
        result = attempt(deadline.passed)
        if result is not None:
            return result
    return None


async def _apoll(attempt: Callable[[float], Awaitable[T | None]], deadline: Deadline) -> T | None:
    for nap in _naps(deadline):
        await asyncio.sleep(nap)
        result = await attempt(deadline.passed)
        if result is not None:
            return result
    return None


def _naps(deadline: Deadline) -> Iterator[float]:
    """Yield seconds to sleep, longer and longer, until the deadline."""
    delay = FIRST
    while (left := deadline.left) > 0:
        yield min(jitter(delay), left)
        delay = min(delay * GROWTH, LONGEST)
