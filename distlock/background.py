"""The life of background threads: started when first needed, fork-safe, stopped at exit.

One of ours sleeps until the moment that its last step named, or until it is woken. A step that
raises is logged, and the thread goes on. What is the user's runs in other threads, a few at a time;
the process ends without waiting for those.

# Note [Fork]
A child has none of its parent's threads, and shares its parent's sockets: one byte of protocol on
them, a farewell included, ends the parent's session. So a child forgets everything that this
library made and closes nothing. Each module with such state registers `forget` through
`after_fork`.

# Note [Collected]
The collector may run at any allocation, in any thread, and so may a signal handler. What they end,
a lease or a coroutine that nobody has any more, stops its renewals or leaves its line. So the
mutexes that they may come to are reentrant: at worst a step fails, and is tried again, where
otherwise a thread would wait for itself.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Protocol
from weakref import WeakSet

from django.db import connections

from .events import log

RETRY = 1.0
"""Seconds until a step that raised is tried again."""

SIGNAL = "distlock-signal"
"""The name of the threads that send signals."""
FEW = 8
"""Such threads at a time, while none of them hangs."""
MOST = 64
"""Such threads at a time."""
STUCK = 1.0
"""Seconds without the begin of another call after which there is one thread more."""


class Bell(Protocol):
    """What a thread sleeps by: an event, or what can wake it for other reasons, too."""

    def set(self) -> None:
        """Wake the thread, or keep it from going to sleep."""

    def clear(self) -> None:
        """Let it sleep the next time."""

    def wait(self, timeout: float) -> object:
        """Sleep that many seconds, or until it is woken."""


class Background:
    """One thread that calls `step` again and again. `step` returns the seconds until the next."""

    def __init__(
        self,
        name: str,
        step: Callable[[], float],
        at_exit: Callable[[], None],
        bell: Bell | None = None,
    ) -> None:
        self._name = name
        self._step = step
        self._at_exit = at_exit
        self._mutex = threading.Lock()
        self._wake: Bell = bell or threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def ensure_started(self) -> None:
        """Start the thread if it does not run. Raises nothing: a lease works without renewals."""
        if self.is_alive:
            return
        with self._mutex:
            if self._stopping or self.is_alive:
                return
            self._warn_about_uwsgi()
            if self._thread is None:
                atexit.register(self.stop)
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads, or the interpreter is ending
                text = "thread_not_started: the %s thread cannot start: leases end after their ttl"
                log(logging.ERROR, text, thread_name=self._name, exc_info=True)
                return
            self._thread = thread
            _threads.add(self)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def wake(self) -> None:
        """Let the next step begin now."""
        self._wake.set()

    def stop(self, timeout: float = 2.0) -> None:
        """End the thread; harmless if it was never started or has stopped."""
        self._stopping = True
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
        self._at_exit()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                delay = self._step()
            except Exception:
                text = "thread_failed: the %s thread goes on after an error"
                log(logging.ERROR, text, thread_name=self._name, exc_info=True)
                delay = RETRY
            self._wake.wait(delay)

    def _warn_about_uwsgi(self) -> None:
        try:
            import uwsgi  # type: ignore[import-untyped]  # made by uWSGI itself
        except ImportError:
            return
        if not uwsgi.opt.get("enable-threads") and not uwsgi.opt.get("threads"):
            warnings.warn(
                "uWSGI runs without threads, so distlock cannot renew leases: they end after "
                "their ttl. Start uWSGI with --enable-threads.",
                RuntimeWarning,
                stacklevel=2,
            )


_threads: WeakSet[Background] = WeakSet()


def look_at_the_time() -> None:
    """Wake every thread: a test has moved the clock on."""
    for thread in list(_threads):
        thread.wake()


def after_fork(forget: Callable[[], None]) -> None:
    """Call `forget` in every forked child; see Note [Fork]."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget)


class Messengers:
    """A few threads that call functions of the user's, so that none of those can stop ours.

    Each ends when nothing waits to be called. As a function may hang, or wait for one that comes
    later, there is one thread more for every `STUCK` seconds in which none has had time for the
    next, up to `MOST`.
    """

    def __init__(self) -> None:
        self._mutex = threading.RLock()  # reentrant: a signal handler may find a loss
        self._waiting: deque[Callable[[], object]] = deque()
        self._threads: set[threading.Thread] = set()
        self._watcher: threading.Thread | None = None
        self._begun = 0

    def send(self, function: Callable[[], object]) -> None:
        """Let a function be called, and do not wait for that."""
        try:
            with self._mutex:
                self._waiting.append(function)
                if len(self._threads) < FEW:
                    self._threads.add(_started(self._call_all))
                elif self._watcher is None:
                    self._watcher = _started(self._watch)
        except RuntimeError:  # no more threads, or the interpreter is ending
            if not self._threads:
                with suppress(ValueError):
                    self._waiting.remove(function)
                log(logging.ERROR, "signal_not_sent: there are no more threads", exc_info=True)

    def _call_all(self) -> None:
        while (function := self._next()) is not None:
            copy_context().run(_call, function)

    def _next(self) -> Callable[[], object] | None:
        with self._mutex:
            if self._waiting:
                self._begun += 1
                return self._waiting.popleft()
            self._threads.discard(threading.current_thread())
            return None

    def _watch(self) -> None:
        """Start one more thread whenever none has begun another call for a while."""
        begun = -1
        while True:
            with self._mutex:
                if not self._waiting:
                    self._watcher = None
                    return
                stuck, begun = begun == self._begun, self._begun
                waiting, threads = len(self._waiting), len(self._threads)
                if stuck and threads < MOST:
                    with suppress(RuntimeError):
                        self._threads.add(_started(self._call_all))
            if stuck and threads < MOST:
                text = "signal_delayed threads=%d waiting=%d: receivers hang"
                log(logging.WARNING, text, threads=threads, waiting=waiting)
            time.sleep(STUCK)


def _started(target: Callable[[], None]) -> threading.Thread:
    """Return a new thread. Raises `RuntimeError` if there can be no more."""
    thread = threading.Thread(target=target, name=SIGNAL, daemon=True)
    thread.start()
    return thread


def _call(function: Callable[[], object]) -> None:
    try:
        try:
            function()
        finally:
            connections.close_all()
    except BaseException:  # also what would end the thread: others wait to be called
        text = "thread_failed: the %s thread goes on after an error"
        log(logging.ERROR, text, thread_name=SIGNAL, exc_info=True)


_messengers = Messengers()


def soon(function: Callable[[], object]) -> None:
    """Call a function of the user's in a thread that is not ours, and not the caller's."""
    _messengers.send(function)


def _forget() -> None:
    _messengers.__init__()  # type: ignore[misc]


after_fork(_forget)
