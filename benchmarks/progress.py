"""How many turns each worker has had, and when all stop: a file that the processes map."""

from __future__ import annotations

import mmap
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WIDTH = 8
MEMORY = Path("/dev/shm")  # so that it does not meet the databases on the disk


class Progress:
    """A counter for each worker, and one that is the sign to stop."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._counts = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")

    @property
    def stopped(self) -> bool:
        return self._counts[0] != 0

    def stop(self) -> None:
        self._counts[0] = 1

    def count(self, worker: int) -> None:
        """Note one more turn of a worker, of which nobody else takes note."""
        self._counts[1 + worker] += 1

    def wait(self, turns: int, seconds: float) -> None:
        """Return when each worker has had so many turns more, or when the time is over."""
        begun, end = self._counts.tolist()[1:], time.monotonic() + seconds
        while time.monotonic() < end:
            now = self._counts.tolist()[1:]
            if all(count - before >= turns for count, before in zip(now, begun, strict=True)):
                return
            time.sleep(0.02)


@contextmanager
def progress_of(workers: int) -> Iterator[tuple[str, Progress]]:
    """The progress of so many workers, and the path by which other processes share it."""
    with tempfile.NamedTemporaryFile(dir=MEMORY if MEMORY.is_dir() else None) as file:
        file.truncate(WIDTH * (1 + workers))
        yield file.name, Progress(file.name)
