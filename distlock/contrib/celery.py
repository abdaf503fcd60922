"""Celery: one run of a task at a time, with the same lock as everywhere else.

    @shared_task
    @single_instance
    def sync_account(account_id): ...

The decorator stands *under* Celery's, which then makes the task from what this one returns:
`delay`, retries, chains and chords work as before. The holder that people see is the task's id.

What is never dropped, and what is not run again, is written in `_deliveries.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

from ..arguments import DEFAULT, Default
from ..deadlines import Seconds
from ..locks import lock
from ._deduplicated import deduplicated
from ._enqueue import EnqueueResult, enqueue_once, resend_jobs
from ._instances import KeyName, OnBusy, SingleInstance, current_lock
from ._lazily import __getattr__  # noqa: F401  the schedulers of beat

__all__ = [
    "EnqueueResult",
    "current_lock",
    "deduplicated",
    "enqueue_once",
    "resend_jobs",
    "single_instance",
]

P = ParamSpec("P")
R = TypeVar("R")

MODES = ("skip", "retry", "wait", "raise")


@overload
def single_instance(function: Callable[P, R], /) -> Callable[P, Any]: ...


@overload
def single_instance(
    key: KeyName = None,
    *,
    on_busy: OnBusy = "skip",
    ttl: Seconds | Default = DEFAULT,
    renew: bool | Default = DEFAULT,
    wait: Seconds | Default | None = DEFAULT,
    min_hold: Seconds | None = None,
    max_hold: Seconds | None = None,
    atomic: bool = False,
    using: str | None = None,
) -> Callable[[Callable[P, R]], Callable[P, Any]]: ...


def single_instance(
    function: Any = None, /, *, key: KeyName = None, on_busy: OnBusy = "skip", **how: Any
) -> Any:
    """Let only one run of a task with the same key go on at a time. Put it under `@shared_task`.

    key: the lock's name, with `{argument}` fields, or (by keyword) a callable of the bound
        arguments. Without one: the task's name and its arguments, however they were spelled.
    on_busy: "skip" ends as a success whose result is a dict with the key "distlock"; "retry"
        sends the message again, not charged to `max_retries`; "wait" waits up to `wait` (10)
        seconds in the worker; "raise" raises `LockBusy`, and so do "wait" in the end and "retry"
        where there is no queue (eager, called directly); or a callable that gets the `LockBusy`
        and returns the result. What is its own task's, and a retry or a redelivery in the mode
        "skip", is sent again instead; see Note [Never dropped] in `_deliveries.py`.
    ttl, renew, wait, min_hold, max_hold, atomic, using: as in `lock()`.

    A task that has ended well is not run again when its message is delivered once more within a
    day: it has the result of that run where it is known, or else a dict, too. A job that several
    beats send needs a `min_hold` above the time between the twins.

    Raises `ImproperlyConfigured` above `@shared_task`, and what `lock()` raises.
    """
    if isinstance(function, str):
        function, key = None, function
    if not callable(on_busy) and on_busy not in MODES:
        raise ValueError(f"on_busy must be one of {MODES} or a callable, not {on_busy!r}.")
    if not (key is None or isinstance(key, str) or callable(key)):
        raise TypeError(f"key must be a str or a callable, not {type(key).__name__}.")
    described = lock("task", **how)
    if on_busy != "wait":
        described = dataclasses.replace(described, wait=0.0)

    def decorate(function: Any) -> Any:
        return SingleInstance(described, key, on_busy, function).wrapper

    return decorate if function is None else decorate(function)
