"""What the open transaction of a connection has to do with locks, and what its end means for them.

A transaction may have taken leases, written releases and guarded rows. Its end comes from Django
through `hooks.py`:

- just before COMMIT, every release that could not be written yet is written, and a transaction in
  which a lease was lost is refused, even if somebody swallowed the `LockLost`;
- after COMMIT the releases are facts;
- after a rollback the writes are undone. A lease that was taken inside the transaction is freed on
  the private connection; one that was taken before it is its holder's again. If the server has not
  ended the session yet, the row is still pinned, and the keeper goes on trying: a COMMIT may be on
  the wire, and only the server knows;
- a savepoint rollback may undo a write as well and unpin the row: it is written again at once.
"""

from __future__ import annotations

import enum
import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from django.db import Error, InternalError
from django.db.backends.base.base import BaseDatabaseWrapper

from .backends import backend_for
from .backends.base import Trace, Unlock
from .background import soon
from .connections import on_private
from .deadlines import clock
from .events import log
from .exceptions import LockError, LockLost
from .keeper import can_keep, keeper
from .terms import State, Term


class Outcome(enum.Enum):
    """How a transaction ended."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    UNKNOWN = "unknown"  # COMMIT was sent, and nothing is left that could tell


@dataclass(eq=False)
class Release:
    """A release that waits for the end of the transaction."""

    ended: Callable[..., None]
    """Called when the lock is free; with `freed=False` if that took its expiry."""
    undone: Callable[[], None]
    """Called when the lease, taken before the transaction, is its holder's again."""
    inside: bool
    """Whether the lease was taken inside the transaction as well."""
    written: bool = False
    fence_only: bool = False
    """Whether a guard stands in the transaction instead, and the row is to be freed after it."""

    @property
    def traceable(self) -> bool:
        """Whether the row tells afterwards how the transaction ended."""
        return self.written and not self.fence_only

    def finished(self, found: Unlock | None) -> None:
        """Tell that the keeper has freed it; what is the user's does not run in its thread."""
        soon(partial(self.ended, freed=found is not None))


@dataclass(eq=False)
class Transaction:
    """What the open transaction of a connection has to do with locks: at first, nothing."""

    connection_ref: weakref.ref[BaseDatabaseWrapper]
    tell: Callable[[Callable[[], None]], None]
    """Takes what is to be told once receivers may use the connection again."""
    taken: set[Term] = field(default_factory=set)
    releases: dict[Term, Release] = field(default_factory=dict)
    guards: set[Term] = field(default_factory=set)
    lost: LockLost | None = None
    of_block: bool = False
    """Whether it began with an `atomic` block, which will commit it or roll it back."""
    opened: bool = False
    """Whether that block is one of `atomic=True`."""
    renewed: dict[Term, tuple[float, int, float | None]] = field(default_factory=dict)
    """Renewals that were written inside: when they were asked for, the new expiry, the new ttl."""

    @property
    def connection(self) -> BaseDatabaseWrapper:
        """The connection; it outlives its transaction."""
        connection = self.connection_ref()
        assert connection is not None
        return connection

    @property
    def active(self) -> bool:
        """Whether a lock is involved in the open transaction."""
        involved = self.taken or self.releases or self.guards or self.renewed
        return bool(self.opened or involved or self.lost)

    def open(self) -> None:
        """Note that a lock with `atomic=True` has begun it."""
        self._involve()
        self.opened = True

    def adopt(self, alias: str, name: str, slot: int) -> Term | None:
        """Return the lease that this transaction has released but still holds, if any."""
        for term in self.releases:
            if (term.alias, term.name, term.slot) == (alias, name, slot) and not term.lost:
                return term
        return None

    def release(self, term: Term, ended: Callable[..., None], undone: Callable[[], None]) -> None:
        """Write the release into the transaction. Raises `LockLost`, and then it cannot commit."""
        adopted = term in self.releases  # then it stands already
        self.file(term, ended, undone)
        if term.lost:
            self._lose(term, term.reason)
        if not adopted:
            term.move(State.RELEASING)
            self._write(term)

    def file(self, term: Term, ended: Callable[..., None], undone: Callable[[], None]) -> None:
        """Note a release, to be written before COMMIT if it is not yet."""
        self._involve()
        if term not in self.releases:
            self.releases[term] = Release(ended, undone, inside=term in self.taken)

    def take(self, term: Term, *, own: bool) -> None:
        """Note a lease that was taken inside; `own`: by this transaction's own connection."""
        self._involve()
        self.taken.add(term)
        if own:  # which has the row locked, and on SQLite the file
            term.pin()

    def renew(
        self, term: Term, requested: float, expires_us: int, ttl: float | None = None
    ) -> None:
        """Note a renewal that was written inside: it is to be trusted after COMMIT."""
        self._involve()
        self.renewed[term] = (requested, expires_us, ttl)

    def guard(self, term: Term) -> None:
        """Lock the row against grants until the end. Raises `LockLost`, and then poisons."""
        self._involve()
        if term in self.guards or term in self.releases:
            return
        if term.lost or not self._guard(term):
            self._lose(term, term.reason or "the row has another owner")
        self.guards.add(term)
        if backend_for(self.connection).guard_blocks_renewal:
            term.pin()

    def _involve(self) -> None:
        connection = self.connection
        self.of_block = self.of_block or (connection.in_atomic_block and connection.commit_on_exit)

    def _guard(self, term: Term) -> bool:
        kept = backend_for(self.connection).guard(self.connection, term)
        return kept or self._refuse_old_snapshot(term)

    def _refuse_old_snapshot(self, term: Term) -> bool:
        """Return `False`, or raise `LockError` if the lease goes on and only is not seen here."""
        backend = backend_for(self.connection)
        if not backend.private_connection:
            return False
        with suppress(Error):  # then it counts as lost
            found = on_private(term.alias, lambda connection: backend.trace(connection, term))
            if found is Trace.HELD:
                raise LockError(
                    f"The snapshot of this transaction is older than the lock {term.name!r} "
                    f"(token {term.token}): what it reads may be older than what the last holder "
                    "wrote. Take the lock first, or use READ COMMITTED.",
                    name=term.name,
                )
        return False

    def _write(self, term: Term) -> None:
        """Write a release, or write it again; leave it for later in a transaction that failed."""
        connection, release = self.connection, self.releases[term]
        backend = backend_for(connection)
        if connection.needs_rollback or backend.transaction_failed(connection):
            return
        release.fence_only = self._fence_only()
        if release.fence_only:
            kept = self._guard(term)
        else:
            kept = backend.release(connection, term, alone=False)
            kept = kept or self._refuse_old_snapshot(term)
        if not kept and (backend.private_connection or not release.inside):
            self._lose(term, "the row has another owner")
        if not release.written:
            release.written = True
            term.pin()

    def _fence_only(self) -> bool:
        """Whether a write would fail because of a renewal after the snapshot."""
        backend = backend_for(self.connection)
        return backend.release_keeps_snapshot and backend.snapshot_isolation(self.connection)

    def _lose(self, term: Term, reason: str) -> None:
        term.lose(reason)
        self.lost = lost_error(term)
        raise self.lost

    # -- the end ---------------------------------------------------------------------------------

    def before_commit(self) -> None:
        """Write what is to be written yet. Raises an error if the transaction must not commit."""
        if self.lost is not None:
            raise lost_again(self.lost)
        connection, backend = self.connection, backend_for(self.connection)
        if backend.transaction_failed(connection):
            raise InternalError(
                "Nothing was committed: a statement of this transaction had failed, or its "
                "connection was lost, and the error was swallowed. PostgreSQL would have answered "
                "COMMIT with a silent ROLLBACK."
            )
        for term, release in self.releases.items():
            if not release.written or backend.ddl_commits:
                self._write(term)
        if backend.guard_blocks_renewal:
            for term in self.guards - self.releases.keys():
                self._renew_guarded(term)

    def _renew_guarded(self, term: Term) -> None:
        """Renew an open lease that a guard kept the keeper from; at least look at it again."""
        if not term.renews:
            if not self._guard(term):
                self._lose(term, "the row has another owner")
            return
        requested = clock()
        renewed = backend_for(self.connection).renew(self.connection, [term], pinned=True)
        expires = renewed.get(term.owner)
        if expires is not None:
            self.renew(term, requested, expires)
        elif not self._guard(term):  # else another session shares the row, or waits for it
            self._lose(term, "the row has another owner")

    def rewrite(self) -> None:
        """Write again what a savepoint rollback may have undone."""
        with suppress(LockLost):  # Django would swallow it here; the COMMIT refuses, aloud
            for term in self.releases:
                if not term.over:
                    self._write(term)
            for term in self.guards:  # a lost one, too: the row's lock was as good as ever
                if not self._guard(term):
                    self._lose(term, "the row has another owner")

    def trace(self) -> Trace:
        """Ask the rows how the transaction ended, whose connection is gone.

        `PINNED`: to be asked again. `GONE`: no row can tell.
        """
        found = {
            self._trace_of(term) for term, release in self.releases.items() if release.traceable
        }
        for answer in (Trace.RELEASED, Trace.HELD, Trace.PINNED):
            if answer in found:
                return answer
        return Trace.GONE

    def _trace_of(self, term: Term) -> Trace:
        trace = backend_for(self.connection).trace
        return on_private(term.alias, lambda connection: trace(connection, term))

    def conclude(self, outcome: Outcome) -> None:
        """Make of each lease what the end of the transaction means for it."""
        if outcome is Outcome.COMMITTED:
            while self.renewed:
                term, (requested, expires_us, ttl) = self.renewed.popitem()
                term.confirm(requested, expires_us, ttl=ttl)
                keeper.replan(term)
        while self.guards:
            term = self.guards.pop()
            if backend_for(self.connection).guard_blocks_renewal:
                term.unpin()
                keeper.replan(term)
        if not backend_for(self.connection).private_connection:
            self._own_ended(outcome)
        try:
            while self.releases:
                self._conclude(*self.releases.popitem(), outcome)
        except BaseException:  # an interrupt: the rest must not be forgotten
            while self.releases:
                self._leave_to_keeper(*self.releases.popitem())
            raise

    def _own_ended(self, outcome: Outcome) -> None:
        """End what the connection granted in its own transaction, which nobody else has seen."""
        while self.taken:
            term = self.taken.pop()
            term.unpin()
            if term in self.releases:
                continue
            if outcome is not Outcome.COMMITTED:
                term.lose("the transaction that it was granted in was rolled back")
            elif can_keep(self.connection):
                keeper.keep(term)

    def _conclude(self, term: Term, release: Release, outcome: Outcome) -> None:
        try:
            self._settle(term, release, outcome)
        except BaseException:
            self._leave_to_keeper(term, release)
            raise

    def _settle(self, term: Term, release: Release, outcome: Outcome) -> None:
        if release.written:
            term.unpin()
        committed = outcome is Outcome.COMMITTED
        if outcome is Outcome.ROLLED_BACK and not release.inside and not term.over:
            release.undone()
            keeper.replan(term)
            return
        if outcome is Outcome.UNKNOWN:
            self._leave_to_keeper(term, release)
            return
        if committed and term.handles:  # adopted, and not released again
            term.lose("its transaction committed an earlier release of it")
        elif not term.move(State.RELEASED) and not release.inside:
            return
        keeper.drop(term)
        undone = release.fence_only or not committed
        if undone and backend_for(self.connection).private_connection:
            self._free(term, release)
        else:
            self.tell(release.ended)

    def _free(self, term: Term, release: Release) -> None:
        """Free a row that this process may still own, at once if possible, else by the keeper."""
        backend = backend_for(self.connection)
        try:
            found = on_private(term.alias, lambda connection: backend.free(connection, term))
        except Error as error:
            log(logging.INFO, "lock_release_delayed name=%r: %s", lock=term.name, error=error)
            found = Unlock.PINNED
        if found is Unlock.PINNED:
            self._leave_to_keeper(term, release)
        else:
            self.tell(release.ended)

    def _leave_to_keeper(self, term: Term, release: Release) -> None:
        keeper.drop(term)
        keeper.finish(term, release.finished)


def lost_error(term: Term) -> LockLost:
    """Return the error that tells a holder of its loss."""
    return LockLost(
        f"The lock {term.name!r} (token {term.token}) was lost: {term.reason}.",
        name=term.name,
        token=term.token,
        reason=term.reason,
    )


def lost_again(error: LockLost) -> LockLost:
    """Return a fresh copy of an error that was raised before, and perhaps swallowed."""
    return LockLost(str(error), name=error.name, token=error.token, reason=error.reason)
