"""Which connection a lock statement uses.

The state of the caller's connection decides, at the moment of the call:

    autocommit        acquire and release on the caller's own connection, one statement each
    in a transaction  acquire on the private connection, committed at once, so that others see it;
                      release inside the caller's transaction, so that it is visible exactly at its
                      COMMIT, pins the row until then, and is the fence: no row changed, lock lost
    `TestCase`,       the caller's own connection, in its transaction: no other could see in, or
    SQLite            write meanwhile

What waits for the end of the caller's transaction stands in `transactions.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from django.db import Error, InterfaceError, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from .backends import backend_for
from .backends.base import TABLE, Claim, Grant
from .connections import in_testcase, in_transaction, is_broken, on_private, private
from .exceptions import LockError
from .terms import Term
from .transactions import Transaction, transaction_of

T = TypeVar("T")


@dataclass(eq=False)
class Place:
    """Where lock statements of the caller run now."""

    connection: BaseDatabaseWrapper
    transaction: Transaction | None = None
    """The caller's open transaction, if releases must wait for its end."""
    own: bool = False
    """Whether a grant belongs to the caller's open transaction, unseen by others."""

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

    def grant(self, claim: Claim, waited: float) -> Grant | None:
        """Try once. An answer that was lost is asked for again, with the same owner."""
        backend = backend_for(self.connection)
        try:
            return self.run(lambda connection: backend.grant(connection, claim, waited))
        except Error as error:
            if backend.is_contention(error) and not self.own:
                return None
            self._explain(error)
            raise

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
    if in_testcase(connection):
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
    """Refuse where the caller's lock table is not the one that the private connection reaches."""
    identity = backend_for(connection).identity
    seen, one = identity(connection), private(connection.alias)
    if one.identity != seen:
        one.identity = on_private(connection.alias, identity)
    if one.identity != seen:
        raise LockError(
            f"Under this connection's search_path, role or schema, {TABLE!r} is another table "
            "than the one that distlock's private connection reaches. Take the lock before you "
            "change it, or before the transaction."
        )


def warn_about_others(term: Term) -> None:
    """Warn where a block ends while a transaction is open on another database."""
    for other in connections.all(initialized_only=True):
        if other.alias != term.alias and in_transaction(other) and not in_testcase(other):
            warnings.warn(
                f"The lock {term.name!r} lives in the database {term.alias!r}, but a "
                f"transaction is open on {other.alias!r}: its work is not protected by the "
                "lock's release. Pass using=, or end that transaction first.",
                RuntimeWarning,
                stacklevel=5,
            )
