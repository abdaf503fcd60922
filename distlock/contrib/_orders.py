"""What one call of `enqueue_once` says, checked where it is said: an `Order`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from celery import Task
from celery.utils.time import maybe_iso8601
from celery.utils.time import maybe_make_aware as aware
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.transaction import TransactionManagementError
from kombu.utils import json as messages

from ..arguments import checked_alias, checked_name, flag_of
from ..conf import settings
from ..connections import in_transaction
from ..deadlines import Seconds, seconds
from ..decorators import Key
from ..jobs import LONGEST_KEY
from ..orders import Order, Until
from ._canonical import canonical_name, fitting

MARK = "distlock_deduplicated"
PREFIX = "enqueue:"


def order_of(
    task: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    options: dict[str, Any],
    *,
    key: str | None,
    until: Until,
    ttl: Seconds,
    replace: bool,
    using: str | None,
) -> Order:
    """Return what is to be queued. Raises what `enqueue_once` says, before anything is written."""
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
    order = Order(
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
    return order


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
