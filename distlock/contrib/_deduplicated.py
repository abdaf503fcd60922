"""`@deduplicated`: what a worker does with a message that `enqueue_once` has sent.

# Note [A run and its row]
Runs of one key take turns, by the job's lock: a message that finds it held goes back to the queue
and comes again after 1, 2, 4.. 15 seconds, and its row says "queued" meanwhile, so that it may
still be given newer arguments. Under the lock the row decides: if it bears another id, or is done,
the message is one too many. Whoever was killed has left "running" behind: its own message, if the
broker delivers it again, starts it again.

The row of a run that ends well is written in the transaction that releases the lock, so that a
second copy of the message cannot come in between. If it raises, Celery knows later than we do
whether there will be a retry, and says so in a signal. Until then the row says "running" with
nobody in the lock: a retry would pass, and if the process dies here, the key is free.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

from celery import Task
from celery._state import get_current_task
from celery.exceptions import Ignore, Reject, Retry, WorkerLostError
from celery.signals import task_failure, task_retry, task_revoked
from celery.utils.time import maybe_make_aware
from django.core.exceptions import ImproperlyConfigured
from django.db import Error, InterfaceError, OperationalError, connections
from kombu.utils import json as messages

from .. import outbox, receipts
from ..backends.base import Pinned
from ..connections import in_transaction, refresh
from ..deadlines import Deadline, jitter
from ..events import log
from ..exceptions import AlreadyHeld, LockBusy
from ..leases import Lease
from ..locks import lock
from ._deliveries import MESSAGE, PAUSE, Delivery
from ._enqueue import HEADER
from ._functions import refuse
from ._orders import MARK
from ._skipped import skipped

if TYPE_CHECKING:
    from ..models import Job

P = ParamSpec("P")
R = TypeVar("R")

LONGEST_PAUSE = 15.0
PERSISTENCE = 30.0
"""Seconds that a worker goes on with a message that only it has, and that it cannot get rid of."""


def deduplicated(function: Callable[P, R]) -> Callable[P, Any]:
    """Let a task be queued with `enqueue_once()`. Put it under `@shared_task`.

    A message that `enqueue_once()` has sent runs if its job is still to be done, one at a time per
    key. One that comes too late ends as a success whose result is a dict with the key "distlock".
    What is sent with `delay()`, or called, runs as without it. Above `@single_instance`, if both.

    Raises `ImproperlyConfigured` above `@shared_task`, `TypeError` for what is not a function.
    """
    refuse("deduplicated", function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        task: Any = get_current_task()
        if task is None or getattr(task.run, MARK, None) is not wrapper:
            return function(*args, **kwargs)
        request: Any = task.request
        if request.called_directly or HEADER not in (request.headers or {}):
            return function(*args, **kwargs)
        bound: Any = [own for own in args[:1] if own is task]
        return _Message(task).deliver(functools.partial(function, *bound))

    setattr(wrapper, MARK, wrapper)  # wraps() carries it to decorators above
    # Celery checks a call at the caller with getfullargspec(), which does not follow
    # __wrapped__, but does take this.
    wrapper.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return wrapper


class _Message(Delivery):
    """One delivery of a message that `enqueue_once` has sent."""

    def __init__(self, task: Task[Any, Any]) -> None:
        super().__init__(task)
        header = self.request.headers[HEADER]
        self.alias: str = header["using"]
        self.job_key: str = header["key"]
        self.run: outbox.Run | None = None
        self.ttl = 0.0

    def deliver(self, function: Callable[..., Any]) -> Any:
        """Run the job if it is still to be done; see Note [A run and its row]."""
        self._refuse_transaction()
        held = lock(receipts.PREFIX + self.job_key, wait=0, using=self.alias)
        try:
            with self.named_as_holder(), held as lease:
                job = self._start(lease)
                return self._stale() if job is None else self._work(lease, function, job)
        except (AlreadyHeld, LockBusy, OperationalError, InterfaceError) as error:
            if self.run is not None or not self._can_come_again(error):
                raise
            hindrance = error
        return self._busy(hindrance)

    def _can_come_again(self, error: Exception) -> bool:
        """Whether what kept the run from its start is no error of this delivery."""
        if isinstance(error, AlreadyHeld):
            return not self.queued  # else the thread was left with a lease that is not ours
        return self.queued or isinstance(error, LockBusy | Pinned)

    def _start(self, lease: Lease) -> Job | None:
        run = outbox.Run(self.alias, self.job_key, self.request.id, lease.token)
        job = run.start()
        if job is not None:
            self.run, self.ttl = run, job.arguments["ttl"]
            setattr(self.request, MESSAGE, self)  # for the signals
        return job

    def _work(self, lease: Lease, function: Callable[..., Any], job: Job) -> Any:
        assert self.run is not None
        stored = messages.loads(json.dumps(job.arguments))
        # What a retry sends again, and people see.
        self.request.update(args=stored["args"], kwargs=stored["kwargs"])
        try:
            result = function(*stored["args"], **stored["kwargs"])
        except (Ignore, Reject) as error:
            requeued = getattr(error, "requeue", False)
            self.settle("queued" if requeued or self._is_published_again else "done")
            raise
        if self._is_published_again:
            self.settle("queued")
        elif self.queued:
            self.finish(lease, self.alias)
        else:
            self.run.finish()
        return result

    def _write(self, lease: Lease, alias: str) -> None:
        """Write the receipt that `Delivery.finish` is about: the row itself."""
        assert self.run is not None
        self.run.finish()

    def settle(self, state: str, delay: float = 0.0) -> None:
        """Say of a run that it is "done", or that its message is in the queue again."""
        assert self.run is not None
        try:
            if state == "done":
                self.run.finish()
            else:
                self.run.wait(delay + self.ttl)
        except Error:
            log(logging.WARNING, "job_unsettled key=%r", key=self.job_key, exc_info=True)

    def again(self, error: Exception, left: float) -> None:
        """Send this message again, or see to it that somebody does; see `unsent`."""
        deadline = Deadline(PERSISTENCE)
        while True:
            try:
                super().again(error, left)
            except (Retry, Ignore, Reject):
                raise
            except Exception:
                if not deadline.left:
                    raise
            time.sleep(jitter(PAUSE))

    def unsent(self, refused: Exception) -> NoReturn:
        """Leave a message that could not be sent to `resend_jobs`, or else to the broker.

        Raises `Ignore` or `GivenBack`, or what the sending has raised.
        """
        self.request.distlock_unsent = True  # its key is not free, should this fail
        try:
            refresh(connections[self.alias])
            noted = outbox.unsent(self.alias, self.job_key, self.request.id)
            lost = not noted and self._is_wanted()
        except Error:
            noted, lost = False, True
        if lost:
            super().unsent(refused)
        if noted:
            text = "job_unpublished key=%r: left to resend_jobs"
            log(logging.WARNING, text, key=self.job_key, exc_info=True)
        raise Ignore from refused

    # -- what does not run -----------------------------------------------------------------------

    def _busy(self, error: Any) -> Any:
        """Come again, or, where there is no queue, free the key and skip."""
        if not self._is_wanted():
            return self._stale()
        if self.queued:
            self.again(error, LONGEST_PAUSE)
        outbox.free(self.alias, self.job_key, self.request.id)
        return skipped("busy", receipts.PREFIX + self.job_key, getattr(error, "holder", None))

    def _is_wanted(self) -> bool:
        """Whether it has something to start, as far as is known: one too many does no harm."""
        try:
            return outbox.is_wanted(self.alias, self.job_key, self.request.id)
        except (OperationalError, InterfaceError):
            if self.queued:
                return True
            raise

    def _stale(self) -> dict[str, Any]:
        lock_name = receipts.PREFIX + self.job_key
        return {"distlock": "duplicate", "lock": lock_name, "task_id": self.request.id}

    def _refuse_transaction(self) -> None:
        if in_transaction(connections[self.alias]):
            raise ImproperlyConfigured(
                f"{self.task.name} is started inside a transaction, and its row would be locked "
                "until that ends. Put @deduplicated above @single_instance(atomic=True), and above "
                "what else opens one."
            )


# -- what Celery knows better; see Note [A run and its row] --------------------------------------


@task_failure.connect(weak=False)
def _failed(sender: Any = None, exception: Any = None, **_: Any) -> None:
    """Free the key, unless its message may still come, or should have: somebody may count on it.

    A process that was killed may have sent it again before it died.
    """
    request: Any = getattr(sender, "request", None)
    message = getattr(request, MESSAGE, None)
    if message is not None:
        message.settle("done")
        return
    if isinstance(exception, WorkerLostError) or getattr(request, "distlock_unsent", False):
        return
    if header := (getattr(request, "headers", None) or {}).get(HEADER):
        refresh(connections[header["using"]])
        _free(header["using"], header["key"], request.id, running=False)  # before it had started


@task_retry.connect(weak=False)
def _retried(request: Any = None, reason: Any = None, **_: Any) -> None:
    message = getattr(request, MESSAGE, None)
    if message is not None:
        message.settle("queued", _seconds_until(getattr(reason, "when", None)))


@task_revoked.connect(weak=False)
def _revoked(request: Any = None, terminated: bool = False, **_: Any) -> None:
    """Free the key of a message that was thrown away, in a thread: the worker goes on meanwhile."""
    header = (getattr(request, "headers", None) or {}).get(HEADER)
    if header is not None:
        which = (header["using"], header["key"], request.id)
        threading.Thread(target=_free_apart, args=which, kwargs={"running": terminated}).start()


def _free_apart(alias: str, key: str, task_id: str, *, running: bool) -> None:
    try:
        _free(alias, key, task_id, running=running)
    finally:
        connections.close_all()


def _free(alias: str, key: str, task_id: str, *, running: bool) -> None:
    try:
        outbox.free(alias, key, task_id, running=running)
    except Error:
        log(logging.WARNING, "job_not_freed key=%r", key=key, exc_info=True)


def _seconds_until(when: Any) -> float:
    if isinstance(when, datetime):
        when = (maybe_make_aware(when) - datetime.now(timezone.utc)).total_seconds()
    return max(0.0, float(when or 0))
