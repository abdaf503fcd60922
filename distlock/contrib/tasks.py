"""Django's own tasks: one run at a time, or one per key, with the same lock as everywhere else.

    @task()
    @single_instance
    def sync_account(account_id): ...

    @task(takes_context=True)
    @once("charge:{order_id}")
    def charge(context, order_id): ...

Both stand *under* `@task()`, that of `django.tasks` (Django 6) or of its backport `django-tasks`,
and take functions and coroutine functions. The holder that people see is the task, and with
`takes_context=True` its id.

# Note [No retry]
A task of Django's ends as successful or as failed, and cannot send itself again. So a busy lock is
a skip, which is a success with a dict as its result, or a wait in the worker, or `LockBusy`, which
is a failure that somebody sees. Where it can be told that the lock is the task's own, delivered a
second time after its worker died, a skip would lose the work: that is `LockBusy`, too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from importlib import import_module
from typing import Any

from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured

from .. import contexts, jobs
from ..arguments import Name
from ..decorators import Key, is_async, is_generator, name_of
from ..exceptions import AlreadyHeld, LockBusy
from ..locks import Lock, lock
from ..receipts import PREFIX
from ._canonical import canonical_name
from ._skipped import reason_of, skipped

OnBusy = str | Callable[[LockBusy], Any]
MODES = ("skip", "wait", "raise")


def _classes(name: str) -> tuple[type, ...]:
    found = []
    for module in ("django.tasks.base", "django_tasks.base"):
        with suppress(ModuleNotFoundError):
            found.append(getattr(import_module(module), name))
    return tuple(found)


TASKS, CONTEXTS = _classes("Task"), _classes("TaskContext")


def single_instance(
    function: Any = None, /, *, key: Name | None = None, on_busy: OnBusy = "skip", **how: Any
) -> Any:
    """Let only one run of a task with the same key go on at a time. Put it under `@task()`.

    key: the lock's name, with `{argument}` fields, or (by keyword) a callable of the bound
        arguments. Without one: the task's path and its arguments, the context left out.
    on_busy: "skip" ends as a success whose result is a dict with the key "distlock"; "wait" waits
        up to `wait` (10) seconds in the worker, and then raises `LockBusy`; "raise" does so at
        once: the task has failed; or a callable that gets the `LockBusy` and returns the result.
        There is no "retry"; see Note [No retry].
    ttl, renew, wait, min_hold, max_hold, atomic, using: as in `lock()`.

    Raises `ImproperlyConfigured` above `@task()`, and what `lock()` raises.
    """
    function, key = _bare(function, key)
    if on_busy == "retry":
        raise ValueError(
            "A task of django.tasks cannot send itself again, so on_busy cannot be 'retry'. Use "
            '"wait", or "raise" and enqueue it again where the failure is noticed.'
        )
    if not callable(on_busy) and on_busy not in MODES:
        raise ValueError(f"on_busy must be one of {MODES} or a callable, not {on_busy!r}.")
    described = lock("task", **how)
    if on_busy != "wait":
        described = dataclasses.replace(described, wait=0.0)
    decorate = functools.partial(_single, described, key, on_busy)
    return decorate if function is None else decorate(function)


def once(function: Any = None, /, *, key: Name | None = None, **how: Any) -> Any:
    """Run a task once per key; a later one gets the result that is stored. Put it under `@task()`.

    key: 1 to 250 characters, with `{argument}` fields, or (by keyword) a callable of the bound
        arguments. Without one: the task's path and its arguments, the context left out.
    keep, atomic, wait, ttl, on_duplicate, every, using: as in `distlock.once()`. With
        `on_duplicate="skip"` a duplicate is a success whose result is a dict with the key
        "distlock". Where another run is not done when the wait is over, `LockBusy`: it has failed.

    The result must be plain JSON, as that of every task: else `TypeError`, and nothing is
    committed. Raises `ImproperlyConfigured` above `@task()`, and what `distlock.once()` raises.
    """
    function, key = _bare(function, key)
    decorate = functools.partial(_once, jobs.once("task", **how), key)
    return decorate if function is None else decorate(function)


def _single(described: Lock, key: Name | None, on_busy: OnBusy, function: Any) -> Any:
    keys = _keys("single_instance", function, key)
    if is_generator(function):
        raise TypeError(f"{name_of(function)} is a generator: its body would run after the lock.")
    if is_async(function):
        described.refuse_atomic("A decorated coroutine function")

        @functools.wraps(function)
        async def arun_alone(*args: Any, **kwargs: Any) -> Any:
            held = described.named(keys.of(args, kwargs))
            async with AsyncExitStack() as block:
                block.enter_context(_shown(function, args))
                try:
                    await block.enter_async_context(held)
                except (LockBusy, AlreadyHeld) as error:
                    return await sync_to_async(_busy)(error, held, on_busy)
                return await function(*args, **kwargs)

        return arun_alone

    @functools.wraps(function)
    def run_alone(*args: Any, **kwargs: Any) -> Any:
        held = described.named(keys.of(args, kwargs))
        with ExitStack() as block:
            block.enter_context(_shown(function, args))
            try:
                block.enter_context(held)
            except (LockBusy, AlreadyHeld) as error:
                return _busy(error, held, on_busy)
            return function(*args, **kwargs)

    return run_alone


def _busy(error: LockBusy | AlreadyHeld, held: Lock, on_busy: OnBusy) -> Any:
    """Return the result of a task that did not get its lock, or raise; the mode decides."""
    if on_busy in ("wait", "raise"):
        raise error
    if isinstance(error, AlreadyHeld):  # a task that is run at once where it is enqueued can nest
        error = LockBusy(str(error), name=error.name, holder=held.holder())
    mine = contexts.caller.get()
    if mine.endswith("]") and error.holder is not None and error.holder.thread == mine:
        raise error  # see Note [No retry]
    if callable(on_busy):
        return on_busy(error)
    return skipped(reason_of(error.holder), held.literal_name, error.holder)


class _Body:
    """One call of a task's function, named like it, for the admin; `ran` tells whether it came."""

    def __init__(self, function: Any, args: Any, kwargs: Any) -> None:
        self.ran = False
        self.__module__ = function.__module__
        self.__qualname__ = name_of(function)
        self._call = functools.partial(function, *args, **kwargs)

    def __call__(self) -> Any:
        self.ran = True
        return self._checked(self._call())

    def _checked(self, result: Any) -> Any:
        try:
            json.dumps(result, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{self.__qualname__} returned what is no plain JSON, as the result of a task must "
                f"be: {error}. There is no receipt, and it will run again."
            ) from error
        return result


class _AsyncBody(_Body):
    async def __call__(self) -> Any:
        self.ran = True
        return self._checked(await self._call())


def _once(described: jobs.Once, key: Name | None, function: Any) -> Any:
    keys = _keys("once", function, key)
    described(function)  # it refuses what cannot be run once
    skips = described.on_duplicate == "skip"

    if is_async(function):

        @functools.wraps(function)
        async def arun_once(*args: Any, **kwargs: Any) -> Any:
            name, body = keys.of(args, kwargs), _AsyncBody(function, args, kwargs)
            with _shown(function, args):
                result = await dataclasses.replace(described, key=name).arun(body)
            return skipped("done", PREFIX + name) if skips and not body.ran else result

        return arun_once

    @functools.wraps(function)
    def run_once(*args: Any, **kwargs: Any) -> Any:
        name, body = keys.of(args, kwargs), _Body(function, args, kwargs)
        with _shown(function, args):
            result = dataclasses.replace(described, key=name).run(body)
        return skipped("done", PREFIX + name) if skips and not body.ran else result

    return run_once


def _bare(function: Any, key: Name | None) -> tuple[Any, Name | None]:
    """Return the function of a decorator without arguments, and the key of one with."""
    return (None, function) if isinstance(function, str) else (function, key)


def _keys(decorator: str, function: Any, key: Name | None) -> Key:
    if isinstance(function, TASKS):
        raise ImproperlyConfigured(
            f"{decorator} goes under @task(), next to the function:\n"
            f"    @task()\n    @{decorator}\n    def function(...): ..."
        )
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{decorator} decorates functions, not {function!r}.")
    if not (key is None or isinstance(key, str) or callable(key)):
        raise TypeError(f"key must be a str or a callable, not {type(key).__name__}.")

    def by_default(arguments: Mapping[str, Any]) -> str:
        own = {name: value for name, value in arguments.items() if not isinstance(value, CONTEXTS)}
        return canonical_name(_path(function), own, jobs.LONGEST_BUCKETED)

    return Key(by_default if key is None else key, function, "key")


def _path(function: Any) -> str:
    return f"{function.__module__}.{name_of(function)}"


@contextmanager
def _shown(function: Any, args: tuple[Any, ...]) -> Iterator[None]:
    """Show the task, and its id if that is known, as the holder of the locks of the block."""
    context: Any = args[0] if args and isinstance(args[0], CONTEXTS) else None
    identity = "" if context is None else f"[{context.task_result.id}]"
    token = contexts.caller.set(f"task {_path(function)[: 250 - len(identity)]}{identity}")
    try:
        yield
    finally:
        contexts.caller.reset(token)
