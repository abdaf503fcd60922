"""The life of one background thread: started when first needed, fork-safe, stopped at exit.

A thread sleeps until the moment that its last step named, or until it is woken. A step that
raises is logged, and the thread goes on.

# Note [Fork]
A child has none of its parent's threads, and shares its parent's sockets: one byte of protocol on
them, a farewell included, ends the parent's session. So a child forgets everything that this
library made and closes nothing. Each module with such state registers `forget` through
`after_fork`.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import warnings
from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet

from django.db import connections

from .events import log

RETRY = 1.0
"""Seconds until a step that raised is tried again."""


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


def soon(function: Callable[[], object]) -> None:
    """Call a function of the user's on a thread of its own, so that it cannot stop ours."""

    def run() -> None:
        try:
            function()
        finally:
            connections.close_all()

    try:
        threading.Thread(target=run, name="distlock-signal", daemon=True).start()
    except RuntimeError:
        log(logging.ERROR, "signal_not_sent: there are no more threads", exc_info=True)
