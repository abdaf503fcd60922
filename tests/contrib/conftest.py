"""A Redis server and real workers, which use the database under test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from django.db import connections

from tests.contrib import celery_app
from tests.contrib.redis_server import Redis
from tests.databases import Unavailable
from tests.machine import die_with_parent

ROOT = Path(__file__).resolve().parent.parent.parent
START_LIMIT = 60.0
STOP_LIMIT = 20.0


@pytest.fixture(scope="package")
def redis_url() -> Iterator[str]:
    """The URL of a Redis server; without one the tests of workers fail, not skip."""
    try:
        server = Redis()
    except Unavailable as missing:
        pytest.fail(f"The tests of Celery workers need Redis: {missing}", pytrace=False)
    with server:
        os.environ[celery_app.VARIABLE] = server.url
        celery_app.configure(server.url)
        yield server.url
        celery_app.app.backend.client.close()  # type: ignore[attr-defined]
        celery_app.app.close()
        del os.environ[celery_app.VARIABLE]


@pytest.fixture(autouse=True)
def current_app() -> None:
    """Shared tasks go to the app of the tests: the one that was made last is not always ours."""
    celery_app.app.set_current()


class Worker:
    """A worker process and its log."""

    def __init__(self, name: str, *options: str) -> None:
        self.name = f"{name}@distlock"
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        environ = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.contrib.settings"}
        for alias in connections:
            name_of = connections[alias].settings_dict["NAME"]
            environ[f"DISTLOCK_WORKER_DATABASE_{alias}"] = str(name_of)
        command = f"-m celery -A tests.contrib.celery_app worker -n {self.name} -l INFO "
        command += "--without-gossip --without-mingle --without-heartbeat"
        self.process = subprocess.Popen(
            [sys.executable, *command.split(), *options],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT
        while f"{self.name} ready." not in self.said():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"The worker did not start:\n{self.said()[-3000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End it in good order, and its group if that takes too long."""
        try:
            self.process.terminate()
            self.process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
        finally:
            self.log.close()

    def kill(self) -> None:
        """End it and its children at once, as a crash would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_LIMIT)


@pytest.fixture(scope="package")
def start_worker(redis_url: str, django_db_setup: None) -> Iterator[Callable[..., Worker]]:
    """Start a worker; it is stopped before the database goes."""
    with contextlib.ExitStack() as stack:

        def start(name: str, *options: str) -> Worker:
            worker = Worker(name, *options)
            stack.callback(worker.stop)
            worker.wait_until_ready()
            return worker

        yield start


@pytest.fixture(scope="package")
def shared_worker(start_worker: Callable[..., Worker]) -> Worker:
    """A prefork worker with three children, for all tests."""
    return start_worker("shared", "-P", "prefork", "-c", "3")


@pytest.fixture
def worker(shared_worker: Worker, transactional_db: None) -> Worker:
    """The shared worker, with an empty record."""
    with celery_app.record() as connection:
        connection.flushdb()
    return shared_worker
