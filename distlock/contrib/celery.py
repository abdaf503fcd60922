"""Celery: one run of a task at a time, with the same lock as everywhere else.

    @shared_task
    @single_instance
    def sync_account(account_id): ...

The decorator stands *under* Celery's, which then makes the task from what this one returns:
`delay`, retries, chains and chords work as before. The holder that people see is the task's id.

# Note [Never dropped]
Skipping drops a duplicate, whose work somebody else is doing. It would lose work if the message
*is* the holder's: a delivery after its worker died, a second delivery while the first still runs
(visibility timeout), or `self.retry()`, which publishes before the run that it ends has released.
So what comes from the holder's own task id goes back to the queue, in every mode, and so does a
retry or a redelivery in the mode "skip". It keeps its id and its count of retries; a header counts
instead. The next try comes after 1, 2, 4.. seconds, or when the lease ends if that is sooner: a
holder may be done early, and a dead one is gone then.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar, overload

from celery import Task, current_app
from celery._state import get_current_task
from celery.app.task import Context
from celery.exceptions import Retry
from celery.local import Proxy
from django.core.exceptions import ImproperlyConfigured

from .. import contexts
from ..arguments import DEFAULT, Default
from ..backends import backend_for
from ..backends.base import Holder, moment_of
from ..conf import settings
from ..deadlines import Seconds, jitter
from ..decorators import Key
from ..exceptions import AlreadyHeld, LockBusy
from ..locks import Lock, lock
from ..places import place
from ._canonical import canonical_name

P = ParamSpec("P")
R = TypeVar("R")

KeyName = str | Callable[[Mapping[str, Any]], str] | None
OnBusy = str | Callable[[LockBusy], Any]

MODES = ("skip", "retry", "wait", "raise")
LONGEST_DELAY = 60.0
HEADER = "distlock_again"


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
        and returns the result. See also Note [Never dropped].
    ttl, renew, wait, min_hold, max_hold, atomic, using: as in `lock()`.

    A job that several beats send needs a `min_hold` above the time between the twins. Raises
    `ImproperlyConfigured` above `@shared_task`, and what `lock()` raises.
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


class SingleInstance:
    """What stands between a task and its function."""

    def __init__(self, described: Lock, key: KeyName, on_busy: OnBusy, function: Any) -> None:
        _refuse(function)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return self.call(args, kwargs)

        # Celery checks a call at the caller with getfullargspec(), which does not follow
        # __wrapped__, but does take this.
        wrapper.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        self.wrapper = wrapper
        self.described = described
        self.on_busy = on_busy
        self.function = function
        self.key = Key(self.default_key if key is None else key, function)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function under its lock, or do what `on_busy` says."""
        if len(args) == 1 and inspect.isfunction(args[0]):  # @single_instance(make_key)
            raise ImproperlyConfigured("Give a callable key by keyword: single_instance(key=...).")
        run = Run(self.task_of(args))
        held = self.described.named(self.key.of(args, kwargs))
        with ExitStack() as block:
            block.enter_context(run.named_as_holder())
            try:
                block.enter_context(held)
            except LockBusy as error:
                return self.busy(run, error, held)
            except AlreadyHeld as error:
                # Only a call inside a run can nest; in a worker a lease was left behind.
                if run.queued or self.on_busy in ("wait", "raise"):
                    raise
                nested = LockBusy(str(error), name=error.name, holder=held.holder())
                return self.busy(run, nested, held)
            return self.function(*args, **kwargs)

    def busy(self, run: Run, error: LockBusy, held: Lock) -> Any:
        """Return the result of a run that did not get its lock, or raise; the mode decides."""
        again = run.is_holder(error.holder) or self.on_busy == "retry"
        if run.queued and (again or (self.on_busy == "skip" and run.must_run)):
            run.again(error, _remaining(error.holder, held))
        if callable(self.on_busy):
            return self.on_busy(error)
        if self.on_busy != "skip":
            raise error
        holder = None if error.holder is None else str(error.holder)
        return {"distlock": "skipped", "reason": "busy", "lock": error.name, "holder": holder}

    def default_key(self, arguments: Mapping[str, Any]) -> str:
        """Return the task's name and its arguments, without the `self` of bind=True."""
        task = self.task_of(tuple(arguments.values()))
        name = task.name if task else f"{self.function.__module__}.{self.function.__qualname__}"
        own = {key: value for key, value in arguments.items() if not isinstance(value, Task)}
        return canonical_name(name, own)

    def task_of(self, args: tuple[Any, ...]) -> Task[Any, Any] | None:
        """Return the task that this function is the body of, if it is one."""
        if args and isinstance(args[0], Task):
            return args[0]
        for task in (get_current_task(), *current_app.tasks.values()):
            body = getattr(task, "run", None)
            while body is not None:  # autoretry_for and pydantic=True put wrappers around it
                if body is self.wrapper:
                    return task
                body = getattr(body, "__func__", None) or getattr(body, "__wrapped__", None)
        return None


class Run:
    """One delivery of a task's message, or a call without one."""

    def __init__(self, task: Task[Any, Any] | None) -> None:
        self.task: Any = task
        self.request: Any = task.request if task else Context()
        self.queued = not (self.request.called_directly or self.request.is_eager)
        self.sent_again: int = (self.request.headers or {}).get(HEADER, 0)
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

    def is_holder(self, holder: Holder | None) -> bool:
        """Whether the holder may be this same message, delivered before."""
        return holder is None or (bool(self.holder) and holder.thread == self.holder)

    def again(self, error: LockBusy, left: float) -> None:
        """Send this message again like `Task.retry`, but do not count it as one. Raises `Retry`."""
        soon = 2.0 ** min(self.sent_again, 10)
        delay: Any = max(0.1, jitter(min(soon, left, LONGEST_DELAY)))
        headers = {**(self.request.headers or {}), HEADER: self.sent_again + 1}
        signature = self.task.signature_from_request(
            self.request, countdown=delay, retries=self.request.retries, headers=headers
        )
        signature.apply_async()
        raise Retry(exc=error, when=delay, sig=signature) from error


def _remaining(holder: Holder | None, held: Lock) -> float:
    """Return the seconds until a lease ends unless it is renewed, by the database's clock."""
    if holder is None:
        return 0.0
    where = place(held.using or settings().USING)
    now = moment_of(where.run(backend_for(where.connection).clock))
    return max(0.0, (holder.expires_at - now).total_seconds())


def _refuse(function: Any) -> None:
    if issubclass(type(function), Task | Proxy):  # not isinstance(), which evaluates a proxy
        raise ImproperlyConfigured(
            "single_instance goes under Celery's decorator, next to the function:\n"
            "    @shared_task\n    @single_instance\n    def task(...): ..."
        )
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"single_instance decorates functions, not {function!r}.")
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    if any(kind(function) for kind in kinds):
        name = getattr(function, "__qualname__", function)
        raise TypeError(
            f"{name} is async or a generator: its body would run after the lock was released."
        )
