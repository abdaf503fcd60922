"""`once(key)`: a job that is done runs no second time. A lease, and a receipt in the same database.

What one call does stands in `calls.py`, and who may write a receipt in `receipts.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar, overload

from asgiref.sync import sync_to_async

from .arguments import DEFAULT, LONGEST_NAME, Default, Name, checked_key, checked_name, flag_of
from .calls import LONGEST_BUCKET, Call
from .deadlines import Seconds, seconds
from .decorators import Key, is_async, is_generator, name_of
from .locks import Lock, lock
from .receipts import PREFIX

P = ParamSpec("P")
R = TypeVar("R")

LONGEST_KEY = LONGEST_NAME - len(PREFIX)
LONGEST_BUCKETED = LONGEST_KEY - LONGEST_BUCKET


def once(
    key: Name,
    *,
    keep: Seconds = 86400,
    atomic: bool = True,
    wait: Seconds | Default | None = DEFAULT,
    ttl: Seconds | Default = DEFAULT,
    on_duplicate: Literal["return", "skip", "raise"] = "return",
    every: Seconds | None = None,
    using: str | None = None,
) -> Once:
    """Describe a job that runs once per key: as a decorator, or with `run()` and `arun()`.

    The first call runs. One that comes meanwhile waits for it; it, and those that come later, do
    not run and get the result that is stored. A body that raises leaves nothing behind: the next
    call runs.

    key: 1 to 250 characters (212 with `every`), compared exactly. In a decorator it may hold
        `{argument}` fields, or be a callable that gets the bound arguments as a dict. Put in all
        that tells two jobs apart.
    keep: how long the receipt counts, in seconds or as a `timedelta`.
    atomic: run the body in a transaction that commits together with the receipt: what it does in
        this database happens exactly once. `False`: at least once, and it must be for coroutines.
    wait: how long to wait for another call that is running (10); then `LockBusy`.
    ttl: how long its lock lasts after the last renewal (30): what a dead process holds others up.
    on_duplicate: "return" the stored result, "skip" and return `None`, or "raise" `JobDuplicate`.
    every: once in each such span of time, at least a second, counted from 1970 in UTC on the
        database's clock: `timedelta(hours=1)` is once per hour. The receipt is kept that long.
    using: the database alias.

    The result must be what JSON can express, with Django's encoder; else `TypeError`, and nothing
    is committed. A call raises `LockBusy` when the wait is over, `JobDuplicate` where that is asked
    for, and what the body raises. Raises `ValueError` or `TypeError` that names a bad argument.
    """
    span = None if every is None else _checked_every(every)
    return Once(
        key=checked_key(key, "key", LONGEST_KEY if span is None else LONGEST_BUCKETED),
        keep=max(seconds(keep, "keep", positive=True), span or 0.0),
        atomic=flag_of(atomic, "atomic") or False,
        on_duplicate=_checked_on_duplicate(on_duplicate),
        every=span,
        lock=lock(PREFIX, wait=wait, ttl=ttl, using=using),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Once:
    """A description, made by `once()`. Holds nothing; safe to share between threads."""

    key: Name
    keep: float
    atomic: bool
    on_duplicate: str
    every: float | None
    lock: Lock

    @overload
    def __call__(self, function: Callable[P, R]) -> Callable[P, R]: ...

    @overload
    def __call__(self, function: Any) -> Any: ...

    def __call__(self, function: Any) -> Any:
        """Decorate a function: it runs once per key that its arguments give.

        Raises `TypeError` for what is not a plain function, and for a coroutine function unless
        `atomic=False`; `ValueError` for a `{field}` that is no argument.
        """
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"once() decorates functions, not {function!r}.")
        _refuse_generator(function)
        key = Key(self.key, function, "key")
        if is_async(function):
            self._refuse_async(function)

            @functools.wraps(function)
            async def aonce(*args: Any, **kwargs: Any) -> Any:
                body = partial(function, *args, **kwargs)
                return await Call(self, key.of(args, kwargs), body, function).arun()

            return aonce

        @functools.wraps(function)
        def done_once(*args: Any, **kwargs: Any) -> Any:
            body = partial(function, *args, **kwargs)
            return Call(self, key.of(args, kwargs), body, function).run()

        return done_once

    def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function unless that was done before; return its result, or the stored one.

        Raises `LockBusy` if another call is still running when the wait is over, and what the
        function raises.
        """
        _refuse_generator(function)
        if is_async(function):
            raise TypeError(f"{name_of(function)} is a coroutine function: await arun() instead.")
        body = partial(function, *args, **kwargs)
        result: R = Call(self, self._literal_key(function), body, function).run()
        return result

    @overload
    async def arun(
        self, function: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...

    @overload
    async def arun(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    async def arun(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a coroutine function unless that was done before; see `run`.

        A plain function is run in the thread of the task's synchronous code, and may be atomic.
        """
        if not is_async(function):
            return await sync_to_async(self.run)(function, *args, **kwargs)
        self._refuse_async(function)
        body = partial(function, *args, **kwargs)
        return await Call(self, self._literal_key(function), body, function).arun()

    def checked(self, key: str) -> str:
        """Return a key of a call, checked."""
        return checked_name(key, "key", LONGEST_KEY if self.every is None else LONGEST_BUCKETED)

    def _literal_key(self, function: Any) -> str:
        """Return the key of a single call, in which braces stand for themselves."""
        if not isinstance(self.key, str):
            raise TypeError("A key that is a callable can only be used in a decorator.")
        if "{" in self.key:
            fields = [f"{{{name}}}" for name in inspect.signature(function).parameters]
            if found := [field for field in fields if field in self.key]:
                raise ValueError(
                    f"key {self.key!r} has the field {found[0]}, which only a decorator fills in: "
                    "all calls would count as one. Use an f-string."
                )
        return self.key

    def _refuse_async(self, function: Any) -> None:
        if self.atomic:
            raise TypeError(
                f"{name_of(function)} is a coroutine function, and Django has no transactions "
                "across an await. Pass atomic=False, and it runs at least once; or await arun() "
                "with a plain function, which runs in a transaction in a thread."
            )


def _refuse_generator(function: Any) -> None:
    if is_generator(function):
        raise TypeError(
            f"{name_of(function)} is a generator: it would count as done before its body runs."
        )


def _checked_every(every: Seconds) -> float:
    span = seconds(every, "every")
    if span < 1:
        raise ValueError(f"every must be at least a second, not {every!r}.")
    return span


def _checked_on_duplicate(on_duplicate: str) -> str:
    if on_duplicate not in ("return", "skip", "raise"):
        raise ValueError(f'on_duplicate must be "return", "skip" or "raise", not {on_duplicate!r}.')
    return on_duplicate
