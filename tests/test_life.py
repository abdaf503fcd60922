"""What may happen to a lease at a bad moment: closing, collecting, interrupting, adopting."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from django.core.exceptions import SynchronousOnlyOperation
from django.db import connection, connections, transaction

from distlock import AlreadyHeld, LockBusy, LockLost, lock
from distlock.backends import backend_for
from distlock.connections import private
from distlock.keeper import keeper
from distlock.lookout import lookout
from distlock.places import place
from distlock.signals import lock_released
from tests.app.models import Counter
from tests.support import becomes_free, in_thread, is_free, other_session, row, steal

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")
postgresql = pytest.mark.vendor("postgresql")
mysql = pytest.mark.vendor("mysql")


class Boom(Exception):
    pass


@servers
def test_closing_the_connection_inside_the_block_frees() -> None:
    with transaction.atomic(), lock("x", ttl=60):
        connection.close()
    assert becomes_free("x", 2)
    assert Counter.objects.count() == 0


def test_a_lease_is_collected_while_the_keeper_works() -> None:
    """The collector may run in the keeper's own thread, inside its mutex."""
    held = [lock("x", ttl=0.6).acquire()]
    with keeper.rounds("default")._mutex, pytest.warns(ResourceWarning):
        held.clear()
    assert becomes_free("x", 3)


def test_what_the_collector_ends_may_come_to_a_mutex_that_its_thread_has() -> None:
    """A task of a loop that was closed leaves its line, or gives back what it was granted."""

    def collect() -> None:
        lease = lock("x", ttl=60).acquire()
        with keeper.rounds("default")._mutex, lookout("default")._mutex:
            lookout("default").look_soon(("x", 0))
            lease.abandon()

    thread = threading.Thread(target=in_thread, args=(collect,), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert becomes_free("x", 3)


def interrupt_amid_a_statement(on: Any) -> None:
    """Raise between two messages: a statement was sent, and its answer is not fetched."""
    on.ensure_connection()
    if on.vendor == "postgresql":
        on.connection.pgconn.send_query(b"SELECT 1")
    else:
        on.connection.query("SELECT 1")
    raise KeyboardInterrupt


@servers
def test_an_interrupt_does_not_spoil_the_private_connection() -> None:
    with pytest.raises(KeyboardInterrupt), private("default").use() as own:
        interrupt_amid_a_statement(own)
    with transaction.atomic(), lock("x"):
        pass
    assert is_free("x")


def test_releasing_in_the_event_loop_by_mistake_can_be_done_again() -> None:
    lease = lock("x").acquire()

    async def mistake() -> None:
        lease.release()

    with pytest.raises(SynchronousOnlyOperation):
        asyncio.run(mistake())
    assert not is_free("x")
    lease.release()
    assert is_free("x")


def test_an_interrupted_release_is_finished_by_the_keeper(monkeypatch: Any) -> None:
    from distlock.places import Place

    def interrupted(self: Any, statement: Any) -> Any:
        raise KeyboardInterrupt

    lease = lock("x", ttl=60).acquire()
    with monkeypatch.context() as patch:
        patch.setattr(Place, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lease.release()
    assert becomes_free("x", 3)


def test_a_receiver_may_open_a_transaction_and_take_a_lock() -> None:
    seen: list[int] = []

    def receive(lease: Any, **kwargs: Any) -> None:
        if lease.name == "x":
            Counter.objects.get_or_create(name="audit")
            with transaction.atomic(), lock("y"):
                seen.append(1)

    lock_released.connect(receive)
    ran: list[int] = []
    try:
        with transaction.atomic():
            transaction.on_commit(lambda: ran.append(1))
            with lock("x"):
                pass
    finally:
        lock_released.disconnect(receive)
    assert seen == [1]
    assert ran == [1]
    assert is_free("x")
    assert is_free("y")


def test_a_shorter_ttl_is_kept_by_the_keeper() -> None:
    with lock("x", ttl=30) as lease:
        time.sleep(0.1)
        lease.renew(ttl=0.9)
        time.sleep(1.5)
        lease.check()


@servers
def test_renewals_go_on_after_a_rolled_back_release() -> None:
    """At once: the keeper, which passes over what is pinned, would look again too late."""
    lease = lock("x", ttl=2).acquire()
    with pytest.raises(Boom), transaction.atomic():
        lease.release()
        time.sleep(1.5)
        raise Boom
    time.sleep(0.8)
    lease.check()
    lease.release()


@servers
def test_an_adopted_lease_that_outlives_the_commit_is_lost_and_not_silently_released() -> None:
    with transaction.atomic():
        with lock("x"):
            pass
        lease = lock("x").acquire()
        with pytest.raises(AlreadyHeld):
            lock("x").acquire()
    assert lease.lost
    with pytest.raises(LockLost):
        lease.release()
    assert is_free("x")


def test_renewals_do_not_shorten_min_hold() -> None:
    with lock("x", ttl=0.6, min_hold=60) as lease:
        time.sleep(0.8)
        lease.renew()
        lease.check()
        with other_session() as cursor:
            cursor.execute("SELECT count(*) FROM distlock_distributedlock WHERE ttl > 0")
        held = row("x")
        from distlock.backends import backend_for
        from distlock.backends.base import microseconds_of

        backend = backend_for(connection)
        span = microseconds_of(backend.moment_from_db(held["expires_at"]).astimezone()) - (
            microseconds_of(backend.moment_from_db(held["acquired_at"]).astimezone())
        )
        assert span == 60_000_000


@postgresql
def test_a_loss_that_a_savepoint_rollback_meets_is_not_silent() -> None:
    with pytest.raises(LockLost), transaction.atomic():
        Counter.objects.create(name="work", value=1)
        lease = lock("x", renew=False).acquire()
        with pytest.raises(Boom), transaction.atomic():
            lease.release()
            real = connection._savepoint_rollback

            def lose_it(sid: str) -> None:
                del connections["default"].__dict__["_savepoint_rollback"]
                connections["default"].__dict__["_savepoint_rollback"] = real
                type(connections["default"])._savepoint_rollback(connections["default"], sid)
                steal("x")
                real(sid)

            connections["default"].__dict__["_savepoint_rollback"] = lose_it
            raise Boom
    assert not Counter.objects.filter(name="work").exists()


def test_leaving_a_lost_lease_forgets_no_newer_one() -> None:
    old = lock("x", ttl=0.2, renew=False).acquire()
    time.sleep(0.3)
    with lock("x"):
        with pytest.raises(LockLost):
            old.release()
        with pytest.raises(AlreadyHeld):
            lock("x", wait=0).acquire()


def test_a_generator_closed_in_another_thread_gives_back() -> None:
    def work() -> Iterator[int]:
        with lock("x"):
            yield 1

    generator = work()
    assert next(generator) == 1
    in_thread(generator.close)
    assert is_free("x")


def test_two_generators_of_one_description() -> None:
    shared = lock("x")

    def work() -> Iterator[int]:
        with shared:
            yield 1

    first = work()
    next(first)
    with pytest.raises(LockBusy):
        in_thread(lambda: lock("x", wait=0).acquire())
    first.close()
    assert is_free("x")


@servers
def test_autocommit_off_before_the_first_statement_counts_as_a_transaction() -> None:
    connection.close()
    connection.settings_dict["AUTOCOMMIT"] = False
    try:
        lease = lock("x").acquire()
        assert not is_free("x")
        transaction.rollback()
        assert not is_free("x")
    finally:
        connection.settings_dict["AUTOCOMMIT"] = True
        connection.close()
    lease.release()
    assert is_free("x")


@mysql
def test_a_guard_without_renewals_is_checked_again_at_commit() -> None:
    lease = lock("x", ttl=0.3, renew=False).acquire()
    with pytest.raises(LockLost), transaction.atomic():
        lease.guard()
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE guard_probe (id int)")
            cursor.execute("DROP TABLE guard_probe")
        time.sleep(0.4)
        steal("x")
        Counter.objects.create(name="c", value=1)
    assert not Counter.objects.exists()


@servers
def test_a_slow_receiver_does_not_stop_the_keeper() -> None:
    threads: list[str] = []

    def receive(**kwargs: Any) -> None:
        threads.append(threading.current_thread().name)

    lock_released.connect(receive)
    try:
        with transaction.atomic(), lock("x", ttl=60):
            connection.close()
        assert becomes_free("x", 2)
        time.sleep(0.2)
    finally:
        lock_released.disconnect(receive)
    assert threads
    assert not any("keeper" in name for name in threads)


@servers
def test_a_transaction_on_another_alias_is_warned_about_in_autocommit_too() -> None:
    with transaction.atomic(using="other"), pytest.warns(RuntimeWarning, match="'other'"):
        with lock("x"):
            pass


def test_an_atomic_reentrant_function_may_call_itself() -> None:
    @lock("x", atomic=True, reentrant=True)
    def work(depth: int) -> int:
        return depth if depth == 3 else work(depth + 1)

    assert work(0) == 3
    assert is_free("x")


@pytest.mark.vendor("sqlite")
def test_sqlite_holds_what_it_wrote_as_long_as_the_transaction() -> None:
    with lock("x", ttl=0.3, atomic=True):
        time.sleep(0.5)
    with transaction.atomic(), lock("x", ttl=0.3):
        time.sleep(0.5)
    assert is_free("x")


@pytest.mark.vendor("sqlite")
def test_sqlite_a_lease_rolled_back_with_its_transaction_is_lost() -> None:
    with pytest.raises(Boom), transaction.atomic():
        lease = lock("x").acquire()
        raise Boom
    assert lease.lost
    with pytest.raises(LockLost):
        lease.release()
    assert is_free("x")


@pytest.mark.vendor("sqlite")
def test_sqlite_a_lease_that_outlives_its_transaction_is_renewed() -> None:
    with transaction.atomic():
        lease = lock("x", ttl=0.9).acquire()
    time.sleep(1.3)
    lease.check()
    lease.release()


@servers
def test_an_interrupted_statement_does_not_spoil_the_callers_connection() -> None:
    with pytest.raises(KeyboardInterrupt):
        place("default").run(interrupt_amid_a_statement)
    assert Counter.objects.count() == 0


@pytest.mark.parametrize("inside", [False, True])
@servers
def test_an_interrupted_acquire_leaves_no_lease(monkeypatch: Any, inside: bool) -> None:
    backend = backend_for(connection)
    real = type(backend).grant

    def interrupted(*arguments: Any) -> Any:
        monkeypatch.undo()
        assert real(backend, *arguments) is not None
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "grant", interrupted)
    with pytest.raises(KeyboardInterrupt), transaction.atomic() if inside else nullcontext():
        lock("x", ttl=60).acquire()
    assert becomes_free("x", 3)
