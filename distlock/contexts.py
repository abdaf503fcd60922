"""What one thread or asyncio task holds: for nesting, and against waiting for oneself.

It belongs to the thread or the `asyncio.Task` itself and never to a context variable: those are
inherited by tasks and threads that hold nothing.
"""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from weakref import WeakKeyDictionary

from .background import after_fork
from .terms import Key, Term

caller: ContextVar[str] = ContextVar("distlock_caller", default="")
"""What to record as the holder instead of the thread's name: a task with its id."""


class Context:
    """The terms that a thread or task holds."""

    def __init__(self) -> None:
        self.held: dict[Key, Term] = {}

    def remember(self, term: Term) -> None:
        """Note that a term is held here."""
        self.held[term.key] = term

    def forget(self, term: Term) -> None:
        """Note that a term is not held any more; another one of its name stays."""
        if self.held.get(term.key) is term:
            self.held.pop(term.key, None)


class _Threads(threading.local):
    def __init__(self) -> None:
        self.context = Context()


_threads = _Threads()
_tasks: WeakKeyDictionary[asyncio.Task[object], Context] = WeakKeyDictionary()


def current() -> Context:
    """Return the context of the running task, or of this thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    if task is None:
        return _threads.context
    return _tasks.setdefault(task, Context())


def _forget() -> None:
    global _threads
    _threads = _Threads()
    _tasks.clear()


after_fork(_forget)
