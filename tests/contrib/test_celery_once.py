"""celery-once with its keys in the database: real workers, and the package itself."""

from __future__ import annotations

import time
from typing import Any

import pytest
from celery_once import AlreadyQueued
from django.core.exceptions import ImproperlyConfigured
from django.db import transaction

from distlock.contrib import celery_once
from distlock.contrib.celery_once import DatabaseBackend
from tests.contrib import queued
from tests.contrib.conftest import Worker
from tests.contrib.queued import eagerly, held, result_of, until_free, wait_for, wait_until
from tests.support import in_thread

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "other"]),
    pytest.mark.usefixtures("redis_url"),  # an app keeps the result backend that it has seen first
]
workers = pytest.mark.vendor("postgresql")
"""The statements are tried everywhere; what workers do with them need not be."""


# -- what its users know -------------------------------------------------------------------------


@workers
def test_a_duplicate_is_refused_until_the_task_is_done(queued_worker: Worker) -> None:
    first = queued.once.delay(number=7, seconds=1)
    wait_for("start")
    assert held() == ["qo_tests.contrib.queued.once_number-7_seconds-1"]
    with pytest.raises(AlreadyQueued) as raised:
        queued.once.delay(7, 1)
    assert 50 < raised.value.countdown <= 60
    other = queued.once.delay(8)
    assert (result_of(first), result_of(other)) == (7, 8)
    until_free()
    assert result_of(queued.once.delay(7, 1)) == 7


@workers
def test_a_task_that_retries_keeps_its_key(queued_worker: Worker) -> None:
    sent = queued.once_retrying.delay()
    wait_until(lambda: sent.state == "RETRY")
    with pytest.raises(AlreadyQueued):
        queued.once_retrying.delay()
    assert result_of(sent) == "done"
    until_free()


@workers
def test_unlock_before_run(queued_worker: Worker) -> None:
    first = queued.once_until_run.delay(1.5)
    wait_for("start")
    second = queued.once_until_run.delay(1.5)
    assert queued.once_until_run.delay(1.5).state in ("REJECTED", "PENDING")
    assert (result_of(first), result_of(second)) == ("done", "done")
    until_free()


# -- what it gains -------------------------------------------------------------------------------


@workers
def test_a_run_that_outlives_its_timeout_does_not_clear_the_next_ones_key(
    queued_worker: Worker,
) -> None:
    late = queued.once_short.apply_async(("x", 1, 2.0), once={"timeout": 1})
    wait_for("start", number=1)
    time.sleep(1.1)
    queued.once_short.apply_async(("x", 2, 3.0), once={"timeout": 60})
    assert result_of(late) == 1
    time.sleep(0.3)
    with pytest.raises(AlreadyQueued):
        queued.once_short.delay("x", 3, 0)
    wait_for("end", number=2)
    until_free()


@workers
def test_a_killed_workers_key_ends_with_its_timeout(queued_worker: Worker) -> None:
    queued.once_dying.delay()
    wait_for("start")
    with pytest.raises(AlreadyQueued) as raised:
        queued.once_dying.delay()
    assert 0 < raised.value.countdown <= 2
    time.sleep(raised.value.countdown)
    queued.once_dying.delay()
    wait_for("start", 2)


@workers
@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_task_that_will_not_run_clears_its_key(queued_worker: Worker, how: str) -> None:
    sent = queued.once.apply_async((1,), countdown=1.5, expires=1.0 if how == "expired" else None)
    assert len(held()) == 1
    if how == "revoked":
        sent.revoke()
    wait_until(lambda: sent.state == "REVOKED")
    until_free()


@workers
def test_a_key_is_seen_at_once_and_outlives_a_rollback(queued_worker: Worker) -> None:
    with transaction.atomic():
        sent = queued.once.delay(1, 1.5)
        with pytest.raises(AlreadyQueued):
            in_thread(lambda: queued.once.delay(1, 1.5))
        transaction.set_rollback(True)
    assert len(held()) == 1  # its message is on the way
    assert result_of(sent) == 1
    until_free()


# -- without a worker ----------------------------------------------------------------------------


def test_eager_tasks_clear_their_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def work(seconds: float, number: int) -> None:
        seen.append(held())
        if number:
            queued.once.delay(number - 1)

    monkeypatch.setattr(queued, "work", work)
    with eagerly():
        queued.once.delay(1)
    keys = [f"qo_tests.contrib.queued.once_number-{number}" for number in (1, 0)]
    assert seen == [keys[:1], sorted(keys)]
    assert held() == []
    assert celery_once._taken.owners == {}


def test_a_call_outside_of_a_run_clears_nothing() -> None:
    one = in_thread(lambda: DatabaseBackend({}).raise_or_lock("qo_x", 60))
    assert one is None
    assert DatabaseBackend({}).clear_lock("qo_x") is False
    assert held() == ["qo_x"]


def test_a_long_key_no_timeout_and_another_database() -> None:
    backend, key = DatabaseBackend({"using": "other"}), "qo_" + 300 * "x"
    backend.raise_or_lock(key, None)
    with pytest.raises(AlreadyQueued) as raised:
        backend.raise_or_lock(key, 60)
    assert 86_390 < raised.value.countdown <= 86_400
    assert held() == []
    assert backend.clear_lock(key)
    backend.raise_or_lock(key, 60)


@pytest.mark.parametrize(
    ("settings", "timeout", "error", "named"),
    [
        ({"blocking": True}, 1, ImproperlyConfigured, "blocking"),
        ({"using": "nowhere"}, 1, ValueError, "'nowhere' is not in DATABASES"),
        ({}, 0, ValueError, "expiry must be greater than 0"),
        ({}, "60", TypeError, "expiry must be a number"),
    ],
)
def test_bad_settings(settings: Any, timeout: Any, error: Any, named: str) -> None:
    with pytest.raises(error, match=named):
        DatabaseBackend(settings).raise_or_lock("qo_x", timeout)
    assert held() == []
