"""`enqueue_once`: a task that waits in the queue already is not queued again. See `outbox.py`.

The message bears the row's id and, for people and routers, the arguments as they were when it was
first queued. The worker takes them from the row, where `replace=True` may have put newer ones; that
side of it is `_deduplicated.py`.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from celery import Task, current_app, shared_task
from celery.result import AsyncResult
from celery.utils.time import maybe_iso8601
from celery.utils.time import maybe_make_aware as aware
from django.core.exceptions import ImproperlyConfigured
from django.db import Error, connections, transaction
from django.db.transaction import TransactionManagementError
from kombu.exceptions import OperationalError
from kombu.utils import json as messages

from .. import outbox
from ..arguments import checked_alias, checked_name, flag_of
from ..conf import settings
from ..connections import in_transaction
from ..deadlines import Seconds, seconds
from ..decorators import Key
from ..jobs import LONGEST_KEY
from ._canonical import canonical_name, fitting

if TYPE_CHECKING:
    from ..models import Job

logger = logging.getLogger("distlock")

HEADER = "distlock_job"
MARK = "distlock_deduplicated"
PREFIX = "enqueue:"
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
    until: outbox.Until = "start",
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
    _refuse(task, until)
    alias = checked_alias(using) or settings().USING
    _check_call(task, args, kwargs := dict(kwargs or {}))
    options = _absolute(task, options)
    lasts = seconds(ttl, "ttl", positive=True)
    arguments = {
        "args": [_plain(task, f"args[{at}]", value) for at, value in enumerate(args)],
        "kwargs": {name: _plain(task, name, value) for name, value in kwargs.items()},
        "options": {name: _plain(task, name, value) for name, value in options.items()},
        "ttl": lasts,
    }
    order = outbox.Order(
        alias=alias,
        key=_key_of(task, args, kwargs, key),
        task=checked_name(task.name, "the task's name"),
        arguments=arguments,
        ttl=lasts + _delay(task, options),
        until=until,
        replace=flag_of(replace, "replace") or False,
        is_over=partial(_is_over, task),
    )
    _refuse_by_hand(alias)
    job, created = order.put()
    sent: list[Any] = []
    if created:
        eager = task.app.conf.task_always_eager
        send = partial(_publish_or_log, task, alias, job, sent, eager)
        transaction.on_commit(send, using=alias, robust=not eager)
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
        logger.warning("job_published_unnoticed key=%r: it is sent again", job.key, exc_info=True)
    return sent


def _publish_or_log(task: Any, alias: str, job: Job, sent: list[Any], eager: bool) -> None:
    try:
        sent.append(publish(task, alias, job))
    except Exception:
        if eager:  # the task itself has raised
            raise
        logger.warning("job_unpublished key=%r: left to resend_jobs", job.key, exc_info=True)


def resend(alias: str, older_than: float) -> tuple[int, list[str]]:
    """Publish what was committed that many seconds ago and not published yet.

    Return how many, and the names of the tasks that this app does not know. Raises what the
    broker's client raises; what is not published then is left to the next time. A job that itself
    cannot be sent, because its task takes other arguments now for example, keeps nobody else
    waiting: its error is raised at the end.
    """
    count, unknown, unsent = 0, set(), []
    for job in outbox.unpublished(alias, older_than):
        if job.task not in current_app.tasks:
            unknown.add(job.task)
            continue
        try:
            publish(current_app.tasks[job.task], alias, job)
            count += 1
        except (OperationalError, OSError):  # the broker is down, for all of them
            raise
        except Exception as error:
            logger.warning("job_unpublished key=%r", job.key, exc_info=True)
            unsent.append(error)
    if unsent:
        raise unsent[0]
    return count, sorted(unknown)


@shared_task(name="distlock.resend_jobs", ignore_result=True)
def resend_jobs(older_than: float = OLDER_THAN, using: str | None = None) -> int:
    """Do what `manage.py resend_jobs` does: a task for beat. Return how many were published."""
    alias = checked_alias(using) or settings().USING
    count, unknown = resend(alias, seconds(older_than, "older_than"))
    if unknown:
        logger.warning("job_unknown tasks=%r: this app does not have them", unknown)
    return count


# -- what a call says ----------------------------------------------------------------------------


def _refuse(task: Any, until: str) -> None:
    if not isinstance(task, Task):
        raise TypeError(f"enqueue_once() queues Celery tasks, not {task!r}.")
    if not hasattr(task.run, MARK):
        raise ImproperlyConfigured(
            f"{task.name} would run for every copy of its message, and never free its key. "
            "Decorate it:\n    @shared_task\n    @deduplicated\n    def task(...): ..."
        )
    if until not in ("start", "finish"):
        raise ValueError(f'until must be "start" or "finish", not {until!r}.')


def _refuse_by_hand(alias: str) -> None:
    """Raise where Django tells nobody of a commit, before anything is written."""
    connection = connections[alias]
    if in_transaction(connection) and not connection.in_atomic_block:
        raise TransactionManagementError(
            "enqueue_once() publishes when the transaction commits, and autocommit is off on "
            f"{alias!r}, where Django tells nobody of a commit. Use transaction.atomic()."
        )


def _check_call(task: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise `TypeError` for arguments that the task does not take, as `apply_async` would later."""
    if isinstance(args, str) or not isinstance(args, Sequence):
        raise TypeError(f"args must be a list or a tuple, not {args!r}.")
    if task.typing:
        task.__header__(*args, **kwargs)


def _key_of(task: Any, args: Sequence[Any], kwargs: dict[str, Any], key: str | None) -> str:
    function = getattr(task, "_orig_run", task.run)  # what autoretry_for has put aside
    if key is None:
        name = Key(partial(canonical_name, task.name), function).of(tuple(args), kwargs)
    else:
        fields = [f"{{{name}}}" for name in inspect.signature(function).parameters]
        if found := [field for field in fields if field in checked_name(key, "key")]:
            raise ValueError(
                f"key {key!r} has the field {found[0]}, which is not filled in: all calls would "
                "count as one. Use an f-string."
            )
        name = f"{task.name}:{key}"
    return fitting(PREFIX + name, LONGEST_KEY)


def _absolute(task: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return options that say the same when they are used later."""
    if "task_id" in options:
        raise TypeError("enqueue_once() chooses the task_id itself.")
    now: datetime = task.app.now()
    options = dict(options)
    if (countdown := options.pop("countdown", None)) is not None:
        options["eta"] = now + timedelta(seconds=seconds(countdown, "countdown"))
    expires = options.get("expires", task.expires)
    if isinstance(expires, int | float | timedelta):
        options["expires"] = now + timedelta(seconds=seconds(expires, "expires"))
    return options


def _delay(task: Any, options: dict[str, Any]) -> float:
    """Return the seconds from now that a message may rightly wait."""
    moments = [maybe_iso8601(options.get(name)) for name in ("eta", "expires")]
    now: datetime = task.app.now()
    return max([0.0, *((aware(at) - now).total_seconds() for at in moments if at)])


def _plain(task: Any, name: str, value: Any) -> Any:
    """Return a value as JSON has it, in the form that Celery's own serializer gives it."""
    try:
        return json.loads(messages.dumps(value), parse_constant=_no_constant)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} of enqueue_once({task.name}) cannot be stored as JSON: {error}"
        ) from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_over(task: Any, task_id: str) -> bool:
    """Whether the result says that a task has ended: its row should not say that it waits."""
    try:
        return bool(task.AsyncResult(task_id).ready())
    except Exception:  # no result backend, or none that can be reached
        return False
