"""A private Redis server for the workers: it answers by its own pid, or it is not ours."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from types import TracebackType

import redis

from tests.databases import Unavailable
from tests.machine import die_with_parent, directories, first, free_port, shown

START_LIMIT = 20.0
STOP_LIMIT = 10.0


class Redis:
    """One server on a free port of 127.0.0.1, which keeps nothing on disk."""

    def __init__(self) -> None:
        places = directories("/usr/bin", "/usr/local/bin", "/opt/homebrew/bin")
        found = first(places, "redis-server", "valkey-server")
        if found is None:
            raise Unavailable(f"no redis-server found (looked in {shown(places)})")
        self.binary = found
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Redis:
        self.home = tempfile.mkdtemp(prefix="distlock-redis-")
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def _start(self) -> None:
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            port = free_port()
            self.url = f"redis://127.0.0.1:{port}"
            options = f"--port {port} --bind 127.0.0.1 --appendonly no --dir {self.home}"
            self.process = subprocess.Popen(
                [self.binary, *options.split(), "--save", ""],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            while time.monotonic() < deadline and self.process.poll() is None:
                if self._is_ours():
                    return
                time.sleep(0.05)
            self._end()
        raise Unavailable(f"{self.binary} does not start")

    def _is_ours(self) -> bool:
        assert self.process is not None
        with redis.Redis.from_url(self.url, socket_timeout=2) as client:
            try:
                answer: dict[str, object] = client.info("server")  # type: ignore[assignment]
            except redis.RedisError:
                return False
        return answer["process_id"] == self.process.pid

    def _stop(self) -> None:
        try:
            self._end()
        finally:
            shutil.rmtree(self.home, ignore_errors=True)

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_LIMIT)
