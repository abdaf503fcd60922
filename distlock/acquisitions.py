"""One acquisition: what a thread or task asks for, from its claim to its lease.

Everything here that sends statements runs in one thread: the caller's, or the one that Django gives
to a task for what is synchronous (`errands.py`). Only the waiting in between is different.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from django.core.exceptions import SynchronousOnlyOperation
from django.db import Error, InterfaceError, OperationalError
from django.utils.asyncio import async_unsafe

from . import contexts, signals, waiting
from .backends.base import Claim, Grant
from .background import soon
from .conf import settings
from .deadlines import Deadline, clock, seconds
from .errands import Errand
from .events import log
from .exceptions import AlreadyHeld, LockError
from .keeper import can_keep, keeper
from .leases import Lease
from .lookout import Lookout, lookout
from .places import Place, place
from .terms import Key, Term
from .turns import Turn

if TYPE_CHECKING:
    from .locks import Lock

Granted = tuple[Grant, float]
"""A grant, and the seconds waited for it."""

pastime: Callable[[Key, Deadline], bool] | None = None
"""A test's fake clock (`testing/clocks.py`): whether time has passed for who met a busy lock."""


class Acquisition:
    """A try to get a lock, for as long as its deadline allows."""

    def __init__(self, lock: Lock, deadline: Deadline) -> None:
        self._lock = lock
        self._deadline = deadline
        self._context = contexts.current()
        self._alias = lock.alias
        self._claim = _claim_of(lock)
        self._requested = clock()
        self._where: Place | None = None
        self._lookout: Lookout | None = None
        self._turn: Turn | None = None
        self._adopts = False
        self._told = threading.Lock()  # taken by whoever tells first how this has ended

    @async_unsafe(
        "A coroutine must await aacquire(), or use `async with`: this would block the event loop."
    )
    def run(self) -> Lease | None:
        """Return a lease, or `None` if the lock is busy at the deadline. Sleeps in this thread."""
        try:
            return self._nested() or self._adopted() or self._lease(self._try_and_wait)
        except Exception as error:
            self._tell_failed(error)
            raise

    async def arun(self) -> Lease | None:
        """Return a lease, or `None` if the lock is busy at the deadline.

        Cancelled, it leaves no lease behind, and needs the event loop no more for that.
        """
        lease = self._nested()
        if lease is not None:
            return lease
        mine, self._context = self._context, contexts.Context()  # until the task has the lease
        try:
            lease = await self._errand(lambda: self._adopted() or self._lease(self._try_first))
            if lease is None and self._deadline.left > 0:
                lease = await waiting.await_for(self._try_in_thread, self._deadline, self._line)
            if lease is None and self._turn:
                await Errand(self._turn.leave).run()
        except (Exception, asyncio.CancelledError) as error:
            self._tell_failed(error)
            raise
        finally:
            if self._turn:
                self._turn.abandon()
        if lease is not None:
            lease.hand_to(mine)
        return lease

    async def _try_in_thread(self, waited: float) -> Lease | None:
        def attempt() -> Granted | None:
            # Anew: a task that outlives its request goes on in another thread.
            self._where = place(self._alias, to_acquire=True)
            return self._try(waited)

        return await self._errand(lambda: self._lease(attempt))

    async def _errand(self, function: Callable[[], Lease | None]) -> Lease | None:
        return await Errand(function, unwanted=self._unwanted).run()

    def _unwanted(self, lease: Lease | None) -> Callable[[], None] | None:
        """Give back what came for a task that was cancelled, maybe before it had a turn."""
        if self._turn:
            self._turn.abandon()
        return None if lease is None else lease.decline(adopted=self._adopts)

    # -- what runs in a thread -------------------------------------------------------------------

    def _lease(self, granted_by: Callable[[], Granted | None]) -> Lease | None:
        try:
            granted = granted_by()
            if granted is None:
                return None
            if self._told.acquire(blocking=False):
                return self._begin(*granted)
            self._free(at_once=True)  # it came too late: the task was cancelled, and that is told
            return None
        except BaseException as error:
            self._break_off(error)
            raise

    def _adopted(self) -> Lease | None:
        """Find where statements run; return what the caller's transaction still holds there."""
        self._where = where = place(self._alias, to_acquire=True)
        if where.transaction is not None:
            if where.own:
                self._deadline = Deadline(0)  # SQLite: nobody else could free it meanwhile
            adopted = where.transaction.adopt(self._alias, self._claim.name, self._claim.slot)
            if adopted:
                self._adopts = True
                return Lease(adopted, self._context)
        if not where.own and can_keep(where.connection):
            self._lookout = lookout(self._alias)
            if self._lock.fair and self._deadline.left > 0:
                self._turn = Turn(self._place, self._claim)
        return None

    @property
    def _line(self) -> waiting.Line | None:
        """Where to stand in line. Made when it is asked for: it refers to this acquisition."""
        if self._lookout is None:
            return None
        key = (self._claim.name, self._claim.slot)
        return waiting.Line(self._lookout, key, self._ticket)

    def _ticket(self) -> int | None:
        return self._turn.number if self._turn else None

    def _place(self) -> Place:
        assert self._where is not None
        return self._where

    def _try_and_wait(self) -> Granted | None:
        granted = self._try_first()
        if granted is None and self._deadline.left > 0:
            granted = waiting.wait_for(self._try, self._deadline, self._line)
            if self._turn:
                self._turn.leave()
        return granted

    def _try_first(self) -> Granted | None:
        """Try at once, unless others of this process stand in line before."""
        line = self._line if self._deadline.left > 0 else None
        if line is None or line.is_empty:
            return self._try(0.0)
        if self._turn:
            self._turn.stand_in_line()
        return None

    def _try(self, waited: float) -> Granted | None:
        where, turn = self._place(), self._turn
        if turn and self._deadline.left > 0 and not turn.has_come():
            return None
        self._requested = clock()
        grant = where.grant(self._claim, waited)
        while grant is None and pastime and pastime(self._key, self._deadline):
            waited, self._requested = self._deadline.passed, clock()
            grant = where.grant(self._claim, waited)
        if turn and grant is not None:
            turn.leave()
        elif turn and self._deadline.left > 0:
            turn.stand_in_line()
        return None if grant is None else (grant, waited)

    def _begin(self, grant: Grant, waited: float) -> Lease:
        where, term = self._place(), self._term(grant)
        lease = Lease(term, self._context)
        try:
            if where.transaction is not None:
                where.transaction.take(term, own=where.own)
            if not where.own and can_keep(where.connection):
                keeper.keep(term, may_free=where.transaction is None)
        except BaseException:
            self._told.release()
            lease.abandon()
            raise
        signals.lock_acquired.send_robust(
            sender=type(self._lock), lease=lease, waited=waited, took=self._deadline.passed
        )
        return lease

    def _tell_failed(self, error: BaseException) -> None:
        """Tell of an acquire without an answer, once, and let nothing but that error out.

        What is wrong use is told by its error alone: no fault of the database is behind it.
        """
        refused = isinstance(error, LockError) and not isinstance(error.__cause__, Error)
        if refused or isinstance(error, SynchronousOnlyOperation):
            return
        if not self._told.acquire(blocking=False):
            return
        about = {"name": self._claim.name, "error": error, "waited": self._deadline.passed}
        try:
            signals.lock_failed.send_robust(sender=type(self._lock), **about)
        except Exception:  # an `async def` receiver cannot be called from the loop's thread
            text = "signal_not_sent: a receiver of lock_failed cannot be called in a task"
            log(logging.ERROR, text, exc_info=True)

    def _break_off(self, error: BaseException) -> None:
        """Let the keeper free what an acquire that broke off may have been granted."""
        if self._turn:
            self._turn.abandon()
        if isinstance(error, LockError | SynchronousOnlyOperation):
            return
        if isinstance(error, Error) and not isinstance(error, OperationalError | InterfaceError):
            return
        self._free()

    def _free(self, *, at_once: bool = False) -> None:
        """Free what may have been granted. `at_once`: here, if the keeper cannot do it."""
        where = self._where
        if where is None:
            return
        term = self._term(Grant(0, 0, 0))
        term.min_hold_us = 0  # nothing was done under it
        if not where.own and can_keep(where.connection):
            keeper.finish(term, lambda found: None)
        elif at_once:
            free = where.backend.free
            with suppress(Error):
                where.run(lambda connection: free(connection, term))

    def _term(self, grant: Grant) -> Term:
        lock = self._lock
        return Term(
            self._alias,
            self._claim.name,
            self._claim.slot,
            self._claim.owner,
            token=grant.token,
            ttl=self._claim.ttl / 1_000_000,
            acquired_us=grant.acquired_us,
            expires_us=grant.expires_us,
            requested=self._requested,
            renew=settings().RENEW if lock.renew is None else lock.renew,
            min_hold=lock.min_hold,
            max_hold=lock.max_hold,
            on_lost=_tell_lost,
            on_dropped=_tell_dropped,
        )

    # -- what needs no statement -----------------------------------------------------------------

    @property
    def _key(self) -> Key:
        return (self._alias, self._claim.name, self._claim.slot)

    def _nested(self) -> Lease | None:
        key = self._key
        if not self._context.holds(key):
            return None
        if not self._lock.reentrant:
            raise AlreadyHeld(
                f"This thread or task already holds the lock {key[1]!r}; waiting for it would "
                "never end. Pass reentrant=True to nest, or split the function.",
                name=key[1],
            )
        return Lease(self._context.held[key], self._context)


def _claim_of(lock: Lock) -> Claim:
    durable = settings().CRASH_SAFE if lock.crash_safe is None else lock.crash_safe
    ttl = seconds(settings().TTL, "TTL") if lock.ttl is None else lock.ttl
    return Claim(
        name=lock.literal_name,
        slot=lock.slot,
        owner=secrets.token_hex(16),
        ttl=int(ttl * 1_000_000),
        min_hold=int(lock.min_hold * 1_000_000),
        note=lock.note,
        thread=contexts.name_of_caller(),
        durable=durable and not lock.atomic,
        resumes=lock.resumes,
    )


def _tell_lost(term: Term, reason: str) -> None:
    lease = Lease(term, contexts.Context(), shares=False)
    soon(lambda: signals.lock_lost.send_robust(sender=Lease, lease=lease, reason=reason))


def _tell_dropped(term: Term) -> None:
    lease = Lease(term, contexts.Context(), shares=False)
    signals.lock_dropped.send_robust(sender=Lease, lease=lease, held=term.held_for)
