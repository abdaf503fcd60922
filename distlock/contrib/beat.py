"""Celery beat in high availability: any number of beats run, and the holder of one lock ticks.

    celery -A proj beat -S distlock.contrib.celery:SingleBeatScheduler

# Note [One way back]
Whatever fails, the beat stands down: it gives the lock back, if it still is its own, and forgets
what it knew. Who leads next, itself perhaps, learns from the database what was sent.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from celery.beat import Scheduler, SchedulingError
from django.core.exceptions import ImproperlyConfigured
from django.db import Error, transaction
from kombu.exceptions import OperationalError as BrokerError

from .. import receipts
from ..deadlines import LONGEST, jitter, seconds
from ..events import log
from ..exceptions import LockBusy, LockError, LockLost
from ..fields import json_of
from ..leases import Lease
from ..locks import Lock, lock
from ..receipts import Run
from ._ticks import DatabaseClock, Tick, ran_last, tick_of, time_left

if TYPE_CHECKING:
    from celery import Celery
    from celery.beat import ScheduleEntry

TTL = 10
CATCH_UP = 60
TICK, ENTRY = "distlock_tick", "distlock_entry"


class Leader(Scheduler):
    """What makes a scheduler of beat's tick only while it holds the lock.

    A subclass says where the moments are kept at which the entries ran last.
    """

    lease: Lease | None = None
    _tick: Tick
    _passing = False
    _ends = False

    def __init__(self, app: Celery, *args: Any, **kwargs: Any) -> None:
        self.lock, self.catch_up = self._settings(app)
        self.clock = DatabaseClock(app, self.lock.alias)
        if not kwargs.get("lazy"):  # else it is only asked for its line in the banner
            self.clock.measure()
            app.now = self.clock.now  # type: ignore[method-assign]  # what schedules ask
        super().__init__(app, *args, **kwargs)

    def _settings(self, app: Celery) -> tuple[Lock, timedelta]:
        get = app.conf.get
        try:
            described = lock(
                get("distlock_beat_name", f"celery-beat:{app.main or 'celery'}"),
                ttl=get("distlock_beat_ttl", TTL),
                renew=True,
                note="celery beat",
                using=get("distlock_beat_using", self.default_alias()),
            )
            catch_up = seconds(get("distlock_beat_catch_up", CATCH_UP), "catch_up")
        except (TypeError, ValueError) as error:
            raise ImproperlyConfigured(f"In the settings distlock_beat_*: {error}") from error
        # A beat that stands by asks again and again, and nobody wants to know each time.
        return dataclasses.replace(described, quiet=True), timedelta(seconds=catch_up)

    def default_alias(self) -> str | None:
        """Return the database to keep the lock in, if the app does not say."""
        return None

    def recall(self) -> None:
        """Set each entry's `last_run_at` to what the database says, now that nobody else ticks."""
        raise NotImplementedError

    def remember(self, name: str) -> None:
        """Write when an entry ran last, in a transaction that is `guarded()`."""
        raise NotImplementedError

    # -- one pass --------------------------------------------------------------------------------

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Send what is due, if this beat leads; return the seconds until the next pass."""
        self._passing = True
        try:
            if self.lease is None or self.lease.lost:
                self._lead()
            self.clock.measure()
            return super().tick(*args, **kwargs)
        except LockBusy:
            return 0.0
        except (Error, LockError, BrokerError) as error:
            text = "beat_stood_down name=%r: %s"
            log(logging.WARNING, text, lock=self.lock.literal_name, error=error)
            self.stand_down()
            return jitter(1.0)
        finally:
            self._passing = False
            if self._ends:
                raise SystemExit

    def _lead(self) -> None:
        """Wait until this beat is the leader, for a while. Raises `LockBusy`."""
        self.stand_down()
        self.lease = self.lock.acquire(wait=self.max_interval)
        self.clock.measure()
        self.recall()
        text = "beat_leads name=%r token=%s"
        log(logging.INFO, text, lock=self.lease.name, token=self.lease.token)

    def stand_down(self) -> None:
        """Give the lock back, if it is held; see Note [One way back]."""
        lease, self.lease = self.lease, None
        self._heap = None
        if lease is not None:
            with suppress(Error, LockError):
                lease.release()

    def adjust(self, n: Any, drift: float = 0.0) -> Any:
        """Wake up on time: beat's ten milliseconds sooner it would ask over and over till then."""
        return super().adjust(n, drift)

    def is_due(self, entry: ScheduleEntry) -> tuple[bool, float]:
        """Return whether to send an entry now, and the seconds until its next tick."""
        now = self.clock.now()
        with self.clock.stopped_at(now):
            due, following = super().is_due(entry)
            if due:
                self._tick = tick_of(self.lock.literal_name, entry, now, self.catch_up)
                left = time_left(entry, self._tick.ran_at)
                following = max(0.0, min(following, left.total_seconds()))
        return due, following

    def reserve(self, entry: ScheduleEntry) -> Any:
        """Return the entry as it will be after the tick that is due."""
        with self.clock.stopped_at(self._tick.ran_at):
            return super().reserve(entry)

    def apply_entry(self, entry: ScheduleEntry, producer: Any = None) -> None:
        """Send the tick that is due, and then note that it was sent.

        Raises `LockLost` if this beat does not lead any more, and `BrokerError`: the tick stays
        due. What cannot be sent at all is logged and passed over, as beat does.
        """
        assert self.lease is not None
        self._prove(self.lease)
        given = entry.options or {}
        headers = {TICK: self._tick.at.isoformat(), ENTRY: entry.name}
        headers = {**(given.get("headers") or {}), **headers}
        # Not a copy of the entry: that would take the app from the schedule, which they share.
        entry.options = {**given, "task_id": self._tick.id, "headers": headers}
        try:
            self.apply_async(entry, producer=producer, advance=False)
        except SchedulingError as error:
            if self._ends or isinstance(error.__context__, BrokerError | OSError):
                raise BrokerError(str(error)) from error
            log(logging.ERROR, "beat_tick_failed entry=%r", entry=entry.name, exc_info=True)
        finally:
            entry.options = given
        self.remember(str(entry.name))

    def _prove(self, lease: Lease) -> None:
        """Raise `LockLost` unless this beat provably leads."""
        try:
            lease.renew()
        except LockLost:
            raise
        except LockError:  # somebody, such as this beat's own keeper, has the row for a moment
            lease.check()

    @contextmanager
    def guarded(self) -> Iterator[Lease]:
        """Open a transaction that cannot commit once another beat leads."""
        assert self.lease is not None
        with transaction.atomic(using=self.lock.alias):
            self.lease.guard()
            yield self.lease

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Hand over at once.

        Beat calls this from its signal handler, before that raises `SystemExit`, and once more at
        its end. In the middle of a pass it would close the connections that are in use, and their
        errors would hide the exit, so there it only sees to it that this pass is the last.
        """
        if self._passing:
            self._ends = True
            return
        self.stand_down()
        super().close()

    @property
    def info(self) -> str:
        """Return the line for beat's banner."""
        return f"    . lock -> {self.lock.name} ({self.lock.ttl:g} s, {self.lock.alias})"


class SingleBeatScheduler(Leader):
    """Beat's own scheduler, with the schedule of the app's settings and no file.

    The moments of all entries are one receipt, under the name of the lock.
    """

    def setup_schedule(self) -> None:
        """Take the schedule from the settings, with beat's own entries."""
        self.merge_inplace(self.app.conf.beat_schedule)
        self.install_default_entries(self.schedule)

    def recall(self) -> None:
        """Take over the moments; an entry that is new counts from now on, whoever ticks then."""
        receipt = receipts.find(self.lock.alias, self.lock.literal_name)
        moments = {} if receipt is None else receipt.result
        for name, entry in self.schedule.items():
            if name in moments:
                entry.last_run_at = datetime.fromisoformat(moments[name])
        self.remember()

    def remember(self, name: str = "") -> None:
        """Write the receipt."""
        moments = {name: ran_last(entry).isoformat() for name, entry in self.schedule.items()}
        with self.guarded() as lease:
            begun = lease.acquired_at
            run = Run(self.lock.alias, lease.name, lease.token, begun, "celery beat", LONGEST)
            receipts.finish(run, json_of(moments), begun=False)
