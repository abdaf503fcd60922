"""A queue: those of this process who wait for one name, and when to look at its row again.

Only the first one tries. What wakes it stands in `lookout.py`.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Protocol

from .backends.base import Seen
from .deadlines import clock

Name = tuple[str, int]
"""Name and slot."""

FIRST = 0.005
"""Seconds until the next look at a lock that was on the move."""
LONGEST = 0.36
"""The most seconds, give or take a quarter, between two looks at a row that nobody tells about."""
GROWTH = 2.0
SETTLE = 0.05
"""Seconds, at least, from a try that came too late to the look at who was faster."""
LATE = 0.01
"""Seconds after the end of a lease to look: it shall have ended on the database's clock."""
FARTHEST = 30.0
"""Seconds until the next look, however long the lease: the database's clock may be set on, or a row
changed by hand, and neither is told."""
PATIENCE = 1.0
"""Seconds after which a turn that nobody has taken goes to the next in line."""


class Waiter(Protocol):
    """Somebody who waits, in a thread or a task."""

    def wake(self) -> bool:
        """Say that it is time to try; `False` if it will never hear of that.

        May be called from any thread, and more than once.
        """

    def ticket(self) -> int | None:
        """Return its number in a queue that other processes have a part in."""

    @property
    def is_well(self) -> bool:
        """Whether it has shown lately that it goes on waiting."""


class Queue:
    """Those of this process who wait for one name, in the order they came."""

    def __init__(self, key: Name) -> None:
        self.key = key
        self.waiters: list[Waiter] = []
        self.due = 0.0
        self.delay = FIRST
        self.token = -1
        self.told = False
        """Whether a release would be heard of."""
        self.called = math.inf
        """Since when it is somebody's turn who has not tried yet."""

    def wake(self) -> None:
        """Let the one who has waited longest try: not who was called long ago, and did nothing.

        An interrupt may have come as it was about to leave the line, or its connection hangs.
        """
        if not self.waiters:
            return
        if clock() - self.called > PATIENCE:
            self.called = math.inf
            self.waiters.append(self.waiters.pop(0))
        self.called = min(self.called, clock())
        while self.waiters and not self.waiters[0].wake():
            self.waiters.pop(0)

    def arrange(self) -> None:
        """Let those who have tickets stand in their order: another thread may have been faster."""
        tickets = [waiter.ticket() for waiter in self.waiters]  # once: they may change meanwhile
        holders = zip(tickets, self.waiters, strict=True)
        numbered = [(ticket, waiter) for ticket, waiter in holders if ticket is not None]
        in_order = iter(sorted(numbered, key=itemgetter(0)))
        self.waiters[:] = [
            waiter if ticket is None else next(in_order)[1]
            for ticket, waiter in zip(tickets, self.waiters, strict=True)
        ]

    def look_soon(self) -> float:
        """Look at the row again, later each time that nothing has changed; return when."""
        self.called = math.inf
        head = self.waiters[0]
        self.arrange()
        if self.waiters[0] is not head:
            self.wake()
        self.due = min(self.due, clock() + max(SETTLE, self.delay))
        return self.due

    def learn(self, seen: Seen | None, *, told: bool, pace: float) -> None:
        """Take note of what a look has shown. `told`: somebody listens. `pace`: of the looks."""
        left = seen.time_left / 1e6 if seen else 0.0
        if seen is None or seen.token != self.token:
            self.delay = FIRST
        self.token = seen.token if seen else -1
        now = clock()
        self.told = bool(left > 0 and told and seen and seen.wanted)
        if self.told:
            self.due = now + min(left + LATE, FARTHEST)
            return
        # One that is free and still not to be had is locked: then a look and a try are two.
        self.due = now + (min(pace * self.delay, left + LATE) if left else 2 * pace * self.delay)
        self.delay = min(self.delay * GROWTH, LONGEST)
        if not left:
            self.wake()
