"""Tasks of celery-once and celery-singleton, with their keys in the database.

They have a queue of their own, whose worker is told to include this module.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery import Task
from celery_once import QueueOnce
from celery_singleton import Singleton

import distlock.contrib.celery_once
import distlock.contrib.celery_singleton  # noqa: F401  (so that a worker's main process knows them)
from distlock.models import DistributedLock
from tests.contrib.celery_app import app, note, noted

QUEUE = "queued"
LIMIT = 30.0
WORKER = ("-I", __name__, "-Q", QUEUE, "-P", "prefork", "-c", "3")

app.conf.update(
    task_routes={f"{__name__}.*": {"queue": QUEUE}},
    ONCE={"backend": "distlock.contrib.celery_once.DatabaseBackend", "settings": {}},
    singleton_backend_class="distlock.contrib.celery_singleton.DatabaseBackend",
)


def task(base: type[Task[Any, Any]], **options: Any) -> Any:
    return app.task(base=base, **options)


def work(seconds: float, **what: Any) -> None:
    note(event="start", **what)
    time.sleep(seconds)
    note(event="end", **what)


def wait_for(event: str, count: int = 1, **what: Any) -> None:
    """Wait until that was noted so often."""
    wanted = {"event": event, **what}.items()
    deadline = time.monotonic() + LIMIT
    while sum(wanted <= entry.items() for entry in noted()) < count:
        assert time.monotonic() < deadline, f"{wanted} is not noted: {noted()}"
        time.sleep(0.05)


def wait_until(check: Callable[[], Any], limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def held() -> list[str]:
    """The names of the keys that are taken."""
    rows = DistributedLock.objects.using("default").exclude(owner="").order_by("name")
    return list(rows.values_list("name", flat=True))


def until_free() -> None:
    wait_until(lambda: not held())


@contextmanager
def eagerly() -> Iterator[None]:
    """Run tasks where they are sent."""
    app.conf.task_always_eager = True
    try:
        yield
    finally:
        app.conf.task_always_eager = False


def die() -> None:
    note(event="start")
    os.kill(os.getpid(), signal.SIGKILL)


@task(QueueOnce, once={"timeout": 60})
def once(number: int = 0, seconds: float = 0) -> int:
    work(seconds, number=number)
    return number


@task(QueueOnce, once={"timeout": 1, "keys": ["account"]})
def once_short(account: str, number: int, seconds: float) -> int:
    work(seconds, number=number)
    return number


@task(QueueOnce, once={"timeout": 60, "graceful": True, "unlock_before_run": True})
def once_until_run(seconds: float = 0) -> str:
    work(seconds)
    return "done"


@task(QueueOnce, once={"timeout": 60}, bind=True)
def once_retrying(self: Task[Any, Any]) -> str:
    note(event="start")
    if self.request.retries == 0:
        raise self.retry(countdown=1.5)
    return "done"


@task(QueueOnce, once={"timeout": 2})
def once_dying() -> None:
    die()


@task(Singleton, lock_expiry=60)
def single(number: int = 0, seconds: float = 0) -> int:
    work(seconds, number=number)
    return number


@task(Singleton, lock_expiry=1, unique_on="account")
def single_short(account: str, number: int, seconds: float) -> int:
    work(seconds, number=number)
    return number


@task(Singleton, raise_on_duplicate=True)
def single_strict(seconds: float = 0) -> str:
    work(seconds)
    return "done"


@task(Singleton, lock_expiry=60, bind=True)
def single_retrying(self: Task[Any, Any]) -> str:
    note(event="start")
    if self.request.retries == 0:
        raise self.retry(countdown=1.5)
    return "done"


@task(Singleton, lock_expiry=2)
def single_dying() -> None:
    die()


def result_of(sent: Any) -> Any:
    return sent.get(timeout=LIMIT)
