"""The processes under torture, on a server of their own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Workers:
    """A number of processes that run the same command, kept at that number."""

    def __init__(self, url: str, folder: Path) -> None:
        self._environment = {
            **os.environ,
            "DISTLOCK_TEST_URL": url,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
        }
        self.folder = folder
        self._said = (folder / "workers.log").open("wb")
        self._running: dict[subprocess.Popen[bytes], list[str]] = {}

    def manage(self, *arguments: str) -> None:
        """Run a management command on the server."""
        code = (
            "import sys; from django.core.management import execute_from_command_line as e; "
            "e(['manage.py', *sys.argv[1:]])"
        )
        command = [sys.executable, "-c", code, *arguments]
        subprocess.run(command, cwd=ROOT, env=self._environment, check=True, timeout=120)

    def start(self, *command: object) -> None:
        """Start `python -m COMMAND`."""
        words = [sys.executable, "-m", *map(str, command)]
        self._running[self._begin(words)] = words

    def any(self) -> subprocess.Popen[bytes]:
        """Return one of them, at random."""
        return random.choice(list(self._running))

    def replace(self, worker: subprocess.Popen[bytes]) -> None:
        """Kill one and start another."""
        worker.send_signal(signal.SIGKILL)
        worker.wait(10)
        words = self._running.pop(worker)
        self._running[self._begin(words)] = words

    def finish(self, limit: float) -> None:
        """Tell all to stop, and wait until they have ended by themselves."""
        (self.folder / "stop").touch()
        deadline = time.monotonic() + limit
        for worker in self._running:
            worker.send_signal(signal.SIGCONT)
            assert worker.wait(max(1.0, deadline - time.monotonic())) == 0, self.said()

    def end(self) -> None:
        """Kill what still runs."""
        for worker in self._running:
            if worker.poll() is None:
                worker.kill()
            worker.wait(10)
        self._said.close()

    def said(self) -> str:
        """Return the end of what they wrote to their terminals."""
        return (self.folder / "workers.log").read_text(errors="replace")[-3000:]

    def _begin(self, words: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            words, cwd=ROOT, env=self._environment, stderr=self._said, stdout=self._said
        )
