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


def name_of_caller() -> str:
    """Return what to record as the holder, or "" for the thread's name."""
    task = _running_task()
    return caller.get() or (task.get_name() if task else "")


class Context:
    """The terms that a thread or task holds."""

    def __init__(self) -> None:
        self.held: dict[Key, Term] = {}

    def holds(self, key: Key) -> bool:
        """Whether this thread or task has a lease, and has not lost it."""
        term = self.held.get(key)
        return term is not None and not (term.lost or term.over)

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
    task = _running_task()
    if task is None:
        return _threads.context
    return _tasks.setdefault(task, Context())


def _running_task() -> asyncio.Task[object] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _forget() -> None:
    global _threads
    _threads = _Threads()
    _tasks.clear()


after_fork(_forget)
