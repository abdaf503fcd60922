"""`atomic=True`: acquire, BEGIN, body, release as the last statement, COMMIT.

The work and the release commit together. A holder that lost its lease cannot commit, because its
release changes no row. On PostgreSQL the acquire may commit asynchronously: the work's own COMMIT
makes it durable, and if that never comes there was nothing to protect.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from django.db import Error, connections, transaction

from .backends import backend_for
from .connections import in_testcase, in_transaction
from .hooks import transaction_of

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
            connection = connections[alias]
            if not in_testcase(connection):
                transaction_of(connection).open()
            if not backend_for(connection).private_connection:
                lease.guard()  # one writer at a time: a renewal would wait for this transaction
        except BaseException:
            if self._atomic in connections[alias].atomic_blocks:
                self._atomic.__exit__(*sys.exc_info())
            else:
                self._leave()
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
            self._leave()
            self._lease.__exit__(*sys.exc_info())
            raise
        self._lease.__exit__(exc_type, exc, traceback)

    def _leave(self) -> None:
        """Make sure that the block has ended: an interrupt may have come before it could begin to.

        See Note [Interrupts] in `hooks.py`.
        """
        connection = connections[self._alias]
        if in_testcase(connection):
            return
        if connection.in_atomic_block:  # the outermost block is this one
            connection.in_atomic_block = False
            connection.close()
        with suppress(Error):
            connection.get_autocommit()

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
