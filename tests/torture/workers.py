"""The processes under torture, on a server of their own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.torture.history import Recorder

ROOT = Path(__file__).resolve().parents[2]

Worker = subprocess.Popen[bytes]


def environment(url: str) -> dict[str, str]:
    """The environment of a process that works on the server at the URL."""
    return {**os.environ, "DISTLOCK_TEST_URL": url, "DJANGO_SETTINGS_MODULE": "tests.settings"}


def migrate(url: str) -> None:
    """Make the tables."""
    code = (
        "import django; django.setup(); from django.core.management import call_command as call; "
    )
    code += "call('migrate', run_syncdb=True, verbosity=0)"
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(url), check=True, timeout=120
    )


class Workers:
    """A number of processes that run the same module, kept at that number."""

    def __init__(self, url: str, folder: Path, module: str, *arguments: object) -> None:
        self._environment = environment(url)
        self.folder = folder
        self.recorder = Recorder(folder)
        self._command = [sys.executable, "-m", module]
        self._more = [*map(str, arguments)]
        self._said = (folder / "workers.log").open("wb")
        self._running: dict[int, tuple[Worker, str]] = {}
        self._doomed: list[Worker] = []

    def start(self, first: str) -> Worker:
        """Start one, with a first argument of its own."""
        worker = self._begin(first)
        self._running[worker.pid] = (worker, first)
        return worker

    def start_doomed(self, first: str, point: str) -> Worker:
        """Start one more, which kills itself at a point and is not replaced."""
        worker = self._begin(first, "--die-at", point)
        self._doomed.append(worker)
        return worker

    def _begin(self, first: str, *more: str) -> Worker:
        return subprocess.Popen(
            [*self._command, first, *self._more, *more],
            cwd=ROOT,
            env=self._environment,
            stderr=self._said,
            stdout=self._said,
        )

    def wait_until_all_work(self, limit: float = 30) -> None:
        """Return when each of them has a session on the server."""
        deadline = time.monotonic() + limit
        while waiting := [
            pid for pid, (worker, _) in self._running.items() if self.session(worker) is None
        ]:
            self.check()
            assert time.monotonic() < deadline, f"{waiting} do not work: {self.said()}"
            time.sleep(0.02)

    def check(self) -> None:
        """Raise if one has ended by itself."""
        for pid, (worker, _) in self._running.items():
            assert worker.poll() is None, f"{pid} ended with {worker.poll()}: {self.said()}"

    def any(self) -> Worker:
        """Return one of them, at random."""
        return random.choice([worker for worker, _ in self._running.values()])

    def of(self, pid: int) -> Worker | None:
        """Return the one with that process id, if it is one of them."""
        return self._running[pid][0] if pid in self._running else None

    def session(self, worker: Worker) -> int | None:
        """The session on the server that a worker's work goes to."""
        path = self.folder / f"{worker.pid}.session"
        said = path.read_text() if path.exists() else ""
        return int(said) if said else None

    def kill(self, worker: Worker) -> None:
        """Kill one, wherever it is."""
        worker.send_signal(signal.SIGKILL)
        self.recorder.note("killed", pid=worker.pid, point="anywhere")
        worker.wait(10)

    def noted(self, op: str) -> int:
        """Count an operation in what they have noted."""
        sought = f'{{"op": "{op}"'
        return sum(path.read_text().count(sought) for path in self.folder.glob("*.jsonl"))

    def replace(self, worker: Worker) -> None:
        """Kill one and start another."""
        self.kill(worker)
        _, first = self._running.pop(worker.pid)
        self.start(first)

    def finish(self, limit: float) -> None:
        """Tell all to stop, and wait until they have ended by themselves."""
        (self.folder / "stop").touch()
        deadline = time.monotonic() + limit
        for worker in self._all():
            worker.send_signal(signal.SIGCONT)
            status = worker.wait(max(1.0, deadline - time.monotonic()))
            fine = (0, -signal.SIGKILL) if worker in self._doomed else (0,)
            assert status in fine, f"a worker ended with {status}: {self.said()}"

    def end(self) -> None:
        """Kill what still runs."""
        for worker in self._all():
            if worker.poll() is None:
                worker.kill()
            worker.wait(10)
        self.recorder.close()
        self._said.close()

    def said(self) -> str:
        """Return the end of what they wrote to their terminals."""
        return (self.folder / "workers.log").read_text(errors="replace")[-3000:]

    def _all(self) -> list[Worker]:
        return [worker for worker, _ in self._running.values()] + self._doomed
