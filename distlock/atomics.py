"""`atomic=True`: acquire, BEGIN, body, release as the last statement, COMMIT.

The work and the release commit together. A holder that lost its lease cannot commit, because its
release changes no row. On PostgreSQL the acquire may commit asynchronously: the work's own COMMIT
makes it durable, and if that never comes there was nothing to protect.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from django.db import connections, transaction

from .backends import backend_for
from .connections import in_transaction

if TYPE_CHECKING:
    from .leases import Lease


def refuse_nesting(name: object, alias: str) -> None:
    """Raise `RuntimeError` inside a transaction, before any SQL."""
    if in_transaction(connections[alias]):
        raise RuntimeError(
            f"The lock {name!r} has atomic=True, which opens and commits a transaction of its own, "
            "and cannot stand inside another one. Leave out atomic=True: inside a transaction a "
            "lock is held until that commits anyway."
        )


class AtomicBlock:
    """A lease and the transaction that its release commits with."""

    def __init__(self, lease: Lease, alias: str) -> None:
        self._lease = lease
        self._alias = alias
        self._atomic = transaction.atomic(using=alias, durable=True)
        try:
            self._atomic.__enter__()
            if not backend_for(connections[alias]).private_connection:
                lease.guard()  # one writer at a time: a renewal would wait for this transaction
        except BaseException:
            lease.__exit__(*sys.exc_info())
            raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release, commit, and give back after a rollback what was taken before BEGIN."""
        try:
            self._end(exc_type, exc, traceback)
        except BaseException:
            self._lease.__exit__(*sys.exc_info())
            raise
        self._lease.__exit__(exc_type, exc, traceback)

    def _end(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None and not connections[self._alias].needs_rollback:
            try:
                self._lease.release()
            except BaseException:
                self._atomic.__exit__(*sys.exc_info())
                raise
        self._atomic.__exit__(exc_type, exc, traceback)
