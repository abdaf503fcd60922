"""A block of a test: for `with` and `async with`, and as a decorator of plain and async tests."""

from __future__ import annotations

import copy
import functools
import os
from types import TracebackType
from typing import Any, Generic, TypeVar

from asgiref.sync import iscoroutinefunction, sync_to_async
from django.test import utils

T = TypeVar("T")


class Block(Generic[T]):
    """What begins with `_enter`, which returns what `as` names, and ends with `_leave`."""

    def _enter(self) -> T:
        raise NotImplementedError

    def _leave(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> T:
        return self._enter()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave()

    async def __aenter__(self) -> T:
        return await sync_to_async(self._enter)()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await sync_to_async(self._leave)()

    def __call__(self, function: Any) -> Any:
        """Decorate a test: each call runs in a block of its own."""
        if not callable(function) or isinstance(function, type):
            raise TypeError(
                f"This decorates functions, not {function!r}. For all tests of a class enter the "
                "block in setUp(): self.enterContext(...)."
            )
        if iscoroutinefunction(function):

            @functools.wraps(function)
            async def ainside(*args: Any, **kwargs: Any) -> Any:
                async with copy.copy(self):
                    return await function(*args, **kwargs)

            return ainside

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with copy.copy(self):
                return function(*args, **kwargs)

        return inside


def refuse_in_production(what: str) -> None:
    """Raise `RuntimeError` unless Django's test environment is set up, or pytest runs."""
    under_django = hasattr(getattr(utils, "_TestState", None), "saved_data")
    if not (under_django or {"PYTEST_VERSION", "PYTEST_CURRENT_TEST"} & os.environ.keys()):
        raise RuntimeError(
            f"{what} is for tests only, and this process runs none. A test runner of your own "
            "calls django.test.utils.setup_test_environment() first."
        )
