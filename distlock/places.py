"""Which connection a lock statement uses.

The state of the caller's connection decides, at the moment of the call:

    autocommit        acquire and release on the caller's own connection, one statement each
    in a transaction  acquire on the private connection, committed at once, so that others see it;
                      release inside the caller's transaction, so that it is visible exactly at its
                      COMMIT, pins the row until then, and is the fence: no row changed, lock lost
    `TestCase`,       the caller's own connection, in its transaction: no other could see in, or
    SQLite            write meanwhile

What waits for the end of the caller's transaction stands in `transactions.py`.

# Note [One table]
Renewals, and acquires inside a transaction, run on the private connection. It must reach the same
table as the caller's connection, which a changed search_path, role or database may hide: the
keeper would find no row, and two callers would hold one name. So an acquire is refused where the
two differ. In autocommit the grant itself says where its row stands, and the private connection is
asked once, after it was opened.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from django.core.exceptions import SynchronousOnlyOperation
from django.db import Error, InterfaceError, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from .backends import backend_for
from .backends.base import TABLE, Backend, Claim, Grant
from .connections import LIMIT, in_testcase, in_transaction, is_broken, on_private, private
from .events import log
from .exceptions import LockError
from .hooks import transaction_of
from .terms import Term
from .transactions import Transaction

T = TypeVar("T")

instead: Backend | None = None
"""What is asked instead of any database while a test has locks disabled (`testing/disabled.py`)."""


@dataclass
class Bare:
    """A grant that no lease stands for."""

    name: str
    slot: int
    owner: str
    token: int
    expires_us: int
    min_hold_us: int


@dataclass(eq=False)
class Place:
    """Where lock statements of the caller run now."""

    connection: BaseDatabaseWrapper
    transaction: Transaction | None = None
    """The caller's open transaction, if releases must wait for its end."""
    own: bool = False
    """Whether a grant belongs to the caller's open transaction, unseen by others."""

    @property
    def backend(self) -> Backend:
        """What speaks the connection's dialect."""
        return instead or backend_for(self.connection)

    def run(self, statement: Callable[[BaseDatabaseWrapper], T]) -> T:
        """Run a lock statement that may be repeated: once more if the connection was gone."""
        if self.transaction is not None and not self.own:
            return on_private(self.connection.alias, statement)
        try:
            return statement(self.connection)
        except (OperationalError, InterfaceError):
            if self.own or in_transaction(self.connection) or not is_broken(self.connection):
                raise
            self.connection.close()
            return statement(self.connection)
        except (Error, SynchronousOnlyOperation):
            raise
        except BaseException:  # an interrupt may have come between two messages
            if not self.own and not in_transaction(self.connection):
                self.connection.close()
            raise

    def grant(self, claim: Claim, waited: float) -> Grant | None:
        """Try once. An answer that was lost is asked for again, with the same owner."""
        backend = self.backend
        try:
            grant = self.run(lambda connection: backend.grant(connection, claim, waited))
        except Error as error:
            if backend.is_contention(error) and not self.own:
                return None
            self._explain(error)
            raise
        if grant is not None and self.transaction is None and not self.own:
            self._check_grant(claim, grant)
        return grant

    def _check_grant(self, claim: Claim, grant: Grant) -> None:
        """Give a grant back that the keeper could not renew; see Note [One table]."""
        alias = self.connection.alias
        try:
            if grant.table is None or _is_reached(alias, grant.table, min(0.5, claim.ttl / 1e7)):
                return
        except Error as error:
            if private(alias).identity is None:  # no lock is refused for want of a second session
                text = "lock_table_unchecked name=%r: %s"
                log(logging.INFO, text, lock=claim.name, error=error)
                return
        unwanted = Bare(
            claim.name, claim.slot, claim.owner, grant.token, grant.expires_us, min_hold_us=0
        )
        backend_for(self.connection).release(self.connection, unwanted, alone=True)
        raise another_table()

    def _explain(self, error: Error) -> None:
        """Say what to do about a missing table."""
        if self.own or isinstance(error, InterfaceError) or in_transaction(self.connection):
            return
        if is_broken(self.connection) or TABLE in self.connection.introspection.table_names():
            return
        raise LockError(
            f"The table {TABLE!r} is missing in the database {self.connection.alias!r}. "
            "Run manage.py migrate."
        ) from error


def place(alias: str, *, to_acquire: bool = False) -> Place:
    """Return where the caller's lock statements run; see the table at the top.

    Raises `LockError` for an acquire inside a snapshot, which would be read past the lock.
    """
    connection = connections[alias]
    if in_testcase(connection) or instead is not None:
        return Place(connection, own=True)
    if not in_transaction(connection):
        return Place(connection)
    backend = backend_for(connection)
    transaction = transaction_of(connection)
    if not backend.private_connection:
        return Place(connection, transaction, own=True)
    if not to_acquire:
        return Place(connection, transaction)
    if backend.snapshot_isolation(connection):
        raise LockError(
            "A lock cannot be taken inside a REPEATABLE READ or SERIALIZABLE transaction: what it "
            "reads was fixed before the lock was held. Take the lock first, or use READ COMMITTED."
        )
    _check_table(connection)
    return Place(connection, transaction)


def _check_table(connection: BaseDatabaseWrapper) -> None:
    """Refuse where the private connection reaches another table; see Note [One table]."""
    if not _is_reached(connection.alias, backend_for(connection).identity(connection)):
        raise another_table()


def _is_reached(alias: str, table: Any, limit: float = LIMIT) -> bool:
    """Whether the private connection reaches that table; it is asked again before it says no."""
    one = private(alias)
    if one.identity != table:
        one.identity = on_private(alias, lambda own: backend_for(own).identity(own), limit)
    return bool(one.identity == table)


def another_table() -> LockError:
    """Return the error that refuses an acquire; see Note [One table]."""
    return LockError(
        f"Under this connection's search_path, role or database, {TABLE!r} is another table than "
        "the one that a new connection reaches, and distlock renews leases on one of those. Take "
        "and release locks without that change, or keep one such table where every search_path "
        "finds it (django-tenants: SHARED_APPS)."
    )


def warn_about_others(term: Term) -> None:
    """Warn where a block ends while a transaction is open on another database."""
    if list(connections) == [term.alias]:
        return
    for other in connections.all(initialized_only=True):
        if other.alias != term.alias and in_transaction(other) and not in_testcase(other):
            warnings.warn(
                f"The lock {term.name!r} lives in the database {term.alias!r}, but a "
                f"transaction is open on {other.alias!r}: its work is not protected by the "
                "lock's release. Pass using=, or end that transaction first.",
                RuntimeWarning,
                stacklevel=5,
            )
