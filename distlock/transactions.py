"""The release at the end of somebody else's transaction.

# Note [The end of a transaction]
Django has no hook for a rollback, so the connection object's `_commit`, `_rollback`, `_close`,
`_savepoint_rollback` and `_set_autocommit` are wrapped, once per connection object:

- just before COMMIT, every release that could not be written yet is written, and a transaction in
  which a lease was lost is refused, even if somebody swallowed the `LockLost`;
- after COMMIT the releases are facts;
- after anything else the write is undone. A lease that was taken inside the transaction is freed on
  the private connection; one that was taken before it is its holder's again. If the server has not
  ended the session yet, the row is still pinned, and the keeper goes on trying: a COMMIT may be on
  the wire, and only the server knows;
- a savepoint rollback may undo the write as well and unpin the row: it is written again at once.

Only `DatabaseError` makes Django roll back a COMMIT that failed. After another exception (an
interrupt, a time limit) it goes on to `set_autocommit(True)`, which commits on MariaDB and SQLite
and leaves stale `on_commit` callbacks for the next transaction. Where a lock is involved the
connection is closed instead.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from django.db import DatabaseError, Error
from django.db.backends.base.base import BaseDatabaseWrapper

from .backends import backend_for
from .backends.base import Unlock
from .background import soon
from .connections import on_private
from .deadlines import clock
from .exceptions import LockLost
from .keeper import keeper
from .terms import State, Term

T = TypeVar("T")

logger = logging.getLogger("distlock")


@dataclass(eq=False)
class Release:
    """A release that waits for the end of the transaction."""

    ended: Callable[[], None]
    """Called when the lock is free."""
    undone: Callable[[], None]
    """Called when the lease, taken before the transaction, is its holder's again."""
    inside: bool
    written: bool = False

    def finished(self, found: Unlock) -> None:
        """Tell that the keeper has freed it; what is the user's does not run in its thread."""
        soon(self.ended)


@dataclass(eq=False)
class Transaction:
    """What is to happen at the end of the transaction that a connection has open."""

    connection_ref: weakref.ref[BaseDatabaseWrapper]
    taken: set[Term] = field(default_factory=set)
    releases: dict[Term, Release] = field(default_factory=dict)
    guards: set[Term] = field(default_factory=set)
    lost: LockLost | None = None
    tell: list[Callable[[], None]] = field(default_factory=list)

    @property
    def connection(self) -> BaseDatabaseWrapper:
        """The connection; it outlives its transaction."""
        connection = self.connection_ref()
        assert connection is not None
        return connection

    @property
    def active(self) -> bool:
        """Whether a lock is involved in the open transaction."""
        return bool(self.taken or self.releases or self.guards or self.lost)

    def adopt(self, alias: str, name: str, slot: int) -> Term | None:
        """Return the lease that this transaction has released but still holds, if any."""
        for term in self.releases:
            if (term.alias, term.name, term.slot) == (alias, name, slot) and not term.lost:
                return term
        return None

    def release(self, term: Term, ended: Callable[[], None], undone: Callable[[], None]) -> None:
        """Write the release into the transaction. Raises `LockLost`, and then it cannot commit."""
        adopted = term in self.releases  # then it stands already
        self.file(term, ended, undone)
        if term.lost:
            self._lose(term, term.reason)
        if not adopted:
            term.move(State.RELEASING)
            self._write(term)

    def file(self, term: Term, ended: Callable[[], None], undone: Callable[[], None]) -> None:
        """Note a release, to be written before COMMIT if it is not yet."""
        if term not in self.releases:
            self.releases[term] = Release(ended, undone, inside=term in self.taken)

    def take(self, term: Term, *, own: bool) -> None:
        """Note a lease that was taken inside; `own`: by this transaction's own connection."""
        self.taken.add(term)
        if own:  # which has the row locked, and on SQLite the file
            term.pin()

    def guard(self, term: Term) -> None:
        """Lock the row against grants until the end. Raises `LockLost`, and then poisons."""
        if term in self.guards or term in self.releases:
            return
        if term.lost or not self._guard(term):
            self._lose(term, term.reason or "the row has another owner")
        self.guards.add(term)
        if backend_for(self.connection).guard_blocks_renewal:
            term.pin()

    def _guard(self, term: Term) -> bool:
        return backend_for(self.connection).guard(self.connection, term)

    def _write(self, term: Term) -> None:
        """Write a release, or write it again; leave it for later in a transaction that failed."""
        connection, release = self.connection, self.releases[term]
        backend = backend_for(connection)
        if connection.needs_rollback or backend.transaction_failed(connection):
            return
        if self._fence_only():
            kept = self._guard(term)
        else:
            kept = backend.release(connection, term, alone=False)
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

    # -- the hooks; see Note [The end of a transaction] ------------------------------------------

    def commit(self, original: Callable[[], None]) -> None:
        """Check, COMMIT, and make the releases facts."""
        if not self.active:
            original()
            return
        try:
            extended = self._before_commit()
            failed = backend_for(self.connection).transaction_failed(self.connection)
            original()
        except DatabaseError:
            raise  # Django rolls back
        except BaseException:
            self.connection.run_on_commit = []
            self.connection.close()
            raise
        for term, (requested, expires_us) in extended.items():
            term.confirm(requested, expires_us)
            keeper.replan(term)
        self._ended(committed=not failed)

    def _before_commit(self) -> dict[Term, tuple[float, int]]:
        if self.lost is not None:
            raise lost_again(self.lost)
        connection, backend = self.connection, backend_for(self.connection)
        for term, release in self.releases.items():
            if not release.written or backend.ddl_commits:
                self._write(term)
        extended: dict[Term, tuple[float, int]] = {}
        if backend.guard_blocks_renewal:
            for term in self.guards - self.releases.keys():
                if not term.renews:
                    if not self._guard(term):
                        self._lose(term, "the row has another owner")
                    continue
                requested = clock()
                expires = backend.renew(connection, [term], pinned=True).get(term.owner)
                if expires is None:
                    self._lose(term, "the row has another owner")
                else:
                    extended[term] = (requested, expires)
        return extended

    def rollback(self, original: Callable[[], None]) -> None:
        """ROLLBACK, and free what was taken inside."""
        try:
            original()
        except Error:
            self._ended(committed=False)
            raise
        except BaseException:  # it may not have been sent, and what follows would commit
            if self.active:
                self.connection.close()
            raise
        self._ended(committed=False)

    def close(self, original: Callable[[], None]) -> None:
        """Close, and free what was taken inside once the server has noticed."""
        try:
            original()
        finally:
            self._ended(committed=False)
            self._tell(soon)

    def savepoint_rollback(self, original: Callable[[], None]) -> None:
        """ROLLBACK TO SAVEPOINT, and write again what that undid."""
        original()
        with suppress(LockLost):  # Django would swallow it here; the COMMIT refuses, aloud
            for term in self.releases:
                if not term.over:
                    self._write(term)
            for term in self.guards:
                if not term.over and not self._guard(term):
                    self._lose(term, "the row has another owner")

    def set_autocommit(self, original: Callable[[], None], autocommit: bool) -> None:
        """Turn autocommit on or off; turning it on by hand commits on some databases."""
        if autocommit and self.active:
            self.commit(original)
        else:
            original()

    def after_set_autocommit(self, original: Callable[[], None], autocommit: bool) -> None:
        """Send the signals, now that the connection is fit for a receiver's queries again."""
        try:
            original()
        finally:
            if autocommit and self.connection.autocommit:
                self._tell(lambda tell: tell())

    def _ended(self, *, committed: bool) -> None:
        backend = backend_for(self.connection)
        fence_only = bool(self.releases) and committed and self._fence_only()
        taken, self.taken, self.lost = self.taken, set(), None
        while self.guards:
            term = self.guards.pop()
            if backend.guard_blocks_renewal:
                term.unpin()
                keeper.replan(term)
        if not backend.private_connection:
            self._own_ended(taken, committed=committed)
        try:
            while self.releases:
                self._conclude(*self.releases.popitem(), committed=committed, free=fence_only)
        except BaseException:  # an interrupt: the rest must not be forgotten
            while self.releases:
                term, release = self.releases.popitem()
                keeper.drop(term)
                keeper.finish(term, release.finished)
            raise

    def _own_ended(self, taken: set[Term], *, committed: bool) -> None:
        """End what the connection granted in its own transaction, which nobody else has seen."""
        for term in taken:
            term.unpin()
            if term in self.releases:
                continue
            if committed:
                keeper.keep(term)
            else:
                term.lose("the transaction that it was granted in was rolled back")

    def _conclude(self, term: Term, release: Release, *, committed: bool, free: bool) -> None:
        if release.written:
            term.unpin()
        if not committed and not release.inside and not term.over:
            release.undone()
            keeper.replan(term)
            return
        if committed and term.handles > 0:  # adopted, and not released again
            term.lose("its transaction committed an earlier release of it")
        elif not term.move(State.RELEASED) and not release.inside:
            return
        keeper.drop(term)
        if (free or not committed) and backend_for(self.connection).private_connection:
            self._free(term, release)
        else:
            self.tell.append(release.ended)

    def _free(self, term: Term, release: Release) -> None:
        """Free a row that this process may still own, at once if possible, else by the keeper."""
        backend = backend_for(self.connection)
        found = Unlock.PINNED
        try:
            found = on_private(term.alias, lambda connection: backend.free(connection, term))
        except Error as error:
            logger.info("lock_release_delayed name=%r: %s", term.name, error)
        finally:
            if found is Unlock.PINNED:
                keeper.finish(term, release.finished)
            else:
                self.tell.append(release.ended)

    def _tell(self, how: Callable[[Callable[[], None]], None]) -> None:
        """Send the signals, now that receivers may use the connection again."""
        told, self.tell = self.tell, []
        for tell in told:
            how(tell)


HOOKS: dict[str, Callable[..., None]] = {
    "_commit": Transaction.commit,
    "_rollback": Transaction.rollback,
    "_close": Transaction.close,
    "_savepoint_rollback": Transaction.savepoint_rollback,
    "_set_autocommit": Transaction.set_autocommit,
    "set_autocommit": Transaction.after_set_autocommit,
}


def transaction_of(connection: BaseDatabaseWrapper) -> Transaction:
    """Return the connection's `Transaction`; the first call wraps its methods.

    The wrappers hold no strong reference to the connection, so that a thread's connection is
    closed as soon as the thread is gone.
    """
    found = connection.__dict__.get("_distlock")
    if isinstance(found, Transaction):
        return found
    transaction = Transaction(weakref.ref(connection))
    connection.__dict__["_distlock"] = transaction
    for name, hook in HOOKS.items():
        wrapped = connection.__dict__.get(name)  # somebody else's wrapper, if any
        connection.__dict__[name] = _hooked(transaction, name, hook, wrapped)
    return transaction


def _hooked(
    transaction: Transaction,
    name: str,
    hook: Callable[..., None],
    wrapped: Callable[..., None] | None,
) -> Callable[..., None]:
    def hooked(*args: Any, **more: Any) -> None:
        original = wrapped or partial(getattr(type(transaction.connection), name))
        bound = args if wrapped else (transaction.connection, *args)
        extra = args[:1] if name.endswith("set_autocommit") else ()
        return hook(transaction, partial(original, *bound, **more), *extra)

    return hooked


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
