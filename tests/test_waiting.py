"""Waiting: hand-over, order, and who passes a turn on. See `lookout.py` and `waiting.py`."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from django.db import OperationalError, connection, transaction
from django.test import TestCase

from distlock import LockBusy, lock
from distlock.lookout import lookout
from distlock.waiting import Sleeper
from tests.support import in_thread, other_session
from tests.waiters import (
    Deaf,
    Waiter,
    calls_of,
    held,
    in_line,
    instead_of,
    line_up,
    output_of,
    settle,
    statements,
)

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")

SOON = 0.2 if os.environ["DISTLOCK_TEST_URL"].startswith("postgresql") else 0.8
"""Seconds until a waiter has a lock that was released: told of it, or by a look."""


@pytest.fixture(autouse=True)
def nobody_waits_at_the_end() -> Iterator[None]:
    yield
    assert not lookout("default")._queues


# -- hand-over -----------------------------------------------------------------------------------


def test_a_release_is_handed_over_soon() -> None:
    with held("x") as (lease,):
        waiter = Waiter("x")
        settle("x")
        released = time.monotonic()
        lease.release()
        assert waiter.result() - released < SOON


def test_a_release_costs_one_try_of_the_process_and_not_one_of_each_waiter() -> None:
    with held("x") as (lease,):
        waiters = line_up("x", 6, hold=0.2)
        settle("x")
        with calls_of("grant") as tries:
            lease.release()
            for waiter in waiters:
                waiter.result()
    if connection.vendor == "postgresql":
        assert tries == [waiter.name for waiter in waiters]
    assert len(tries) <= 6 + 2  # a second look may come before the first one's answer is used


def test_those_of_one_process_are_served_in_the_order_they_came() -> None:
    with held("x") as (lease,):
        waiters = line_up("x", 32)
        lease.release()
        moments = [waiter.result() for waiter in waiters]
    assert moments == sorted(moments)


def test_who_is_second_after_a_long_wait_does_not_wait_for_a_slow_look() -> None:
    with held("x") as (lease,):
        first, second = line_up("x", 2)
        time.sleep(1.5)
        lease.release()
        assert second.result() - first.result() < 0.25


def test_each_name_has_a_line_of_its_own() -> None:
    with held("x", "y") as (_, other):
        waiters = line_up("x", 3)
        second = Waiter("y")
        settle("x", "y")
        released = time.monotonic()
        other.release()
        assert second.result() - released < SOON
        assert in_line("x") == 3
    for waiter in waiters:
        waiter.result()


def test_who_comes_late_stands_in_line_without_a_try() -> None:
    with held("x"):
        waiters = line_up("x", 1)
        settle("x")
        with calls_of("grant") as tries:
            waiters += line_up("x", 3)
            assert tries == []
    for waiter in waiters:
        waiter.result()


# -- the end of a transaction --------------------------------------------------------------------


@servers
def test_a_release_in_a_transaction_wakes_at_its_commit_and_not_before() -> None:
    with held("x") as (lease,):
        waiter = Waiter("x")
        settle("x")
        with transaction.atomic(), calls_of("grant") as tries:
            lease.release()
            time.sleep(0.7)
            assert tries == []
        committed = time.monotonic()
        assert waiter.result() - committed < SOON


class Boom(Exception):
    pass


@servers
def test_a_rollback_of_the_transaction_that_took_it_wakes() -> None:
    waiters: list[Waiter] = []
    with suppress(Boom), transaction.atomic(), lock("x", ttl=300):
        waiters.append(Waiter("x"))
        settle("x")
        raise Boom
    ended = time.monotonic()
    assert waiters[0].result() - ended < SOON + 0.2


@servers
def test_a_closed_connection_wakes() -> None:
    transaction.set_autocommit(False)
    lease = lock("x", ttl=300).acquire()
    waiter = Waiter("x")
    settle("x")
    lease.release()
    connection.close()
    ended = time.monotonic()
    assert waiter.result() - ended < SOON + 0.4


@servers
@pytest.mark.parametrize("names", [1, 12])
def test_who_comes_while_rows_are_pinned_polls_until_they_are_not(names: int) -> None:
    """A look for all of them together, a few times a second."""
    all_names = [f"x{n}" for n in range(names)]
    with held(*all_names) as leases:
        with transaction.atomic():
            for lease in leases:
                lease.release()
            waiters = [waiter for name in all_names for waiter in line_up(name, 2)]
            time.sleep(1)
            with statements() as said:
                time.sleep(3)
            assert 2 <= len(said) <= 4 * 3
        committed = time.monotonic()
    for waiter in waiters[::2]:
        assert waiter.result() - committed < 0.36 * 1.25 + SOON
    for waiter in waiters:
        waiter.result()


# -- a turn is passed on -------------------------------------------------------------------------


def test_who_gives_up_leaves_the_line_to_the_others() -> None:
    with held("x") as (lease,):
        first = line_up("x", 1, wait=0.6)[0]
        second = line_up("x", 1)[0]
        with pytest.raises(LockBusy):
            first.result()
        assert 0.6 <= first.ended - first.began < 1.1
        settle("x")
        released = time.monotonic()
        lease.release()
        assert second.result() - released < SOON


@pytest.mark.parametrize("error", [KeyboardInterrupt, OperationalError])
def test_who_was_woken_and_did_not_try_passes_its_turn_on(error: type[BaseException]) -> None:
    real = Sleeper.sleep
    doomed: list[str] = []

    def sleep(self: Sleeper, *arguments: Any) -> bool:
        awake = real(self, *arguments)
        if threading.current_thread().name in doomed:
            raise error("just then")
        return awake

    with pytest.MonkeyPatch.context() as patch, held("x") as (lease,):
        patch.setattr(Sleeper, "sleep", sleep)
        first, second = line_up("x", 2)
        doomed.append(first.name)
        settle("x")
        released = time.monotonic()
        lease.release()
        assert second.result() - released < SOON
        with pytest.raises(error):
            first.result()


def test_who_could_not_be_granted_the_lock_passes_its_turn_on() -> None:
    doomed: list[str] = []

    def grant(real: Any, *arguments: Any) -> Any:
        if threading.current_thread().name in doomed:
            raise ValueError("just then")
        return real(*arguments)

    with held("x") as (lease,), instead_of("grant", grant):
        first, second = line_up("x", 2)
        doomed.append(first.name)
        settle("x")
        released = time.monotonic()
        lease.release()
        assert second.result() - released < SOON + 0.2
        with pytest.raises(ValueError, match="just then"):
            first.result()


def test_a_signal_ends_a_wait_at_once_and_the_next_one_is_served() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    holder = Waiter("x", hold=1.5, ttl=300)
    timer = threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        while not holder.granted:
            time.sleep(0.01)
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            lock("x").acquire(wait=30)
        assert 0.5 < time.monotonic() - started < 1.2
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, before)
    second = Waiter("x")
    assert second.result() - holder.ended < SOON


# -- who does not stand in line ------------------------------------------------------------------


@pytest.fixture
def stalled_line() -> Iterator[None]:
    """Somebody stands in line for a lock that is free."""
    waiter = Deaf()
    lookout("default").join(("x", 0), waiter)
    yield
    lookout("default").leave(("x", 0), waiter, granted=False)


@pytest.mark.usefixtures("stalled_line")
def test_who_does_not_wait_never_stands_in_line(monkeypatch: Any) -> None:
    monkeypatch.setattr("distlock.lookout.Lookout.join", None)
    lease = lock("x").try_acquire()
    assert lease is not None
    lease.release()
    lock("x", wait=0).acquire().release()
    with lock("x", wait=0):
        assert in_thread(lambda: lock("x").try_acquire()) is None
        with pytest.raises(LockBusy):
            in_thread(lambda: lock("x").acquire(wait=0))
    assert in_line("x") == 1


@pytest.mark.usefixtures("stalled_line")
def test_the_last_try_comes_at_the_deadline() -> None:
    started = time.monotonic()
    lock("x").acquire(wait=0.5).release()
    assert 0.5 <= time.monotonic() - started < 0.9


# -- where no other connection can see -----------------------------------------------------------


@pytest.mark.vendor("postgresql")  # on MariaDB a try inside a transaction pins the row
class TestWaitingInATestCase(TestCase):
    def test_it_polls_by_itself(self) -> None:
        holder = Waiter("x", hold=0.6)
        while not holder.granted:
            time.sleep(0.01)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("distlock.lookout.Lookout.join", None)
            with statements() as said, lock("x", wait=10):
                pass
        holder.result()
        assert 3 <= len(said) < 60

    @classmethod
    def tearDownClass(cls) -> None:
        super().tearDownClass()
        with other_session() as cursor:  # what the holder committed
            cursor.execute("DELETE FROM distlock_distributedlock")


IN_MEMORY = """
import threading, time, django
django.setup()
from django.core.management import call_command
from django.db import connection
from distlock import LockBusy, lock
call_command("migrate", verbosity=0)
lease = lock("x", ttl=0.7, renew=False).acquire()
lease._released = True
lease._context.forget(lease._term)
started = time.monotonic()
with lock("x", wait=5):
    waited = time.monotonic() - started
names = [thread.name for thread in threading.enumerate()]
print(0.6 < waited < 1.3, [name for name in names if "lookout" in name])
"""


@pytest.mark.vendor("sqlite")
def test_a_database_in_memory_is_polled() -> None:
    said = output_of(IN_MEMORY, environ={"DISTLOCK_TEST_URL": "sqlite:///:memory:"})
    assert said == "True []\n"
