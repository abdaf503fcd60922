"""The life of a private broker, whatever its product: started, checked, stopped, removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from tests.databases import Unavailable
from tests.machine import die_with_parent, directories, first, shown, temp_root, unprivileged

STOP_LIMIT = 20.0


class PrivateBroker(ABC):
    """One broker on free ports of 127.0.0.1, with a folder of its own. Use it as a block."""

    start_limit: ClassVar[float] = 20.0
    users: ClassVar[tuple[str, ...]] = ()
    """Whom it may run as, if it refuses to run as root."""

    def __init__(self) -> None:
        self.url = ""
        self.unprivileged = unprivileged(self.users) if self.users else {}
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        name = f"distlock-{type(self).__name__.lower()}-"
        self.home = Path(tempfile.mkdtemp(prefix=name, dir=temp_root())).resolve()
        if self.unprivileged:
            os.chown(self.home, self.unprivileged["user"], self.unprivileged["group"])
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    @abstractmethod
    def launch(self) -> None:
        """Set the url, and start the processes on new ports: the broker last."""

    @abstractmethod
    def is_ours(self) -> bool:
        """Whether it is our broker that answers."""

    def _start(self) -> None:
        deadline = time.monotonic() + self.start_limit
        while time.monotonic() < deadline:
            self.launch()
            while time.monotonic() < deadline and self.processes[-1].poll() is None:
                if self.is_ours():
                    return
                time.sleep(0.05)
            self._end()
        log = (self.home / "log").read_text(errors="replace")
        raise Unavailable(f"{type(self).__name__} does not start: {log[-500:]}")

    def run(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        """Start one of its processes."""
        how: dict[str, Any] = {"env": environment, "start_new_session": True, **self.unprivileged}
        with open(self.home / "log", "ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
                **how,
            )
        self.processes.append(process)

    def _stop(self) -> None:
        try:
            self._end()
        finally:
            shutil.rmtree(self.home, ignore_errors=True)

    def _end(self) -> None:
        while self.processes:
            process = self.processes.pop()  # the broker first
            process.terminate()
            try:
                process.wait(STOP_LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_LIMIT)


def found(places: tuple[str, ...], *names: str) -> Path:
    """Return the first program of these names. Raises `Unavailable`."""
    among = directories(*places)
    path = first(among, *names)
    if path is None:
        raise Unavailable(f"no {names[0]} found (looked in {shown(among)})")
    return path
