"""celery-singleton with its keys in the database: real workers, and the package itself."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery_singleton import DuplicateTaskError, backends, clear_locks
from django.db import transaction
from kombu.exceptions import OperationalError

from distlock.contrib import celery_singleton
from distlock.contrib.celery_singleton import DatabaseBackend
from tests.contrib import celery_app, queued
from tests.contrib.conftest import Worker
from tests.contrib.queued import eagerly, held, result_of, until_free, wait_for, wait_until
from tests.support import in_thread, row

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "other"]),
    pytest.mark.usefixtures("redis_url"),  # an app keeps the result backend that it has seen first
]
workers = pytest.mark.vendor("postgresql")
"""The statements are tried everywhere; what workers do with them need not be."""


@pytest.fixture
def backend() -> Iterator[DatabaseBackend]:
    yield DatabaseBackend("redis://is.not.read")
    celery_singleton._unpublished.ids.clear()


# -- what its users know -------------------------------------------------------------------------


@workers
def test_a_duplicate_is_the_task_that_is_there(queued_worker: Worker) -> None:
    first = queued.single.delay(7, 1)
    wait_for("start")
    assert isinstance(backends._backend, DatabaseBackend)
    assert celery_singleton._unpublished.ids == {}
    assert queued.single.delay(7, 1).id == first.id
    other = queued.single.delay(8)
    assert other.id != first.id
    assert (result_of(first), result_of(other)) == (7, 8)
    until_free()
    again = queued.single.delay(7, 1)
    assert again.id != first.id
    assert result_of(again) == 7


@workers
def test_a_duplicate_may_be_an_error(queued_worker: Worker) -> None:
    first = queued.single_strict.delay(1)
    with pytest.raises(DuplicateTaskError) as raised:
        queued.single_strict.delay(1)
    assert raised.value.task_id == first.id
    name = held()[0]
    seconds = (row(name)["ttl"]) / 1_000_000
    assert seconds == 86_400  # no expiry was given, and none is for ever
    assert result_of(first) == "done"
    until_free()


# -- what it gains -------------------------------------------------------------------------------


@workers
def test_a_run_that_outlives_its_expiry_does_not_free_the_next_ones_key(
    queued_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = queued.single_short.delay("x", 1, 2)
    wait_for("start", number=1)
    time.sleep(1.1)
    monkeypatch.setattr(queued.single_short, "lock_expiry", 60)
    following = queued.single_short.delay("x", 2, 3)
    assert following.id != late.id
    assert result_of(late) == 1
    time.sleep(0.3)
    assert queued.single_short.delay("x", 3, 0).id == following.id
    wait_for("end", number=2)
    until_free()


@workers
def test_a_task_that_retries_is_not_its_own_duplicate(queued_worker: Worker) -> None:
    sent = queued.single_retrying.delay()
    wait_until(lambda: sent.state == "RETRY")
    assert queued.single_retrying.delay().id == sent.id
    assert result_of(sent) == "done"
    until_free()


@workers
def test_a_killed_workers_key_ends_with_its_expiry(queued_worker: Worker) -> None:
    sent = queued.single_dying.delay()
    wait_for("start")
    assert queued.single_dying.delay().id == sent.id
    wait_until(lambda: queued.single_dying.delay().id != sent.id, 4)
    wait_for("start", 2)


@workers
@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_task_that_will_not_run_frees_its_key(queued_worker: Worker, how: str) -> None:
    expires = 1.0 if how == "expired" else None
    sent = queued.single.apply_async((1,), countdown=1.5, expires=expires)
    assert len(held()) == 1
    if how == "revoked":
        sent.revoke()
    wait_until(lambda: sent.state == "REVOKED")
    until_free()


@workers
def test_a_key_is_seen_at_once_and_outlives_a_rollback(queued_worker: Worker) -> None:
    with transaction.atomic():
        sent = queued.single.delay(1, 1)
        assert in_thread(lambda: queued.single.delay(1, 1)).id == sent.id
        transaction.set_rollback(True)
    assert len(held()) == 1  # its message is on the way
    assert result_of(sent) == 1
    until_free()


# -- without a worker ----------------------------------------------------------------------------


def test_what_cannot_be_published_frees_its_key_even_inside_a_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        assert len(held()) == 1
        raise OperationalError("the broker is away")

    monkeypatch.setattr(celery_app.app, "send_task", refuse)
    for _ in range(2):
        with pytest.raises(OperationalError, match="away"):
            queued.single.delay(1)
        assert held() == []

    @celery_app.app.task(shared=False)
    def outer() -> None:
        queued.single.delay(1)

    assert isinstance(outer.apply().result, OperationalError)
    assert held() == []
    assert celery_singleton._unpublished.ids == {}


def test_an_eager_task_frees_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(queued, "work", lambda *args, **kwargs: seen.append(held()))
    with eagerly():
        queued.single.delay(1)
    assert [len(names) for names in seen] == [1]
    assert held() == []
    assert celery_singleton._unpublished.ids == {}


def test_keys_can_be_cleared_by_hand(backend: DatabaseBackend) -> None:
    def take(*names: str) -> None:
        in_thread(lambda: [backend.lock(name, "an-id", 60) for name in names])

    take("SINGLETONLOCK_a", "SINGLETONLOCK_b", "singletonlock_c")
    token = row("SINGLETONLOCK_a")["fencing_token"]
    backend.unlock("SINGLETONLOCK_a")
    assert held() == ["SINGLETONLOCK_b", "singletonlock_c"]
    assert row("SINGLETONLOCK_a")["fencing_token"] > token
    clear_locks(celery_app.app)
    assert held() == ["singletonlock_c"]


def test_the_four_methods(backend: DatabaseBackend) -> None:
    assert backend.get("k") is None
    assert backend.lock("k", "one", 60) is True
    assert backend.lock("k", "two", 60) is False
    assert backend.lock("k", "one", 60) is True
    assert backend.get("k") == "one"
    backend.unlock("k")
    assert backend.get("k") is None
    long = 200 * "x"
    assert backend.lock("k", long, 0.05)
    assert backend.get("k") == long
    time.sleep(0.1)
    assert backend.get("k") is None
    other = DatabaseBackend(using="other", expiry=60)
    assert other.lock("k", "one") is True
    assert backend.get("k") is None


@pytest.mark.parametrize(
    ("how", "expiry", "error", "named"),
    [
        ({"using": "nowhere"}, 1, ValueError, "'nowhere' is not in DATABASES"),
        ({"expiry": 0}, None, ValueError, "expiry must be greater than 0"),
        ({}, "60", TypeError, "expiry must be a number"),
    ],
)
def test_bad_settings(how: Any, expiry: Any, error: Any, named: str) -> None:
    with pytest.raises(error, match=named):
        DatabaseBackend(**how).lock("k", "one", expiry)
    assert held() == []


@pytest.mark.vendor("sqlite")
def test_the_backends_can_be_imported_before_django_is_ready() -> None:
    """Where the Celery app is made, that is usual."""
    both = "import distlock.contrib.celery_once, distlock.contrib.celery_singleton"
    done = subprocess.run([sys.executable, "-c", both], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
