"""Ends of transactions that went wrong once, each in its own way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import OperationalError, connection, connections, transaction

from distlock import LockBusy, LockLost, lock
from distlock.backends import backend_for
from distlock.backends.generic import transaction as short_transaction
from distlock.signals import lock_released
from tests.app.models import Counter
from tests.support import becomes_free, in_thread, is_free, kill_session, steal

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")


class Boom(Exception):
    pass


@servers
def test_a_lost_lease_is_guarded_again_after_a_savepoint_rollback() -> None:
    """The row's lock held all along; if it were let go, a successor would be overwritten."""
    Counter.objects.create(name="c", value=1)

    def successor() -> None:
        with lock("x", wait=0, atomic=True):
            Counter.objects.filter(name="c").update(value=100)

    lease = lock("x", ttl=0.3, renew=False).acquire()
    with contextlib.suppress(LockLost), transaction.atomic():
        value = Counter.objects.get(name="c").value
        with pytest.raises(Boom), transaction.atomic():
            lease.guard()
            time.sleep(0.5)
            _ = lease.lost  # on PostgreSQL it is, by the clock
            raise Boom
        with pytest.raises(LockBusy):
            in_thread(successor)
        Counter.objects.filter(name="c").update(value=value + 1)
    with contextlib.suppress(LockLost):
        lease.release()


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The server turns autocommit on, and so commits, but its answer is lost."""
    wrapper = type(connections["default"])
    real, calls = wrapper._set_autocommit, []

    def set_autocommit(self: Any, autocommit: bool) -> None:
        real(self, autocommit)
        if autocommit and self is connections["default"] and not calls:
            calls.append(1)
            kill_session()
            raise OperationalError("the answer is lost")

    connection.ensure_connection()
    transaction.set_autocommit(False)
    with lock("x"):
        Counter.objects.create(name="c", value=1)
    monkeypatch.setattr(wrapper, "_set_autocommit", set_autocommit)
    yield
    monkeypatch.undo()


@pytest.mark.vendor("mysql")  # PostgreSQL refuses to turn it on in a transaction
def test_autocommit_is_on_after_a_lost_answer_to_turning_it_on(deaf: None) -> None:
    transaction.set_autocommit(True)
    Counter.objects.create(name="later", value=1)
    names = in_thread(lambda: set(Counter.objects.values_list("name", flat=True)))
    assert names == {"c", "later"}


@servers
@pytest.mark.parametrize("atomic", [False, True])
def test_a_commit_is_one_though_the_connection_is_lost_right_after_it(
    monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    """On MariaDB autocommit is turned on by a statement of its own, after COMMIT was answered."""
    wrapper = type(connections["default"])
    real, calls, ran = wrapper._set_autocommit, [], []

    def set_autocommit(self: Any, autocommit: bool) -> None:
        if autocommit and self is connections["default"] and not calls:
            calls.append(1)
            kill_session()
            raise OperationalError("lost")
        real(self, autocommit)

    with contextlib.nullcontext() if atomic else transaction.atomic():
        with lock("x", atomic=atomic):
            Counter.objects.create(name="c", value=1)
            transaction.on_commit(lambda: ran.append(1))
            monkeypatch.setattr(wrapper, "_set_autocommit", set_autocommit)
    monkeypatch.undo()
    assert calls == ran == [1]
    assert Counter.objects.filter(name="c").exists()
    assert is_free("x")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OperationalError])
def test_an_atomic_lock_that_fails_after_begin_leaves_nothing_open(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("distlock.atomics.transaction_of", fail)
    with pytest.raises(error), lock("x", ttl=60, atomic=True):
        pytest.fail("it should not have begun")
    monkeypatch.undo()
    assert not connection.in_atomic_block
    Counter.objects.create(name="c", value=1)
    assert in_thread(lambda: Counter.objects.filter(name="c").exists())
    assert becomes_free("x", 2)


@pytest.mark.vendor("sqlite")
def test_a_renewal_that_is_rolled_back_is_not_trusted() -> None:
    lease = lock("x", ttl=0.4, renew=False).acquire()
    with pytest.raises(Boom), transaction.atomic():
        lease.renew(ttl=60)
        raise Boom
    assert lease.remaining < 1
    lease.renew(ttl=0.4)
    with transaction.atomic():
        lease.renew(ttl=60)
    assert lease.remaining > 50
    lease.release()


@servers
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_by_hand_the_end_is_told_though_autocommit_stays_off(end: str) -> None:
    told: list[str] = []

    def receive(lease: Any, **kwargs: Any) -> None:
        told.append(lease.name)

    lock_released.connect(receive)
    transaction.set_autocommit(False)
    try:
        with lock("x"):
            pass
        getattr(transaction, end)()
        deadline = time.monotonic() + 5
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        transaction.set_autocommit(True)
        lock_released.disconnect(receive)
    assert told == ["x"]


@servers
def test_a_loss_is_told_though_the_connection_was_closed_in_an_earlier_block() -> None:
    lease = lock("x", renew=False).acquire()
    with contextlib.suppress(Exception), transaction.atomic():
        connection.close()
    steal("x")
    with pytest.raises(LockLost):
        lease.release()


@servers
def test_a_guard_after_the_release_in_one_transaction_does_nothing() -> None:
    with transaction.atomic():
        lease = lock("x").acquire()
        lease.release()
        lease.guard()
    assert is_free("x")


@servers
def test_a_release_that_fails_in_a_savepoint_is_not_tried_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The portable path rolls its own savepoint back, and not by way of the wrapped method."""
    tried: list[int] = []

    def release(*arguments: Any, **more: Any) -> bool:
        tried.append(1)
        assert len(tried) < 10
        with short_transaction(connection):
            raise OperationalError("the row is locked")

    with pytest.raises(OperationalError), transaction.atomic():
        lease = lock("x", ttl=60).acquire()
        monkeypatch.setattr(backend_for(connection), "release", release)
        try:
            lease.release()
        finally:
            monkeypatch.undo()
    assert len(tried) == 1
    assert becomes_free("x", 2)
