"""The lease: what a holder has in hand. Several handles may share one term (`terms.py`)."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import Error

from . import signals
from .backends.base import moment_of
from .background import soon
from .connections import in_transaction
from .contexts import Context
from .deadlines import Seconds, clock, seconds
from .errands import Errand
from .events import log
from .exceptions import LockError, LockLost
from .keeper import keeper
from .places import Place, place, warn_about_others
from .terms import State, Term
from .transactions import lost_error

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from typing_extensions import Self

PATIENCE = 1.0
"""Seconds that the thread of a task's synchronous code may take to begin a release."""


class Lease:
    """A lock that is held, until `release()`, its expiry or its loss.

    Use it as a context manager, or call `release()` in a `finally`. It may be handed to another
    thread. If the last reference is dropped first, `ResourceWarning`: the renewals stop and the
    lease ends after its ttl.
    """

    def __init__(self, term: Term, context: Context, *, shares: bool = True) -> None:
        self._term = term
        self._context = context
        self._released = not shares
        self._mutex = threading.RLock()  # see Note [Collected]
        if shares:
            term.share(self)
            context.remember(term)

    def __repr__(self) -> str:
        return f"<Lease {self.name!r} token {self.token} {self._term.state.value}>"

    @property
    def name(self) -> str:
        """The lock's name."""
        return self._term.name

    @property
    def owner(self) -> str:
        """The nonce of this acquisition."""
        return self._term.owner

    @property
    def token(self) -> int:
        """The fencing token: greater than that of every earlier grant of this name."""
        return self._term.token

    @property
    def acquired_at(self) -> datetime:
        """When it was granted, on the database's clock."""
        return moment_of(self._term.acquired_us)

    @property
    def expires_at(self) -> datetime:
        """When it ends unless it is renewed, on the database's clock, as far as is known here."""
        return moment_of(self._term.expires_us)

    @property
    def held_for(self) -> float:
        """Seconds since the grant, on this process's clock."""
        return self._term.held_for

    @property
    def remaining(self) -> float:
        """Seconds that this process may still trust the lease, renewals not counted ahead."""
        return self._term.remaining

    @property
    def lost(self) -> bool:
        """Whether the loss is known, or trust has run out without a renewal."""
        return self._term.lost

    def check(self) -> None:
        """Raise `LockLost` if the lease is not provably held. Sends no SQL."""
        if self._term.lost or self._term.state is State.RELEASED:
            raise self._loss()

    def renew(self, ttl: Seconds | None = None) -> None:
        """Extend the lease by its ttl from now, or by `ttl` seconds, which then is its ttl.

        Where `min_hold` keeps the lock for longer than that anyway, nothing is done. Raises
        `LockLost` if it has ended, even if nobody else has taken it; `LockError` if a running
        transaction has the row locked: then nothing has changed; and what the database raises.
        """
        self.check()
        term = self._term
        span = None if ttl is None else seconds(ttl, "ttl", positive=True)
        if self._is_kept_longer(span or term.ttl):
            return
        microseconds = None if span is None else int(span * 1_000_000)
        requested = clock()
        where = place(term.alias)
        renew = where.backend.renew
        try:
            renewed = where.run(lambda connection: renew(connection, [term], microseconds))
        except Error:
            _tell_renewed(term, failed=1)
            raise
        if term.owner not in renewed:
            term.lose("it had expired, or its row has another owner")
            raise self._loss()
        expires = renewed[term.owner]
        if expires is None:
            _tell_renewed(term, locked=1)
            raise LockError(
                f"The lock {self.name!r} was not renewed: a running transaction has its row "
                "locked. It still is yours; try again when that has ended.",
                name=self.name,
            )
        _tell_renewed(term, renewed=1)
        if where.own and where.transaction is not None:
            where.transaction.renew(term, requested, expires, span)
            return
        term.confirm(requested, expires, ttl=span)
        keeper.replan(term)

    def guard(self) -> None:
        """Fence the open transaction: after this no later holder can be granted before it ends.

        The caller must be inside a transaction on the lock's database, and should call this
        before the writes that the lock protects. Raises `LockLost` if the lease is not held, and
        then the transaction cannot commit; `LockError` if its snapshot is older than the lock;
        `RuntimeError` outside a transaction.
        """
        where = place(self._term.alias)
        if not in_transaction(where.connection):
            raise RuntimeError(
                f"guard() of the lock {self.name!r} needs an open transaction on the database "
                f"{self._term.alias!r}: outside one there is nothing that it could protect."
            )
        if where.transaction is not None and self._term in where.transaction.releases:
            return  # the release guards it
        if self._released:
            raise self._loss()
        if where.transaction is not None:
            where.transaction.guard(self._term)
        elif not where.backend.guard(where.connection, self._term):
            self._term.lose("the row has another owner")  # in the transaction of a TestCase
            raise self._loss()

    def release(self) -> None:
        """Give the lock back. A second call does nothing.

        Inside a transaction on the lock's database the lock stays held until that has ended; if
        it rolls back, a lease that was taken before it is held again. Raises `LockLost` if the
        lease was lost: what was done under it may have been done twice. Where the database does
        not answer, outside a transaction, the keeper finishes it.
        """
        try:
            with self._mutex:
                if self._released:
                    return
                self._released = True
            self._give_back()
        except LockLost:
            raise
        except SynchronousOnlyOperation:  # nothing was sent: the right call may follow
            self._undone()
            raise
        except BaseException:
            if self._released:
                self._go_on_giving_back()
            raise

    def waive_min_hold(self) -> None:
        """Let the release free the lock at once: what it was taken for did not happen."""
        self._term.min_hold_us = 0

    async def acheck(self) -> None:
        """Raise `LockLost` if the lease is not provably held; see `check`."""
        self.check()

    async def arenew(self, ttl: Seconds | None = None) -> None:
        """Extend the lease; see `renew`."""
        await sync_to_async(self.renew)(ttl)

    async def aguard(self) -> None:
        """Fence the transaction that is open in the thread of this task's synchronous code.

        See `guard`, and mind that Django has no transactions across an `await`.
        """
        await sync_to_async(self.guard)()

    async def arelease(self) -> None:
        """Give the lock back; see `release`. That happens even if the task is cancelled here."""
        await self._in_thread(self.release)

    def abandon(self, *, unused: bool = False) -> None:
        """Give the lock back without a word to the database: the keeper frees it soon.

        For where nobody can wait, and no transaction has to do with the lease, be it that there is
        none or that the lease is `unused`. A loss is left for `release` to tell.
        """
        if self._term.lost:
            return
        with self._mutex:
            if self._released:
                return
            self._released = True
        term = self._term
        if term.unshare(self) or term.over:
            return
        self._context.forget(term)
        if term.kept or (unused and term.renewed_here):
            self._leave_to_keeper()
        else:
            term.abandon()

    def hand_to(self, context: Context) -> None:
        """Let another thread or task hold it from now on."""
        self._context.forget(self._term)
        self._context = context
        if not self._released:
            context.remember(self._term)

    def decline(self, *, adopted: bool) -> Callable[[], None] | None:
        """Give back what came for a task that was cancelled: it has done nothing under it.

        So the keeper may free it, in a transaction, too. Return what is to be called, in the thread
        of synchronous code, where it must not or cannot: what was `adopted` from a transaction is
        released by that, and what the keeper does not have only that connection may see.
        """
        if adopted:
            return self._release_quietly
        self.waive_min_hold()
        if self._term.renewed_here:
            self.abandon(unused=True)
            return None
        return self._release_quietly

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release; a loss does not hide an exception that is on its way out."""
        if self._term.inherited:
            return
        if exc is None:
            self.release()
            return
        self._release_quietly()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release; see `__exit__`."""
        await self._in_thread(partial(self.__exit__, exc_type, exc, traceback))

    def __del__(self) -> None:
        # The collector calls this in any thread, at any point: it may take no lock of the keeper's.
        if getattr(self, "_released", True) or self._term.over or self._term.inherited:
            return
        if self._term.unshare(self) == 0:
            self._term.abandon()
            self._context.forget(self._term)
            warnings.warn(
                f"A lease of the lock {self.name!r} was dropped without release(): it is held "
                f"until {self.expires_at}.",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    async def _in_thread(self, release: Callable[[], None]) -> None:
        """Release in the thread of synchronous code, or by the keeper if that has no time.

        It may be waiting for this very lock, and then it would wait for us, and we for it.
        """
        if self._term.handles == {id(self)}:
            self._context.forget(self._term)  # it may be taken again, whatever becomes of this
        patience = PATIENCE if self._term.kept else None
        await Errand(release, instead=self.abandon, patience=patience).run()

    # -- the end ---------------------------------------------------------------------------------

    def _release_quietly(self) -> None:
        """Release where another exception goes first, or nobody waits for one."""
        try:
            self.release()
        except LockLost:
            pass  # told by the signal
        except Exception:
            log(logging.WARNING, "lock_release_failed name=%r", lock=self.name, exc_info=True)

    def _give_back(self) -> None:
        """Release by the connection's state, now, if nobody else has a handle of the term."""
        term = self._term
        if term.inherited:
            raise self._loss()
        if term.unshare(self) == 0 and term.state is not State.RELEASED:
            where = place(term.alias)
            self._context.forget(term)
            warn_about_others(term)
            if _is_cut_off(where):
                self._leave_to_keeper()
            elif where.transaction is not None:
                where.transaction.release(term, self._ended, self._undone)
            else:
                self._release_alone(where)
        if term.lost:
            raise self._loss()

    def _go_on_giving_back(self) -> None:
        """See to it that a release that was interrupted, or failed, is finished by somebody."""
        term = self._term
        if term.unshare(self) or term.over:
            return
        self._context.forget(term)
        where = place(term.alias)
        if where.transaction is not None and not _is_cut_off(where):
            where.transaction.file(term, self._ended, self._undone)
        elif not where.own:
            self._leave_to_keeper()

    def _release_alone(self, where: Place) -> None:
        """Release in a transaction of its own, or in the one that `TestCase` keeps open."""
        term, backend = self._term, where.backend
        lost = term.lost
        term.move(State.RELEASING)  # a renewal that is under way must not take it for a loss
        keeper.drop(term)
        sent = 0

        def release(connection: BaseDatabaseWrapper) -> bool:
            nonlocal sent
            sent += 1
            return backend.release(connection, term, alone=not where.own)

        try:
            ours = where.run(release)
        except Error as error:
            if where.own or lost or backend.in_memory(where.connection):
                raise
            text = "lock_release_delayed name=%r: %s"
            log(logging.WARNING, text, lock=term.name, error=error, exc_info=True)
            self._leave_to_keeper()
            return
        # Sent twice: the first answer was lost, and if that release took effect, the row may have
        # been granted since. Its holder was done while it could still trust its lease.
        if lost or not (ours or sent > 1):
            term.lose("the row has another owner")
            raise self._loss()
        self._ended()

    def _leave_to_keeper(self) -> None:
        """Let the keeper free the row, as soon as the server answers or has ended the session."""
        keeper.drop(self._term)
        keeper.finish(self._term, lambda found: soon(partial(self._ended, freed=found is not None)))

    def _ended(self, *, freed: bool = True) -> None:
        """Tell of the end. `freed`: the release has reached the database before the expiry."""
        term = self._term
        if term.state is not State.RELEASED and not term.move(State.RELEASED):
            return
        signal = signals.lock_released if freed else signals.lock_dropped
        signal.send_robust(sender=Lease, lease=self, held=term.held_for)

    def _undone(self) -> None:
        """Take back a release that did not happen: the lease goes on."""
        self._term.move(State.HELD)
        self._term.share(self)
        self._context.remember(self._term)
        self._released = False

    def _is_kept_longer(self, span: float) -> bool:
        """Whether `min_hold` keeps the row longer than a renewal would."""
        term = self._term
        return term.held_for + span < term.min_hold_us / 1_000_000

    def _loss(self) -> LockLost:
        term = self._term
        if term.inherited:
            term.reason = "a forked child does not own its parent's leases"
        elif term.state is State.RELEASED:
            term.reason = "it was released"
        return lost_error(term)


def _is_cut_off(where: Place) -> bool:
    """Whether the connection was closed amid a transaction whose block has not ended yet."""
    return where.connection.closed_in_transaction and where.connection.in_atomic_block


def _tell_renewed(term: Term, renewed: int = 0, failed: int = 0, locked: int = 0) -> None:
    signals.leases_renewed.send_robust(
        sender=Lease, alias=term.alias, renewed=renewed, failed=failed, locked=locked
    )
