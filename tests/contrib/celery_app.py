"""The Celery app of the tests, and the record of what its workers did.

    python -m celery -A tests.contrib.celery_app worker

DISTLOCK_TEST_REDIS is the URL of a Redis server: database 0 is the broker's, 1 the results', and 2
the record's.
"""

from __future__ import annotations

import json
import os
from typing import Any

import redis
from celery import Celery

VARIABLE = "DISTLOCK_TEST_REDIS"
RECORD = "record"

app = Celery("tests", include=["tests.contrib.tasks"])


def configure(url: str) -> None:
    """Use a Redis server."""
    app.conf.update(
        broker_url=f"{url}/0",
        result_backend=f"{url}/1",
        broker_connection_retry_on_startup=True,
        worker_prefetch_multiplier=1,
    )


def record() -> redis.Redis:
    """A connection to the record. The caller closes it."""
    return redis.Redis.from_url(f"{os.environ[VARIABLE]}/2")


def note(**what: Any) -> int:
    """Add an entry to the record and return how many there are."""
    with record() as connection:
        return int(connection.rpush(RECORD, json.dumps(what)))  # type: ignore[arg-type]


def noted() -> list[dict[str, Any]]:
    """The record."""
    with record() as connection:
        entries: Any = connection.lrange(RECORD, 0, -1)
        return [json.loads(entry) for entry in entries]


if VARIABLE in os.environ:
    configure(os.environ[VARIABLE])
