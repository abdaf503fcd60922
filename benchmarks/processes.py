"""The parent's side: fresh processes for each measurement, and what they answer."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.machine import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120.0  # seconds that one process may live, unless its task says otherwise


class Failed(Exception):
    """A process did not bring a result; the message has the end of what it said."""


class Process:
    """One ``benchmarks.worker``. It says "ready", waits for ``go()``, and ends with its result."""

    def __init__(
        self,
        contender: str,
        url: str,
        task: str,
        limit: float = LIMIT,
        environ: dict[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        self.name = f"{task} of {contender}"
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115
        job = {"contender": contender, "url": url, "task": task, "arguments": arguments}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(job)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
            preexec_fn=die_with_parent,
            env=environ,
        )
        self.too_slow = False
        self.timer = threading.Timer(limit, self._expire)
        self.timer.daemon = True
        self.timer.start()

    def _expire(self) -> None:
        self.too_slow = True
        self.child.kill()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.timer.cancel()
        self.child.kill()
        self.child.wait()
        for stream in (self.child.stdin, self.child.stdout, self.complaints):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def wait_ready(self) -> None:
        assert self.child.stdout is not None
        if self.child.stdout.readline() != "ready\n":
            raise self._failure()

    def go(self) -> None:
        assert self.child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the result will tell
            self.child.stdin.write("go\n")
            self.child.stdin.flush()

    def result(self) -> Any:
        """What the task returned. Raises ``Failed``."""
        assert self.child.stdout is not None
        lines = self.child.stdout.read().splitlines()
        self.child.wait()
        if self.child.returncode or not lines:
            raise self._failure()
        return json.loads(lines[-1])

    def _failure(self) -> Failed:
        self.child.wait()
        self.complaints.seek(0)
        said = self.complaints.read().decode(errors="replace").strip().splitlines()
        why = "took too long" if self.too_slow else (said or ["ended without a word"])[-1]
        return Failed(f"{self.name}: {why[:300]}")


def run(contender: str, url: str, task: str, **arguments: Any) -> Any:
    """Run one task in a process of its own and return its result."""
    with Process(contender, url, task, **arguments) as process:
        process.wait_ready()
        process.go()
        return process.result()


@contextlib.contextmanager
def crew(
    size: int, contender: str, url: str, task: str, **arguments: Any
) -> Iterator[list[Process]]:
    """That many processes of one task, all ready; the caller says ``go()`` and takes results."""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(Process(contender, url, task, worker=f"p{number}", **arguments))
            for number in range(size)
        ]
        for process in processes:
            process.wait_ready()
        yield processes


def sleep_until(moment: float) -> None:
    """Return when the clock that all processes share shows that moment."""
    time.sleep(max(0.0, moment - time.monotonic()))
