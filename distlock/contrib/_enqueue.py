"""`enqueue_once`: a task that waits in the queue already is not queued again. See `outbox.py`.

The message bears the row's id and, for people and routers, the arguments as they were when it was
first queued. The worker takes them from the row, where `replace=True` may have put newer ones; that
side of it is `_deduplicated.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from celery import current_app, shared_task
from celery.result import AsyncResult
from django.db import Error, transaction
from kombu.exceptions import OperationalError
from kombu.utils import json as messages

from .. import orders, outbox
from ..arguments import checked_alias
from ..conf import settings
from ..deadlines import Seconds, seconds
from ..events import log
from ._orders import order_of

if TYPE_CHECKING:
    from ..models import Job

HEADER = "distlock_job"
OLDER_THAN = 60.0
"""Seconds that whoever has committed is given to publish, before somebody else does."""


class EnqueueResult(NamedTuple):
    """The task's result, and whether this call has queued it."""

    result: AsyncResult[Any]
    created: bool


def enqueue_once(
    task: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    key: str | None = None,
    until: orders.Until = "start",
    ttl: Seconds = 3600,
    replace: bool = False,
    using: str | None = None,
    **options: Any,
) -> EnqueueResult:
    """Queue a task that is `@deduplicated`, unless the same waits in the queue already.

    What is queued belongs to the caller's transaction: it is published after its commit, and a
    rollback leaves nothing. If the broker cannot be reached then, or this process dies first,
    `manage.py resend_jobs` publishes it, under the same id. A duplicate gets the result of the task
    that waits. Returns `EnqueueResult(result, created)`.

    key: what counts as the same, for this task. Default: its arguments, however they are spelled.
    until: "start": a call that comes while it runs queues it again, for a run that begins when this
        one is over; "finish": that call is a duplicate, too.
    ttl: seconds that a task may wait in the queue, beyond its `countdown`, `eta` or `expires`,
        before its message counts as lost and is sent again by the next call (3600).
    replace: a task that still waits is to run with these arguments, whatever it was queued with.
    using: the database alias.
    options: those of `apply_async()`. Those of a duplicate are not used.

    Raises `TypeError` or `ValueError` that names what is wrong with an argument, or cannot be
    stored as JSON; `ImproperlyConfigured` if the task is not `@deduplicated`; `LockBusy` if another
    transaction that has queued the same stays open for longer than `WAIT` (10 seconds);
    `TransactionManagementError` where autocommit is off.
    """
    order = order_of(
        task, args, kwargs, options, key=key, until=until, ttl=ttl, replace=replace, using=using
    )
    job, created = order.put()
    sent: list[Any] = []
    if created:
        eager = task.app.conf.task_always_eager
        send = partial(_publish_or_log, task, order.alias, job, sent, eager)
        transaction.on_commit(send, using=order.alias, robust=not eager)
    return EnqueueResult(sent[0] if sent else task.AsyncResult(job.task_id), created)


# -- publishing ----------------------------------------------------------------------------------


def publish(task: Any, alias: str, job: Job) -> Any:
    """Send a job's message. Raises what the broker's client raises."""
    stored = messages.loads(json.dumps(job.arguments))
    options = stored["options"]
    headers = {**(options.pop("headers", None) or {}), HEADER: {"key": job.key, "using": alias}}
    sent = task.apply_async(
        stored["args"], stored["kwargs"], task_id=job.task_id, headers=headers, **options
    )
    try:
        outbox.published(alias, job)
    except Error:
        text = "job_published_unnoticed key=%r: it is sent again"
        log(logging.WARNING, text, key=job.key, exc_info=True)
    return sent


def _publish_or_log(task: Any, alias: str, job: Job, sent: list[Any], eager: bool) -> None:
    try:
        sent.append(publish(task, alias, job))
    except Exception:
        if eager:  # the task itself has raised
            raise
        text = "job_unpublished key=%r: left to resend_jobs"
        log(logging.WARNING, text, key=job.key, exc_info=True)


def resend(alias: str, older_than: float) -> tuple[int, list[str]]:
    """Publish what was committed that many seconds ago and not published yet.

    Return how many, and the names of the tasks that this app does not know. Raises what the
    broker's client raises; what is not published then is left to the next time. A job that itself
    cannot be sent, because its task takes other arguments now for example, keeps nobody else
    waiting: its error is raised at the end.
    """
    count, unsent = 0, []
    waiting = outbox.unpublished_tasks(alias, older_than)
    known = waiting.intersection(current_app.tasks)
    for job in outbox.unpublished(alias, older_than, known):
        if error := _publish_if_possible(alias, job):
            unsent.append(error)
        else:
            count += 1
    if unsent:
        raise unsent[0]
    return count, sorted(waiting - known)


def _publish_if_possible(alias: str, job: Job) -> Exception | None:
    """Publish a job, or return why it itself cannot be."""
    try:
        publish(current_app.tasks[job.task], alias, job)
    except (OperationalError, OSError):  # the broker is down, for all of them
        raise
    except Exception as error:
        log(logging.WARNING, "job_unpublished key=%r", key=job.key, exc_info=True)
        return error
    return None


@shared_task(name="distlock.resend_jobs", ignore_result=True)
def resend_jobs(older_than: float = OLDER_THAN, using: str | None = None) -> int:
    """Do what `manage.py resend_jobs` does: a task for beat. Return how many were published."""
    alias = checked_alias(using) or settings().USING
    count, unknown = resend(alias, seconds(older_than, "older_than"))
    if unknown:
        log(logging.WARNING, "job_unknown tasks=%r: this app does not have them", tasks=unknown)
    return count
