"""What stands between a task and its function: the key, the lock, and the answer without it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from celery import Task, current_app
from celery._state import get_current_task
from django.core.exceptions import ImproperlyConfigured

from ..backends import backend_for
from ..backends.base import Holder, moment_of
from ..conf import settings
from ..decorators import Key
from ..exceptions import AlreadyHeld, LockBusy
from ..leases import Lease
from ..locks import Lock
from ..places import place
from ._canonical import canonical_name
from ._deliveries import Delivery
from ._functions import refuse
from ._skipped import reason_of, skipped

KeyName = str | Callable[[Mapping[str, Any]], str] | None
OnBusy = str | Callable[[LockBusy], Any]

_current: ContextVar[Lease] = ContextVar("distlock_current_lock")


def current_lock() -> Lease:
    """Return the lease of the run that this is called in: its token, `check()` and `guard()`.

    Of runs inside each other it is the innermost. A thread that the body starts has none of its
    own: hand it the lease. Raises `RuntimeError` outside a task under `single_instance`.
    """
    lease = _current.get(None)
    if lease is None:
        raise RuntimeError(
            "current_lock() is for the body of a task under single_instance, in its own thread."
        )
    return lease


@contextmanager
def _is_current(lease: Lease) -> Iterator[None]:
    token = _current.set(lease)
    try:
        yield
    finally:
        _current.reset(token)


class SingleInstance:
    """What stands between a task and its function."""

    def __init__(self, described: Lock, key: KeyName, on_busy: OnBusy, function: Any) -> None:
        refuse("single_instance", function)

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
        run = Delivery(self.task_of(args))
        held = self.described.named(self.key.of(args, kwargs))
        with ExitStack() as block:
            block.enter_context(run.named_as_holder())
            try:
                lease = self.enter(block, run, held)
            except LockBusy as error:
                return self.busy(run, error, held)
            except AlreadyHeld as error:
                # Only a call inside a run can nest; in a worker a lease was left behind.
                if run.queued or self.on_busy in ("wait", "raise"):
                    raise
                nested = LockBusy(str(error), name=error.name, holder=held.holder())
                return self.busy(run, nested, held)
            if run.was_done(held.alias):
                lease.waive_min_hold()
                return run.duplicate(lease.name)
            with _is_current(lease), run.in_body():
                result = self.function(*args, **kwargs)
            run.finish(lease, held.alias)
            return result

    def enter(self, block: ExitStack, run: Delivery, held: Lock) -> Lease:
        """Take the lock for the block, past what this task's own earlier run has left of it."""
        try:
            return block.enter_context(held)
        except LockBusy as error:
            if not run.is_kept_out_by_itself(error.holder) or run.was_done(held.alias):
                raise
        return block.enter_context(dataclasses.replace(held, resumes=True))

    def busy(self, run: Delivery, error: LockBusy, held: Lock) -> Any:
        """Return the result of a run that did not get its lock, or raise; the mode decides."""
        if run.done_at is not None:
            return run.duplicate(held.literal_name)
        holder = error.holder
        reason = reason_of(holder)
        again = run.is_holder(holder) or self.on_busy == "retry"
        drops = self.on_busy == "skip" or callable(self.on_busy)
        if run.queued and (again or (drops and run.must_run and reason == "busy")):
            run.again(error, _remaining(holder, held))
        if callable(self.on_busy):
            return self.on_busy(error)
        if self.on_busy != "skip":
            raise error
        return skipped(reason, held.literal_name, holder)

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


def _remaining(holder: Holder | None, held: Lock) -> float:
    """Return the seconds until a lease ends unless it is renewed, by the database's clock."""
    if holder is None:
        return 0.0
    where = place(held.using or settings().USING)
    now = moment_of(where.run(backend_for(where.connection).clock))
    return max(0.0, (holder.expires_at - now).total_seconds())
