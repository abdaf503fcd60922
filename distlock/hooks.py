"""Where a transaction ends: the methods of a connection that tell it, and interrupts among them.

# Note [The end of a transaction]
Django has no hook for a rollback, so some methods of the connection object are wrapped, once per
connection object. What the end means for the locks stands in `transactions.py`.

# Note [The outcome of COMMIT]
When the connection breaks during COMMIT, the server may have committed. A release that stands in
the transaction is a witness: once its row is not pinned any more, it is still its owner's (rolled
back), or it has no owner and still the same token (committed). A row that somebody else was granted
meanwhile tells nothing: `CommitOutcomeUnknown`. The id of the transaction would tell more often on
PostgreSQL, but one that was lost in a crash is given again, and then it lies.

# Note [Interrupts]
An exception out of a signal handler (Ctrl-C, a time limit) may come between any two statements.
Only `DatabaseError` makes Django roll back a COMMIT that failed: after another one it goes on to
`set_autocommit(True)`, which commits on MariaDB and SQLite. Django also leaves callbacks of
`on_commit` to the next transaction, or autocommit off, so that the next one never commits. Where a
lock is involved, the callbacks run exactly if the transaction was committed, and what is left of a
connection in doubt is closed. Two things stay as they are: an exception while the callbacks run
keeps the later ones from it, and one in the first lines of `Atomic.__exit__` leaves the block open.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from django.db import Error
from django.db.backends.base.base import BaseDatabaseWrapper

from .backends import backend_for
from .backends.base import Trace
from .background import soon
from .connections import is_broken
from .deadlines import Limit
from .events import log
from .exceptions import CommitOutcomeUnknown
from .transactions import Outcome, Transaction

PATIENCE = 10.0
"""Seconds to wait until the server has ended a transaction whose COMMIT was cut off."""
AGAIN = 0.05

OUTCOMES = {Trace.RELEASED: Outcome.COMMITTED, Trace.HELD: Outcome.ROLLED_BACK}


class Hooks:
    """The wrapped methods of one connection, and what its open transaction has to do with locks."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self._connection_ref = weakref.ref(connection)
        self._told_later: list[Callable[[], None]] = []
        self._autocommit_due = False
        """Whether an `atomic` block has ended its transaction, and must turn autocommit on."""
        self._committing = False
        self._dropped = False
        """Whether the connection was closed here, and there is no other yet."""
        self._begin()

    @property
    def _connection(self) -> BaseDatabaseWrapper:
        connection = self._connection_ref()
        assert connection is not None
        return connection

    def _begin(self) -> None:
        self.transaction = Transaction(self._connection_ref, self._told_later.append)

    # -- the ends of a transaction ---------------------------------------------------------------

    def _commit(self, original: Callable[[], None]) -> bool:
        """Check, COMMIT, and make the releases facts; whether the connection is another one now."""
        transaction = self.transaction
        if not transaction.active:
            original()
            return False
        self._autocommit_due = transaction.of_block
        sent, self._committing = False, True
        try:
            transaction.before_commit()
            sent = True
            original()
            self._committed(transaction)
        except BaseException as error:
            broken = sent and isinstance(error, Error) and is_broken(self._connection)
            if isinstance(error, Error) and not broken:
                raise  # nothing was committed, and Django rolls back
            if not self._survived(transaction, error, sent=sent):
                raise
            return True
        finally:
            self._committing = False
        return False

    def _committed(self, transaction: Transaction) -> None:
        self._connection.run_commit_hooks_on_set_autocommit_on = True
        self._begin()
        transaction.conclude(Outcome.COMMITTED)
        self._tell_of(transaction)

    def _survived(self, transaction: Transaction, error: BaseException, *, sent: bool) -> bool:
        """Find out what became of a COMMIT that broke off; whether all is as if it had not.

        Raises `CommitOutcomeUnknown`.
        """
        if transaction is not self.transaction:  # it was a fact already
            transaction.conclude(Outcome.COMMITTED)
            return False
        connection = self._connection
        done = self._commit_done() if sent else False
        if done:
            self._committed(transaction)
            return False
        callbacks = connection.run_on_commit
        self._begin()
        outcome = Outcome.UNKNOWN
        try:
            self._drop()
            outcome = Outcome.ROLLED_BACK if done is False else outcome_of(transaction)
            if outcome is Outcome.COMMITTED:
                outcome = self._reopen(transaction, callbacks)
        finally:  # a second interrupt must not keep the locks for ever
            transaction.conclude(outcome)
        if outcome is Outcome.UNKNOWN:
            log(logging.ERROR, "commit_outcome_unknown alias=%r", alias=connection.alias)
            if isinstance(error, Error):
                raise CommitOutcomeUnknown(
                    "The connection broke during COMMIT, and nothing is left that tells whether "
                    "the transaction was committed. Look for its effects before you try again."
                ) from error
        return outcome is Outcome.COMMITTED and isinstance(error, Error)

    def _commit_done(self) -> bool | None:
        connection = self._connection
        if connection.connection is None:
            return None
        return backend_for(connection).commit_done(connection)

    def _reopen(self, transaction: Transaction, callbacks: list[Any]) -> Outcome:
        """Let Django go on after a COMMIT as if its connection had not been lost."""
        connection = self._connection
        try:
            connection.connect()
            connection.set_autocommit(False)
        except Error:
            text = "commit_not_reopened alias=%r: the connection was lost, and there is no other"
            log(logging.ERROR, text, alias=connection.alias, exc_info=True)
            return Outcome.UNKNOWN
        connection.run_on_commit = callbacks
        connection.run_commit_hooks_on_set_autocommit_on = True
        self._autocommit_due = transaction.of_block
        return Outcome.COMMITTED

    def _rollback(self, original: Callable[[], None]) -> None:
        """ROLLBACK, and free what was taken inside."""
        transaction = self.transaction
        self._autocommit_due = transaction.of_block
        try:
            original()
        except Error:
            self._rolled_back()
            raise
        except BaseException:  # it may not have been sent, and what follows would commit
            if transaction.active:
                self._connection.close()
            raise
        self._rolled_back()

    def _rolled_back(self) -> None:
        transaction = self.transaction
        self._begin()
        transaction.conclude(Outcome.ROLLED_BACK)
        self._tell_of(transaction)

    def _close(self, original: Callable[[], None]) -> None:
        """Close, and free what was taken inside once the server has noticed."""
        try:
            original()
        finally:
            self._autocommit_due = False
            self._rolled_back()
            self._tell(soon)

    def _savepoint_rollback(self, original: Callable[[str], None], sid: str) -> None:
        """ROLLBACK TO SAVEPOINT, and write again what that undid."""
        original(sid)
        self.transaction.rewrite()

    # -- autocommit ------------------------------------------------------------------------------

    def _set_autocommit(self, original: Callable[[bool], None], autocommit: bool) -> None:
        """Turn autocommit on or off on the server; turning it on commits on some databases."""
        if autocommit and self.transaction.active:
            if self.transaction.of_block:  # an interrupt kept `atomic` from ending it
                self._drop()
            else:
                if self._commit(partial(original, autocommit)):
                    original(autocommit)
        else:
            original(autocommit)

    def set_autocommit(self, original: Callable[..., None], autocommit: bool, **more: bool) -> None:
        """Turn autocommit on or off; then a receiver's queries may be made again."""
        if autocommit and self._dropped and self._connection.connection is None:
            return  # the next connection begins so, and may not be there yet
        try:
            original(autocommit, **more)
        except Error:
            if not (autocommit and self._left_over and self._is_committed):
                raise
            self._settle()  # only the connection was lost, after COMMIT was answered
        except BaseException:
            if autocommit:
                self._settle()
            raise
        finally:
            if autocommit and self._connection.autocommit:
                self._autocommit_due = False
                self._tell(lambda tell: tell())

    def get_autocommit(self, original: Callable[[], bool]) -> bool:
        """Repair first what an interrupt at the end of the last block has left."""
        if self._left_over and not self._connection.in_atomic_block:
            self._settle()
        return original()

    @property
    def _is_committed(self) -> bool:
        """Whether the callbacks of a commit are to run, which therefore is a fact."""
        return self._connection.run_commit_hooks_on_set_autocommit_on

    @property
    def _left_over(self) -> bool:
        """Whether the end of an `atomic` block was begun, and never finished."""
        unfinished = self.transaction.active and self.transaction.of_block
        begun = self._autocommit_due or unfinished
        return begun and not self._committing and not self._connection.autocommit

    # -- what an interrupt leaves ----------------------------------------------------------------

    def _settle(self) -> None:
        """Let the next transaction begin afresh, and run the callbacks of a commit that is a fact.

        See Note [Interrupts].
        """
        connection = self._connection
        callbacks = connection.run_on_commit if self._is_committed else []
        if self._left_over:
            self._drop()
        connection.run_commit_hooks_on_set_autocommit_on = False
        connection.run_on_commit = callbacks
        connection.run_and_clear_commit_hooks()

    def _drop(self) -> None:
        """Close the connection, whose transaction the server then rolls back."""
        connection = self._connection
        connection.close()
        self._dropped = True
        if connection.connection is not None:  # SQLite keeps a database in memory open
            connection.rollback()

    def _tell_of(self, transaction: Transaction) -> None:
        """Send the signals of a transaction by hand, after which autocommit may stay off."""
        if not transaction.of_block:
            self._tell(soon)

    def _tell(self, how: Callable[[Callable[[], None]], None]) -> None:
        """Send the signals, now that receivers may use the connection again."""
        while self._told_later:
            how(self._told_later.pop(0))


HOOKED = (
    "_commit",
    "_rollback",
    "_close",
    "_savepoint_rollback",
    "_set_autocommit",
    "set_autocommit",
    "get_autocommit",
)


def outcome_of(transaction: Transaction) -> Outcome:
    """Wait until the server has ended a cut-off transaction, and return how it ended.

    See Note [The outcome of COMMIT].
    """
    deadline = Limit(PATIENCE)
    while deadline.left:
        try:
            found = transaction.trace()
        except Error as error:
            log(logging.INFO, "commit_outcome_asked: %s", error=error)
            found = Trace.PINNED
        if found is not Trace.PINNED:
            return OUTCOMES.get(found, Outcome.UNKNOWN)
        time.sleep(AGAIN)
    return Outcome.UNKNOWN


def transaction_of(connection: BaseDatabaseWrapper) -> Transaction:
    """Return what a connection's open transaction has to do with locks.

    The first call wraps the connection's methods. The wrappers hold no strong reference to it, so
    that a thread's connection is closed as soon as the thread is gone.
    """
    hooks = connection.__dict__.get("_distlock")
    if not isinstance(hooks, Hooks):
        hooks = connection.__dict__["_distlock"] = Hooks(connection)
        for name in HOOKED:
            wrapped = connection.__dict__.get(name)  # somebody else's wrapper, if any
            connection.__dict__[name] = _hooked(hooks, name, wrapped)
    return hooks.transaction


def _hooked(hooks: Hooks, name: str, wrapped: Callable[..., Any] | None) -> Callable[..., Any]:
    hook, connection_ref = getattr(hooks, name), hooks._connection_ref

    def hooked(*args: Any, **more: Any) -> Any:
        return hook(
            wrapped or partial(getattr(type(connection_ref()), name), connection_ref()),
            *args,
            **more,
        )

    return hooked
