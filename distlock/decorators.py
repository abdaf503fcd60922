"""The one engine that wraps functions: the key from the call's arguments, then the block."""

from __future__ import annotations

import functools
import inspect
import string
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction

from .exceptions import LockBusy

if TYPE_CHECKING:
    from .locks import Lock


def wrap(lock: Lock, function: Any) -> Any:
    """Return `function` under the lock that its arguments name.

    Raises `TypeError` for what is not a plain function, and `ValueError` for a `{field}` that is
    no argument of it.
    """
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"lock() decorates functions, not {function!r}.")
    if is_generator(function):
        raise TypeError(
            f"{name_of(function)} is a generator: the lock would be released before its body runs. "
            "Use a with block inside it."
        )
    key = Key(lock.name, function)
    if is_async(function):
        lock.refuse_atomic("a decorated coroutine function")

        @functools.wraps(function)
        async def alocked(*args: Any, **kwargs: Any) -> Any:
            async with AsyncExitStack() as block:
                try:
                    await block.enter_async_context(lock.named(key.of(args, kwargs)))
                except LockBusy:
                    if lock.on_busy == "skip":
                        return None
                    raise
                return await function(*args, **kwargs)

        return alocked

    @functools.wraps(function)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as block:
            try:
                block.enter_context(lock.named(key.of(args, kwargs)))
            except LockBusy:
                if lock.on_busy == "skip":
                    return None
                raise
            return function(*args, **kwargs)

    return locked


def is_async(function: Any) -> bool:
    """Whether a call returns a coroutine."""
    return iscoroutinefunction(function) or iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )


def is_generator(function: Any) -> bool:
    """Whether a call only makes a generator, whose body runs later."""
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


class Key:
    """A lock's name as a function of a call: a template or a callable of the bound arguments.

    `argument`: what the user calls it, for the errors.
    """

    def __init__(
        self,
        name: str | Callable[[Mapping[str, Any]], str],
        function: Any,
        argument: str = "name",
    ) -> None:
        self._name = name
        self._argument = argument
        self._function = function
        self._signature = inspect.signature(function)
        self._constant: str | None = None
        if isinstance(name, str):
            fields = self._fields(name)
            if not fields:
                self._constant = name.format()

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return the name for a call. Raises `TypeError` for arguments that do not fit."""
        if self._constant is not None:
            return self._constant
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if isinstance(self._name, str):
            return self._name.format(**bound.arguments)
        return self._name(bound.arguments)

    def _fields(self, template: str) -> set[str]:
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(
                f"{self._argument} {template!r} is not a template: {error}. In a decorator a "
                "brace is written twice to stand for itself."
            ) from None
        fields = {
            field.partition(".")[0].partition("[")[0]
            for _, field, *_ in parsed
            if field is not None
        }
        if unknown := fields - set(self._signature.parameters):
            raise ValueError(
                f"{self._argument} {template!r} has the field {{{min(unknown)}}}, which is no "
                f"argument of {name_of(self._function)}{self._signature}."
            )
        return fields


def name_of(function: Any) -> str:
    """Return what people call a function."""
    return getattr(function, "__qualname__", repr(function))
