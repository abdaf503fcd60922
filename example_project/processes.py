"""Child processes that are always ended: by their own id, politely, and then for certain."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

STOP_LIMIT = 15.0
START_LIMIT = 60.0


class DidNotStart(Exception):
    """A child ended, or was not ready in time; the message has the end of its log."""


class Child:
    """A process in a group of its own, so that Ctrl-C in the terminal is for its parent alone."""

    def __init__(self, name: str, arguments: str, folder: Path, environ: Mapping[str, str]) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *arguments.split()],
                cwd=Path(__file__).resolve().parent.parent,
                env={**os.environ, **environ, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def said(self) -> str:
        """Return its log."""
        return self._log.read_text(errors="replace")

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Return when `ready()`. Raises `DidNotStart`."""
        deadline = time.monotonic() + START_LIMIT
        while not ready():
            if not self.alive or time.monotonic() > deadline:
                raise DidNotStart(f"{self.name} did not start:\n{self.said()[-3000:]}")
            time.sleep(0.1)

    def wait_until_it_says(self, text: str) -> None:
        """Return when the log has the text. Raises `DidNotStart`."""
        self.wait_until(lambda: text in self.said())

    def ask_to_stop(self) -> None:
        """Send TERM: a worker then finishes what it is doing."""
        if self.alive:
            self._process.terminate()

    def stop(self) -> None:
        """End it, and everything that it may have left behind. Returns in bounded time."""
        self.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_LIMIT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_LIMIT)


def _end_with_parent() -> None:
    """In the child, on Linux: have the kernel send TERM if the parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
