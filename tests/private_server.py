"""The life of a private server, whatever its product: made, started, checked, stopped, removed.

It counts as started only when the answer on its port comes from *our* data directory and *our* pid,
and it is stopped by that pid and by nothing else. Every wait has an end.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from tests.databases import Unavailable, query, version
from tests.machine import die_with_parent, free_port, temp_root, unprivileged

START_LIMIT = 60.0
STOP_LIMIT = 20.0
USER = "distlock"
DATABASES = ("distlock", "distlock_other")


class Server(ABC):
    """One server. Call ``start()`` and, whatever happens then, ``stop()``; or use ``with``.

    Making one raises ``Unavailable`` where no server can run. ``durable`` keeps the settings that
    survive a crash of the machine; without it commits do not wait for the disk.
    """

    scheme: ClassVar[str]
    users: ClassVar[tuple[str, ...]]
    stop_signal: ClassVar[signal.Signals]
    maintenance: ClassVar[str]  # a database that every server has
    directory_query: ClassVar[str]
    databases: ClassVar[tuple[str, ...]] = DATABASES  # made at the first start

    def __init__(self, *, durable: bool = False) -> None:
        self.durable = durable
        self.find_binaries()
        self.unprivileged = unprivileged(self.users)
        self.password = secrets.token_hex(8)
        self.port = 0
        self.home: Path | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        """What the server process gets besides the usual; set it before ``start()``."""

    @abstractmethod
    def find_binaries(self) -> None:
        """Remember the binaries, or raise ``Unavailable``."""

    @abstractmethod
    def create_data(self) -> None:
        """Fill the data directory of a new server."""

    @abstractmethod
    def command(self) -> list[str]:
        """The command that serves the data directory on ``self.port``, in the foreground."""

    @property
    @abstractmethod
    def pid_file(self) -> Path: ...

    @property
    def data(self) -> Path:
        if self.home is None:
            raise Unavailable("the server has not been started")
        return self.home / "data"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{USER}:{self.password}@127.0.0.1:{self.port}/{DATABASES[0]}"

    @property
    def pid(self) -> int:
        if self.process is None:
            raise Unavailable("the server is not running")
        return self.process.pid

    @property
    def version(self) -> str:
        return version(self.url)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Return when the server answers. After ``kill()`` it starts again on its port and data."""
        try:
            fresh = self.home is None
            if fresh:
                self.home = self._make_home()
                self.create_data()
            self._start_on(None if fresh else self.port)
            for name in self.databases if fresh else ():
                query(self.url, f"CREATE DATABASE {name}", name=self.maintenance)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server by its pid and remove its folder. Harmless when nothing runs."""
        try:
            self._end(self.stop_signal)
        finally:
            if self.home is not None:
                shutil.rmtree(self.home, ignore_errors=True)
            self.home = None

    def kill(self) -> None:
        """End it as a crash would; port and data stay for ``start()``."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop it in good order and start it again on the same port and data."""
        self._end(self.stop_signal)
        self.start()

    def is_ours(self) -> bool | None:
        """Whether it is our process that answers on the port; None while nobody answers well."""
        try:
            row = query(self.url, self.directory_query, name=self.maintenance)
            if row is None or Path(row[0]).resolve() != self.data:
                return False
            return self.pid_file.read_text().split()[0] == str(self.pid) or None
        except Unavailable:
            raise
        except Exception:  # a driver's own error, or a file that is not written yet
            return None

    def _make_home(self) -> Path:
        home = Path(tempfile.mkdtemp(prefix="distlock-", dir=temp_root())).resolve()
        if self.unprivileged:
            os.chown(home, self.unprivileged["user"], self.unprivileged["group"])
        return home

    def _start_on(self, port: int | None) -> None:
        deadline = time.monotonic() + START_LIMIT
        while True:
            self.port = port or free_port()
            if self._attempt(deadline):
                return
            self.kill()
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.command()[0]} does not start: {self.log_tail()}")
            time.sleep(0.5)

    def _attempt(self, deadline: float) -> bool:
        with open(self.data.parent / "log", "ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, preexec_fn=die_with_parent, **self._child()
            )
        while time.monotonic() < deadline and self.process.poll() is None:
            ours = self.is_ours()
            if ours is not None:
                return ours
            time.sleep(0.05)
        return False

    def _end(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        try:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_LIMIT)
        finally:  # too slow, or interrupted while waiting
            process.kill()
            process.wait(STOP_LIMIT)

    def _child(self) -> dict[str, Any]:
        return {
            "stdin": subprocess.DEVNULL,
            "cwd": self.home,
            "env": {
                "PATH": os.defpath,
                "LC_ALL": "C",
                "HOME": str(self.home),
                # MariaDB removes the temporary tables that it finds in a shared one as it starts.
                "TMPDIR": str(self.home),
                **self.environment,
            },
            # Ctrl-C is for the tests; whoever runs them stops the server afterwards.
            "start_new_session": True,
            **self.unprivileged,
        }

    def _prepare(self, *command: object) -> None:
        """Run a command that makes the data directory."""
        words = [str(word) for word in command]
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=START_LIMIT, **self._child()
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{words[0]} failed: {error}") from error
        if done.returncode:
            raise Unavailable(f"{words[0]} failed: {(done.stderr or done.stdout).strip()[-300:]}")

    def log_tail(self) -> str:
        """The last lines that the server wrote."""
        lines = (self.data.parent / "log").read_text(errors="replace").splitlines()
        return " / ".join(lines[-5:])
