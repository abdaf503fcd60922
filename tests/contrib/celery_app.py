"""The Celery app of the tests, and the record of what its workers did.

    python -m celery -A tests.contrib.celery_app worker

DISTLOCK_TEST_REDIS    URL of a Redis server: database 0 is the broker's, 1 the results', 2 the
                       record's, and 3 that of the broker which delivers again after two seconds
DISTLOCK_TEST_BROKER   URL of the broker, if it is not that Redis
"""

from __future__ import annotations

import json
import os
from typing import Any

import redis
from celery import Celery
from celery.signals import task_success

VARIABLE = "DISTLOCK_TEST_REDIS"
BROKER = "DISTLOCK_TEST_BROKER"
RECORD = "record"
ANSWERS = "answers"
IMPATIENT = {
    "visibility_timeout": 2,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
}


def make_app(**options: Any) -> Celery:
    """An app with the tasks of the tests."""
    return Celery(
        "tests",
        include=["tests.contrib.tasks", "tests.contrib.faulty", "tests.contrib.enqueued"],
        **options,
    )


app = make_app()


def configure(app: Celery, url: str, broker: str | None = None) -> None:
    """Use a Redis server, and perhaps another broker."""
    app.conf.update(
        broker_url=broker or f"{url}/0",
        result_backend=f"{url}/1",
        broker_connection_retry_on_startup=True,
        broker_transport_options=IMPATIENT if broker == f"{url}/3" else {},
        worker_prefetch_multiplier=1,
    )


def record() -> redis.Redis:
    """A connection to the record. The caller closes it."""
    return redis.Redis.from_url(f"{os.environ[VARIABLE]}/2")


def note(into: str = RECORD, /, **what: Any) -> int:
    """Add an entry to the record and return how many there are."""
    with record() as connection:
        return int(connection.rpush(into, json.dumps(what)))  # type: ignore[arg-type]


def noted(in_: str = RECORD) -> list[dict[str, Any]]:
    """The record."""
    with record() as connection:
        entries: Any = connection.lrange(in_, 0, -1)
        return [json.loads(entry) for entry in entries]


def answers(task_id: str) -> list[Any]:
    """What every delivery of a task that ended well has returned."""
    return [entry["result"] for entry in noted(ANSWERS) if entry["id"] == task_id]


def note_answer(sender: Any, result: Any, **more: Any) -> None:
    note(ANSWERS, id=sender.request.id, result=result)


def first_time(what: str) -> bool:
    """Whether this is asked for the first time since the record was emptied."""
    with record() as connection:
        return bool(connection.set(f"asked {what}", 1, nx=True))


if VARIABLE in os.environ:
    configure(app, os.environ[VARIABLE], os.environ.get(BROKER))
    task_success.connect(note_answer)
