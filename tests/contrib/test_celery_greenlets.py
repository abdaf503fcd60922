"""`single_instance` in workers whose tasks are greenlets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from distlock import lock
from tests.contrib import tasks
from tests.contrib.conftest import Worker
from tests.contrib.test_celery_workers import overlaps, result_of, wait_for_start

pytestmark = pytest.mark.usefixtures("worker")


@pytest.mark.vendor("postgresql", "mysql")
@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_a_pool_of_greenlets(start_worker: Callable[..., Worker], pool: str) -> None:
    """A duplicate is skipped, those who wait take turns, and a lease is renewed meanwhile."""
    start_worker(pool, "-P", pool, "-c", "8", "-Q", pool)
    first = tasks.renewed.apply_async((3,), queue=pool)
    wait_for_start()
    duplicate = tasks.renewed.apply_async((3,), queue=pool)
    assert result_of(duplicate)["distlock"] == "skipped"
    assert result_of(first) == "still held"
    waiting = [tasks.waiting.apply_async((2, 0.3), queue=pool) for _ in range(4)]
    assert [result_of(one) for one in waiting] == ["done"] * 4
    assert lock("waiting:2").holder() is None
    assert overlaps() == 0
