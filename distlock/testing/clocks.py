"""A clock that a test moves on, so that nobody sleeps.

# Note [Time that passes at once]
Time is looked at in two places, and both have to agree. In this process all of it is read from
one clock (`deadlines.py`), which gets ahead of the machine's. The database's clock cannot be moved;
instead everything that it has stored becomes older by as much, in its own rows: then the lease that
had 30 seconds left has 20, whoever asks, in SQL or from another process.

The rows go first. A renewal that comes in between then trusts its lease for too short a time, and
never for too long. For the same reason the process's clock is never set back: it stays ahead when
the test is over.

What would have happened meanwhile happens: every renewal is made at its time, by the keeper, or
here for leases that no keeper can see. What the clock does not move is the calendar: the
database's own now, tokens, and what is counted from 1970, as the buckets of `every`.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterable
from functools import partial

from asgiref.sync import sync_to_async
from django.apps import apps
from django.utils.asyncio import async_unsafe

from .. import acquisitions, deadlines, lookout, places
from ..arguments import known_alias
from ..backends.base import Holder, this_host
from ..background import look_at_the_time
from ..conf import settings
from ..contexts import Context
from ..deadlines import Deadline, Limit, Seconds, clock
from ..exceptions import LockError, LockLost
from ..keeper import keeper
from ..leases import Lease
from ..places import place
from ..queues import LATE
from ..terms import Key, State, Term
from . import seen
from .blocks import Block, refuse_in_production

PATIENCE = 10.0
"""Real seconds that the keeper may take for a renewal."""
FAR = 24 * 3600.0
"""Seconds that a wait without an end does not skip: the other holder lives on, and renews."""

MOMENT = "UTCDateTimeField"
"""The type of columns that hold a moment on the database's clock."""

_mutex = threading.RLock()


def fake_clock(*, using: str | Iterable[str] | None = None) -> FakeClock:
    """Return a block in which nobody sleeps; `as` names the `FakeClock`.

    Time goes on as ever, and `advance()` lets more of it pass at once. Who waits for a lock that
    somebody outside this process holds does not sleep: the time passes at once, until the lease of
    the other ends or the wait is over. Who waits for a thread or task of this process waits for it.

    using: the alias of the database whose rows get older, or several; default: that of the
        setting. Other processes see it in the rows, and nowhere else.

    Raises `RuntimeError` outside of tests.
    """
    refuse_in_production("fake_clock()")
    using = settings().USING if using is None else using
    aliases = [using] if isinstance(using, str) else using
    return FakeClock([known_alias(alias) for alias in aliases])


class FakeClock(Block["FakeClock"]):
    """See `fake_clock`, and Note [Time that passes at once]."""

    def __init__(self, aliases: list[str]) -> None:
        self._aliases = aliases

    @async_unsafe("A coroutine must await aadvance().")
    def advance(self, seconds: Seconds) -> None:
        """Let that many seconds pass at once, and be done with what happens in them.

        Each renewal that would have come is made: an hour with a ttl of 30 s is 360 of them. A
        lease that would not have been renewed is lost. Deadlines of waits that have passed are
        over; who waits in this process looks at the clock now.

        Inside a transaction, rows that this or another one has locked do not get older.
        """
        end = clock() + deadlines.seconds(seconds, "seconds")
        with _mutex:
            while (left := end - clock()) > 0:
                self._move(min([left, *(term.next_renewal - clock() for term in _renewed())]))
                _renew_what_is_due()
        lookout.rouse()

    async def aadvance(self, seconds: Seconds) -> None:
        """Let that many seconds pass; see `advance`."""
        await sync_to_async(self.advance)(seconds)

    def _enter(self) -> FakeClock:
        self._before, acquisitions.pastime = acquisitions.pastime, self._pass
        return self

    def _leave(self) -> None:
        acquisitions.pastime = self._before

    def _move(self, step: float) -> None:
        milliseconds = math.ceil(max(0.0, step) * 1000)  # as SQLite counts
        if milliseconds and places.instead is None:
            for alias in self._aliases:
                _age(alias, milliseconds * 1000)
        deadlines.ahead += milliseconds / 1000

    def _pass(self, key: Key, deadline: Deadline) -> bool:
        """Let time pass for who met a busy lock; `False` if somebody here may release it."""
        alias, name, slot = key
        if deadline.left <= 0 or alias not in self._aliases:
            return False
        with _mutex:
            where = place(alias)
            holder = where.run(lambda connection: where.backend.holder(connection, name, slot))
            if holder is None or _is_here(holder):
                return False
            keys = [(name, slot)]
            looked = where.run(lambda one: where.backend.look(one, keys, mark=False))
            time_left = looked[keys[0]].time_left / 1e6 if looked else 0.0
            if deadline.left == math.inf and time_left > FAR:
                return False
            self.advance(min(deadline.left, time_left + LATE))
        return True


def _is_here(holder: Holder) -> bool:
    return bool(holder.owner) and (holder.host, holder.pid) == (this_host(), os.getpid())


def _age(alias: str, microseconds: int) -> None:
    """Let all moments that this library has stored be longer ago."""
    where = place(alias)
    for model in apps.get_app_config("distlock").get_models():
        fields = model._meta.concrete_fields
        columns = [one.attname for one in fields if one.get_internal_type() == MOMENT]
        if columns:
            age = partial(where.backend.age, microseconds=microseconds)
            where.run(partial(age, table=model._meta.db_table, columns=columns))


def _renewed() -> list[Term]:
    """Return the terms that somebody is to renew, in time."""
    return [
        term
        for term in seen.terms()
        if term.next_renewal < math.inf and term.state is State.HELD
        if not (term.lost or term.pins or term.abandoned)
    ]


def _renew_what_is_due() -> None:
    due = [term for term in _renewed() if term.next_renewal <= clock()]
    for term in due:
        if not keeper.keeps(term):
            _renew(term)
    look_at_the_time()
    limit = Limit(PATIENCE)
    while any(term.next_renewal <= clock() for term in _renewed() if term in due):
        if not limit.left:
            raise TimeoutError(f"The keeper has not renewed {due} in {PATIENCE:.0f} real seconds.")
        time.sleep(0.001)


def _renew(term: Term) -> None:
    """Renew a lease that no keeper can see: of a `TestCase`, or of a database in memory."""
    try:
        Lease(term, Context(), shares=False).renew()
    except LockLost:
        pass  # told by the signal, and by the lease
    except LockError:
        term.unknown()
