"""Where the time of a process goes: from when to when it was in the calls that count."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple
from unittest.mock import patch


class Span(NamedTuple):
    """One call: what, in which thread, and from when to when, on a clock that all share."""

    what: str
    thread: str
    begin: float
    end: float
    came: bool
    """Whether it returned anything."""


Calls = Mapping[str, tuple[type, str]]
"""By the name of a span the class and the method that it is of."""


def of_a_cycle() -> Calls:
    """What an acquire, its work and its release consist of, whoever sends the statements."""
    from django.db import connection
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.backends.utils import CursorWrapper

    from distlock.backends import backend_for

    backend = type(backend_for(connection))
    return {
        "grant": (backend, "grant"),
        "release": (backend, "release"),
        "statements": (CursorWrapper, "execute"),
        "commit": (BaseDatabaseWrapper, "_commit"),
        "autocommit": (BaseDatabaseWrapper, "set_autocommit"),
    }


def of_a_hand_over() -> Calls:
    """What lies between a release and the next grant."""
    from django.db import connection

    from distlock.backends import backend_for
    from distlock.ears import Ears
    from distlock.waiting import Sleeper

    return {
        "heard": (Ears, "heard"),
        "slept": (Sleeper, "sleep"),
        "grant": (type(backend_for(connection)), "grant"),
    }


@contextmanager
def recorded(calls: Calls) -> Iterator[list[Span]]:
    """Collect the spans of these calls. One that another of them makes belongs to that."""
    spans: list[Span] = []
    inside = threading.local()
    with ExitStack() as stack:
        for what, (owner, name) in calls.items():
            timed = _timed(what, getattr(owner, name), spans, inside)
            stack.enter_context(patch.object(owner, name, timed))
        yield spans


def _timed(
    what: str, original: Callable[..., Any], spans: list[Span], inside: threading.local
) -> Callable[..., Any]:
    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if getattr(inside, "call", False):
            return original(*args, **kwargs)
        inside.call, result, begin = True, None, time.monotonic()
        try:
            result = original(*args, **kwargs)
            return result
        finally:
            inside.call = False
            thread = threading.current_thread().name
            spans.append(Span(what, thread, begin, time.monotonic(), bool(result)))

    return call
