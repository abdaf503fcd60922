"""A command that runs as a child process while a lock is held, and what wakes whoever waits for it.

# Note [One bell]
The main thread sleeps until something happens: a signal, the end of the child, or the loss of the
lock. Each is a byte on one socket. Python writes the number of every signal there, whichever thread
the system chose for it, and SIGCHLD is one of them; whoever learns of the loss writes a zero. So
nothing is polled for and nothing is missed.

# Note [Own session]
The child leads a session, and so a process group, of its own: what is sent to it reaches all that
it has started. Ctrl-C in a terminal comes to this process only and is passed on, once; in one group
the child would get it twice. Ctrl-Z does nothing: a holder that is stopped cannot renew its lease.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from ..deadlines import Deadline

if TYPE_CHECKING:
    from typing_extensions import Self

PASSED_ON = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
TOKEN = "DISTLOCK_TOKEN"
LOST = 0
AGAIN = 0.05
"""Seconds between two looks whether anything is left of a child's group that was told to end."""


class Bell:
    """What wakes the main thread; see Note [One bell]. Signals that are ignored stay so."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self._far.setblocking(False)
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup = -1
        self._mask: set[int] = set()
        self.for_child = False
        """Whether signals are the child's. Before and after it, they end this process."""
        self.had_child = False

    def __enter__(self) -> Self:
        self._wakeup = signal.set_wakeup_fd(self._far.fileno(), warn_on_full_buffer=False)
        heard = {*PASSED_ON, signal.SIGCHLD}  # a parent may have blocked them
        self._mask = set(signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)) & heard
        for number in (*PASSED_ON, signal.SIGTSTP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._heard)
        # Even if it was ignored: then the status of the child would be gone.
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, self._heard)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup)
        signal.pthread_sigmask(signal.SIG_BLOCK, self._mask)
        self._near.close()
        self._far.close()

    def tell_lost(self) -> None:
        """Ring for a lock that was lost. Any thread may call it."""
        with contextlib.suppress(OSError):  # nobody waits any more
            self._far.send(bytes([LOST]))

    def wait(self, timeout: float) -> bytes:
        """Sleep until something happens or the time is over, and return what there was."""
        self._near.settimeout(None if timeout == math.inf else timeout)
        try:
            return self._near.recv(4096)
        except (TimeoutError, BlockingIOError):
            return b""

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number in PASSED_ON and not self.for_child:
            raise SystemExit(128 + number)


class Child:
    """A command to be run under a lock; see Note [Own session].

    on_lost: the signal that ends it when the lock is lost, or `None`.
    kill_after: seconds after which what is left of it is killed then.
    """

    def __init__(
        self, command: Sequence[str], *, on_lost: signal.Signals | None, kill_after: float
    ) -> None:
        self._command = command
        self._on_lost = on_lost
        self._kill_after = kill_after

    def run(self, bell: Bell, token: int) -> int:
        """Run the command to its end and return its exit status, as a shell counts it.

        It finds the lock's fencing token in its environment.

        Raises `OSError` if it cannot be started.
        """
        bell.for_child = bell.had_child = True
        try:
            environ = {**os.environ, TOKEN: str(token)}
            process = subprocess.Popen(self._command, env=environ, start_new_session=True)
            try:
                return self._attend(process, bell)
            finally:
                if process.returncode is None:
                    _send(process.pid, signal.SIGKILL)
                    process.wait()
        finally:
            bell.for_child = False

    def _attend(self, process: subprocess.Popen[bytes], bell: Bell) -> int:
        lost, end = False, Deadline(None)
        while process.poll() is None:
            for number in bell.wait(end.left):
                if number in PASSED_ON:
                    _send(process.pid, number)
                elif number == LOST and self._on_lost and not lost:
                    lost, end = True, Deadline(self._kill_after)
                    _send(process.pid, self._on_lost)
            if not end.left:
                _send(process.pid, signal.SIGKILL)
                process.wait()
        if lost:
            _end_rest(process.pid, end)
        status = process.returncode
        return status if status >= 0 else 128 - status


def _end_rest(group: int, end: Deadline) -> None:
    """Let what a child has started end, too. While one is left, its number is not used again."""
    while end.left and _send(group, 0):
        time.sleep(AGAIN)
    _send(group, signal.SIGKILL)


def _send(group: int, number: int) -> bool:
    """Send a signal to a process group; `False` if there is none that it could reach."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # it is over, or has become another user's
        return False
    return True
