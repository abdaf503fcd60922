"""One delivery of a Celery task's message: whose it is, whether it was done, and when it is again.

# Note [Never dropped]
Skipping drops a duplicate, whose work somebody else is doing. It would lose work if the message
*is* the holder's: a delivery after its worker died, a second delivery while the first still runs
(visibility timeout), or `self.retry()`, which publishes before the run that it ends has released.
So what comes from the holder's own task id goes back to the queue, in every mode, and so does a
retry or a redelivery in the mode "skip" that meets another's run. It keeps its id and its count of
retries; a header counts instead. The next try comes after 1, 2, 4.. seconds, or when the lease ends
if that is sooner: a holder may be done early, and a dead one is gone then. It never comes later
than half the broker's visibility timeout: a message that waits longer in a worker is delivered
once more, and each of the two would be sent again. One that cannot be sent is given back to the
broker, if that still has it: it was to be acknowledged late.

A min_hold is for other task ids. The row keeps the name of its last holder, so that a task passes
its own and runs, if it is not done.

# Note [Done]
A task that ended well and is delivered again is not run again. Its receipt is written in the
transaction that releases the lock, and looked up under the lock, so that there is no moment between
the two. Every delivery looks, not only those that the broker calls redelivered: RabbitMQ and
kombu's Redis do, SQS and others do not, and nobody does for the copy that was late, because a
worker had prefetched it or it waited there for its ETA, while the broker gave out another.

What follows the task in a chain, or as its callback, is published before its result is stored. So
if the result backend has the result, a duplicate returns that, and publishes nothing: a part of a
chord then counts once more as what it was, and the next of a chain does not run a second time, with
a dict. Otherwise a process may have died before it published them, and the duplicate does so.

A body that raises leaves no receipt, `Ignore`, `Reject` and `Retry` included, and neither does one
that has published its own id again, with `self.retry(throw=False)`: its next run is meant to be.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

from celery import Task
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry
from celery.states import SUCCESS
from django.db import Error, connections, transaction

from .. import contexts, receipts
from ..backends.base import Holder
from ..connections import in_transaction, refresh
from ..deadlines import jitter
from ..events import log
from ..exceptions import LockLost
from ..leases import Lease
from ._canonical import fitting

KEEP = 86400.0
"""Seconds that a task id is remembered."""
LONGEST_DELAY = 60.0
PAUSE = 1.0
"""Seconds between two tries to send a message, or to have it noted that it could not be."""
HEADER = "distlock_again"
IN_BODY = "distlock_in_body"
MESSAGE = "distlock_message"
"""Attribute of the request of a job's run: its delivery; see `_deduplicated.py`."""


class GivenBack(Reject, Ignore):
    """The broker shall give the message out once more. `autoretry_for` lets an `Ignore` pass."""


class Delivery:
    """One delivery of a task's message, or a call without one."""

    def __init__(self, task: Task[Any, Any] | None) -> None:
        self.task: Any = task
        self.request: Any = task.request if task else Context()
        direct = self.request.called_directly or self.request.is_eager
        # What the body calls as self.run() is no delivery, though it is in the same request.
        self.queued = not (direct or getattr(self.request, IN_BODY, False))
        self.sent_again: int = (self.request.headers or {}).get(HEADER, 0)
        self.done_at: Any = None
        self.holder = ""
        if task and self.request.id:
            identity = f"[{self.request.id}]"
            self.holder = f"task {task.name[: 250 - len(identity)]}{identity}"[:255]

    @property
    def must_run(self) -> bool:
        """Whether nobody else may be doing this message's work; see Note [Never dropped]."""
        redelivered = (self.request.delivery_info or {}).get("redelivered")
        return bool(redelivered or self.request.retries or self.sent_again)

    @contextmanager
    def named_as_holder(self) -> Iterator[None]:
        """Show the task and its id as the holder of every lock that is taken in the block."""
        token = contexts.caller.set(self.holder or contexts.caller.get())
        try:
            yield
        finally:
            contexts.caller.reset(token)

    @contextmanager
    def in_body(self) -> Iterator[None]:
        """Note that the body runs in the block: a call in it must not answer for the message."""
        before = getattr(self.request, IN_BODY, False)
        setattr(self.request, IN_BODY, True)
        try:
            yield
        finally:
            setattr(self.request, IN_BODY, before)

    def is_holder(self, holder: Holder | None) -> bool:
        """Whether the holder may be this same message, delivered before."""
        return holder is None or (bool(self.holder) and holder.thread == self.holder)

    def is_kept_out_by_itself(self, holder: Holder | None) -> bool:
        """Whether only the min_hold of an earlier run of this message is in the way."""
        return bool(self.queued and holder and not holder.owner and self.is_holder(holder))

    def again(self, error: Exception, left: float) -> None:
        """Send this message again like `Task.retry`, but do not count it as one.

        Raises `Retry`; or `GivenBack` if it cannot be sent: the broker gives it out once more.
        """
        soon = 2.0 ** min(self.sent_again, 10)
        delay: Any = max(0.1, jitter(min(soon, left, LONGEST_DELAY, self._visible_for / 2)))
        headers = {**(self.request.headers or {}), HEADER: self.sent_again + 1}
        signature = self.task.signature_from_request(
            self.request, countdown=delay, retries=self.request.retries, headers=headers
        )
        try:
            signature.apply_async()
        except Exception as refused:
            self.unsent(refused)
        raise Retry(exc=error, when=delay, sig=signature) from error

    def unsent(self, refused: Exception) -> NoReturn:
        """Give a message that could not be sent back to the broker, if that still has it.

        Raises `GivenBack` then, or else what the sending has raised.
        """
        outer = getattr(self.request, MESSAGE, None)
        if outer not in (None, self):  # the body of a job that `enqueue_once` has queued
            outer.settle("queued")
            outer.unsent(refused)
        if not self.task.acks_late:
            raise refused
        time.sleep(jitter(PAUSE))  # it may come back at once
        raise GivenBack(repr(refused), requeue=True) from refused

    @property
    def _visible_for(self) -> float:
        options = self.task.app.conf.broker_transport_options or {}
        return float(options.get("visibility_timeout") or 3600)

    # -- receipts; see Note [Done] ---------------------------------------------------------------

    @property
    def key(self) -> str:
        """What the receipt is found by."""
        return fitting(f"celery:{self.request.id}")

    def was_done(self, alias: str) -> bool:
        """Whether this task id has ended well before."""
        if not self.queued:
            return False
        receipt = receipts.find(alias, self.key)
        self.done_at = receipt and receipt.finished_at
        return receipt is not None

    def duplicate(self, name: str) -> Any:
        """Return the result of a delivery whose task was done before; see Note [Done]."""
        try:
            meta = self._known()
        except Exception:  # no result backend, or it cannot be asked
            meta = {}
        if meta.get("status") == SUCCESS:
            self.request.chain = self.request.callbacks = None
            return meta.get("result")
        return {
            "distlock": "duplicate",
            "lock": name,
            "task_id": self.request.id,
            "finished_at": self.done_at.isoformat(),
        }

    def _known(self) -> dict[str, Any]:
        """Return what the result backend knows of this task id, if others' results are there."""
        backend = self.task.backend
        known = backend.get_task_meta(self.request.id, cache=False) if backend.persistent else {}
        return dict(known)

    def finish(self, lease: Lease, alias: str) -> None:
        """Write the receipt, in the transaction that releases the lock. Raises `LockLost`.

        Inside `atomic=True` that is the body's own. Otherwise a database that cannot be asked any
        more only costs the receipt: the work is done.
        """
        connection = connections[alias]
        if not self.queued or self._is_published_again or connection.needs_rollback:
            return
        if in_transaction(connection):
            self._write(lease, alias)
            return
        lease.check()
        try:
            refresh(connection, lease.held_for)
            with transaction.atomic(using=alias):
                self._write(lease, alias)
                lease.release()
        except LockLost:
            raise
        except Error:
            text = "task_receipt_missing id=%r"
            log(logging.WARNING, text, task_id=self.request.id, exc_info=True)

    def _write(self, lease: Lease, alias: str) -> None:
        started, task = lease.acquired_at, self.task.name[:255]
        run = receipts.Run(alias, self.key, lease.token, started, task, KEEP)
        # By the database's clock, which was read for the grant, and this process's since then.
        finished = started + timedelta(seconds=lease.held_for)
        receipts.add(run, self.request.id[:255], finished)

    @property
    def _is_published_again(self) -> bool:
        return any(child.id == self.request.id for child in self.request.children or ())
