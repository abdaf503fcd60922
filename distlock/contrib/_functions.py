"""Which functions can be the body of a Celery task under one of our decorators."""

from __future__ import annotations

from typing import Any

from celery import Task
from celery.local import Proxy
from django.core.exceptions import ImproperlyConfigured

from ..decorators import is_async, is_generator, name_of


def refuse(decorator: str, function: Any) -> None:
    """Raise `ImproperlyConfigured` for a task, and `TypeError` for what is no plain function."""
    if issubclass(type(function), Task | Proxy):  # not isinstance(), which evaluates a proxy
        raise ImproperlyConfigured(
            f"{decorator} goes under Celery's decorator:\n"
            f"    @shared_task\n    @{decorator}\n    def task(...): ..."
        )
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{decorator} decorates functions, not {function!r}.")
    if is_async(function) or is_generator(function):
        raise TypeError(
            f"{name_of(function)} is async or a generator: its body would run after the lock was "
            "released."
        )
