"""Brokers and real workers, which use the database under test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import pytest
import redis
from celery import Celery
from django.db import connections

from tests.contrib import celery_app
from tests.contrib.in_memory import Queue, app_in_memory
from tests.contrib.rabbitmq_server import RabbitMQ
from tests.contrib.redis_server import Redis
from tests.contrib.world import World
from tests.databases import Unavailable
from tests.machine import die_with_parent

ROOT = Path(__file__).resolve().parent.parent.parent
WITH_DATABASE_BEAT = find_spec("django_celery_beat") is not None
"""It is installed where it allows the Django that is tested; see setup.cfg."""
collect_ignore = [] if WITH_DATABASE_BEAT else ["test_beat_database.py"]

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
        celery_app.configure(celery_app.app, server.url)
        yield server.url
        celery_app.app.backend.client.close()  # type: ignore[attr-defined]
        celery_app.app.close()
        del os.environ[celery_app.VARIABLE]


@pytest.fixture(scope="package")
def rabbitmq_url() -> Iterator[str]:
    """The URL of a RabbitMQ node; without one the tests of workers fail, not skip."""
    try:
        node = RabbitMQ()
    except Unavailable as missing:
        pytest.fail(f"The tests of Celery workers need RabbitMQ: {missing}", pytrace=False)
    with node:
        yield node.url


@pytest.fixture(autouse=True)
def current_app() -> None:
    """Shared tasks go to the app of the tests: the one that was made last is not always ours."""
    celery_app.app.set_current()


def environment() -> dict[str, str]:
    """The environment of a process that uses the database under test."""
    environ = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.contrib.settings"}
    for alias in connections:
        name_of = connections[alias].settings_dict["NAME"]
        environ[f"DISTLOCK_WORKER_DATABASE_{alias}"] = str(name_of)
    return environ


class Worker:
    """A worker process and its log."""

    def __init__(self, name: str, *options: str, broker: str | None = None) -> None:
        self.name = f"{name}@distlock"
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        command = f"-m celery -A tests.contrib.celery_app worker -n {self.name} -l INFO "
        command += "--without-gossip --without-mingle --without-heartbeat"
        self.process = subprocess.Popen(
            [sys.executable, *command.split(), *options],
            cwd=ROOT,
            env=environment() | ({celery_app.BROKER: broker} if broker else {}),
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
    """Start a worker; it is stopped before the database goes, with all others at once."""
    with contextlib.ExitStack() as stack:
        asked = contextlib.ExitStack()

        def start(name: str, *options: str, broker: str | None = None) -> Worker:
            worker = Worker(name, *options, broker=broker)
            stack.callback(worker.stop)
            asked.callback(worker.process.terminate)
            worker.wait_until_ready()
            return worker

        yield start
        asked.close()


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


@pytest.fixture
def app() -> Iterator[Celery]:
    with app_in_memory() as app:
        yield app


@pytest.fixture
def queue(app: Celery) -> Queue:
    return Queue(app)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(monkeypatch)
    made.sent()
    yield made
    made.sent()


class Broker:
    """A broker and its worker, with three children."""

    def __init__(self, url: str, app: Celery, worker: Worker) -> None:
        self.url = url
        self.app = app
        self.worker = worker

    def wait_until_taken(self, queue: str) -> None:
        """Return when the workers of a queue on Redis have taken all that was in it."""
        self._wait_until(lambda connection: not connection.llen(queue))

    def wait_until_quiet(self, queue: str = "celery") -> None:
        """Return when no message is out: one that comes later would meet an empty database."""
        if self.url.startswith("redis"):
            self._wait_until(lambda redis: not (redis.hlen("unacked") or redis.llen(queue)))

    def _wait_until(self, condition: Callable[[redis.Redis], bool]) -> None:
        deadline = time.monotonic() + STOP_LIMIT
        with redis.Redis.from_url(self.url) as connection:
            while not condition(connection):
                assert time.monotonic() < deadline, "messages are still on their way"
                time.sleep(0.05)


@pytest.fixture(scope="package")
def brokers(
    redis_url: str, start_worker: Callable[..., Worker], request: pytest.FixtureRequest
) -> Iterator[Callable[[str], Broker]]:
    """Return a broker by its name: redis, rabbitmq, or impatient (Redis that delivers again)."""
    started: dict[str, Broker] = {}
    with contextlib.ExitStack() as stack:

        def start(name: str) -> Broker:
            if name == "redis":
                worker: Worker = request.getfixturevalue("shared_worker")
                return Broker(f"{redis_url}/0", celery_app.app, worker)
            impatient = name == "impatient"
            url = f"{redis_url}/3" if impatient else request.getfixturevalue("rabbitmq_url")
            app = celery_app.make_app(set_as_current=False)
            stack.callback(app.close)
            celery_app.configure(app, redis_url, url)
            return Broker(url, app, start_worker(name, "-P", "prefork", "-c", "3", broker=url))

        def broker(name: str) -> Broker:
            if name not in started:
                started[name] = start(name)
            return started[name]

        yield broker


@pytest.fixture
def broker(
    request: pytest.FixtureRequest, brokers: Callable[[str], Broker], transactional_db: None
) -> Iterator[Broker]:
    """The broker that the test is parametrized with, and tasks go to; with an empty record."""
    broker = brokers(request.param)
    broker.app.set_current()
    with celery_app.record() as connection:
        connection.flushdb()
    yield broker
    broker.wait_until_quiet()


@pytest.fixture(scope="package")
def shared_queued_worker(start_worker: Callable[..., Worker]) -> Worker:
    """A worker for the tasks of celery-once and celery-singleton."""
    from tests.contrib import queued  # it changes how the app publishes

    return start_worker("queued", *queued.WORKER)


@pytest.fixture
def queued_worker(shared_queued_worker: Worker, transactional_db: None) -> Worker:
    """That worker, with an empty record."""
    with celery_app.record() as connection:
        connection.flushdb()
    return shared_queued_worker
