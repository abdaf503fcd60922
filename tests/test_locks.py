from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from django.db import connection, transaction

from distlock import AlreadyHeld, Lease, LockBusy, LockLost, lock
from distlock.models import DistributedLock
from tests.app.models import Counter

pytestmark = pytest.mark.django_db(transaction=True)


def in_thread(function: Any) -> Any:
    """Call a function in another thread, with connections of its own, and return its result."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            result.append(error)
        finally:
            from django.db import connections

            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert result
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def is_free(name: str) -> bool:
    def probe() -> bool:
        lease = lock(name).try_acquire()
        if lease is not None:
            lease.release()
        return lease is not None

    return bool(in_thread(probe))


def test_a_block_holds_the_lock() -> None:
    with lock("x") as lease:
        assert lease.token > 0
        assert not is_free("x")
        lease.check()
    assert is_free("x")


def test_same_thread_cannot_wait_for_itself() -> None:
    with lock("x"), pytest.raises(AlreadyHeld), lock("x"):
        pass


def test_reentrant() -> None:
    with lock("x", reentrant=True) as outer:
        with lock("x", reentrant=True) as inner:
            assert inner.token == outer.token
        assert not is_free("x")
    assert is_free("x")


def test_busy() -> None:
    with lock("x", note="because"):
        with pytest.raises(LockBusy) as caught:
            in_thread(lambda: lock("x", wait=0.1).acquire())
    assert caught.value.name == "x"
    assert caught.value.holder.note == "because"
    assert 0.1 <= caught.value.waited < 2


def test_in_transaction() -> None:
    with transaction.atomic():
        with lock("x"):
            Counter.objects.create(name="c", value=1)
        if connection.vendor != "sqlite":
            assert not is_free("x")
    assert is_free("x")


def test_in_transaction_rollback() -> None:
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        with lock("x"):
            pass
        1 / 0
    assert is_free("x")


def test_atomic() -> None:
    with lock("x", atomic=True):
        Counter.objects.create(name="c", value=1)
    assert is_free("x")
    assert Counter.objects.count() == 1
    with pytest.raises(ZeroDivisionError), lock("x", atomic=True):
        Counter.objects.create(name="d", value=1)
        1 / 0
    assert Counter.objects.count() == 1
    assert is_free("x")


def test_renewed() -> None:
    with lock("x", ttl=0.6) as lease:
        time.sleep(1.5)
        assert not lease.lost
        assert not is_free("x")


def test_not_renewed() -> None:
    with pytest.raises(LockLost), lock("x", ttl=0.3, renew=False):
        time.sleep(0.5)


def test_decorator() -> None:
    @lock("stock:{product_id}")
    def reserve(product_id: int, quantity: int = 1) -> str:
        return str(lock(f"stock:{product_id}").holder())

    assert "process" in reserve(3)
