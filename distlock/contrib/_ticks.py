"""Beat's ticks: when one is due, by whose clock, and what it is called.

# Note [What a tick is]
A tick is what follows the moment from which its entry's schedule is reckoned: the tick before it.
That moment is kept in the database and moved on, under the leader's guard, after the tick was sent:
never before, or a kill in between would lose it. So a tick whose leader died or was paused may be
sent by two beats. They make its task id from the same moment: the twins have the same id, and a
worker drops the second.

# Note [Which clock]
Whether a tick is due is a question to the database's clock, asked before each pass and counted on
from there. Beats on hosts whose clocks differ agree on it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone, tzinfo
from typing import TYPE_CHECKING, NamedTuple

from celery import schedules
from celery.utils.time import maybe_make_aware

from ..backends import backend_for
from ..backends.base import EPOCH, MICROSECOND
from ..deadlines import clock
from ..places import place

if TYPE_CHECKING:
    from celery import Celery
    from celery.beat import ScheduleEntry

NAMESPACE = uuid.UUID("3f0e4d52-3c6f-4b8e-9a53-6c1f0a7f7c0e")
IN_STEP = (schedules.schedule, schedules.crontab)
"""Schedules in which a later tick follows each tick. After a sunrise it may be the same again."""


class DatabaseClock:
    """The database's clock, without asking it each time; see Note [Which clock]."""

    def __init__(self, app: Celery, alias: str) -> None:
        self._app = app
        self._alias = alias
        self._ahead = 0.0
        self._stopped: datetime | None = None

    def measure(self) -> None:
        """Ask the database. Raises what the database raises."""
        where, before = place(self._alias), clock()
        found = where.run(backend_for(where.connection).clock)
        self._ahead = found / 1_000_000 - (before + clock()) / 2

    def now(self) -> datetime:
        """Return the time, in the app's zone."""
        now = self._stopped or EPOCH + int((clock() + self._ahead) * 1_000_000) * MICROSECOND
        return now.astimezone(self._app.timezone)

    @contextmanager
    def stopped_at(self, moment: datetime) -> Iterator[None]:
        """Make it that time for the length of the block."""
        before, self._stopped = self._stopped, moment
        try:
            yield
        finally:
            self._stopped = before


class Tick(NamedTuple):
    """A tick that is due."""

    id: str
    """The same whoever sends it, see Note [What a tick is]."""
    at: datetime
    """When it fell due."""
    ran_at: datetime
    """From when the next one is to be reckoned."""


def tick_of(beat: str, entry: ScheduleEntry, now: datetime, catch_up: timedelta) -> Tick:
    """Return the tick that is due, for a clock that was stopped `now`.

    The next one is reckoned from it, so that none is left out while one leader follows the other.
    What is later than `catch_up` is sent once, and the next reckoned from now, as beat does.
    """
    ran_at, now = ran_last(entry), now.astimezone(timezone.utc)
    at = min(now, now + time_left(entry, ran_at))
    in_step = isinstance(entry.schedule, IN_STEP) and ran_at < at and now - at <= catch_up
    name = uuid.uuid5(NAMESPACE, f"{beat}\n{entry.name}\n{ran_at.isoformat()}")
    return Tick(str(name), at, at if in_step else max(now, ran_at + MICROSECOND))


def ran_last(entry: ScheduleEntry) -> datetime:
    """Return the moment from which an entry's schedule is reckoned, in UTC."""
    assert entry.last_run_at is not None
    return maybe_make_aware(entry.last_run_at).astimezone(timezone.utc)


def time_left(entry: ScheduleEntry, ran_at: datetime) -> timedelta:
    """Return how long until the tick that follows that moment."""
    assert entry.schedule is not None
    zone: tzinfo = entry.schedule.tz  # type: ignore[assignment]
    return entry.schedule.remaining_estimate(ran_at.astimezone(zone))
