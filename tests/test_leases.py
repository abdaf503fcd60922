"""Holding, losing and giving back, outside transactions."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
import warnings
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, connections, transaction
from django.test import TestCase, override_settings

from distlock import AlreadyHeld, Lease, LockBusy, LockError, LockLost, lock
from distlock.connections import private
from distlock.keeper import keeper
from distlock.signals import lock_acquired, lock_busy, lock_lost, lock_released
from tests.support import becomes_free, in_thread, is_free, other_session, row, steal

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")


# -- holding ---------------------------------------------------------------------------


def test_a_block_holds_the_lock_for_its_length() -> None:
    with lock("x") as lease:
        assert not is_free("x")
        lease.check()
        assert 25 < lease.remaining <= 30
        assert lease.expires_at - lease.acquired_at == timedelta(seconds=30)
    assert is_free("x")
    with pytest.raises(LockLost, match="released"):
        lease.check()


def test_tokens_grow() -> None:
    tokens = []
    for _ in range(5):
        with lock("x") as lease:
            tokens.append(lease.token)
    assert tokens == sorted(set(tokens))


def test_holder_says_who_and_why() -> None:
    with lock("x", note="month end") as lease:
        holder = lock("x").holder()
        assert holder is not None
        assert (holder.owner, holder.token, holder.pid) == (lease.owner, lease.token, os.getpid())
        assert (holder.note, holder.thread) == ("month end", threading.current_thread().name)
        assert holder.acquired_at == lease.acquired_at
        assert pickle.loads(pickle.dumps(holder)) == holder
    assert lock("x").holder() is None


def test_busy_tells_the_holder_and_the_time_waited() -> None:
    with lock("x", note="because"):
        with pytest.raises(LockBusy) as caught:
            in_thread(lambda: lock("x", wait=0.2).acquire())
    busy = caught.value
    assert busy.name == "x"
    assert busy.holder is not None
    assert busy.holder.note == "because"
    assert 0.2 <= busy.waited < 5
    assert isinstance(busy, TimeoutError)


def test_try_acquire_gives_a_lease_or_none() -> None:
    lease = lock("x").try_acquire()
    assert isinstance(lease, Lease)
    assert in_thread(lock("x").try_acquire) is None
    lease.release()
    lease.release()  # a second time does nothing
    assert is_free("x")


def test_a_waiter_is_granted_after_the_release() -> None:
    lease = lock("x").acquire()
    threading.Timer(0.2, lambda: (lease.release(), connections.close_all())).start()
    assert becomes_free("x", 5)


def test_one_description_serves_many_threads() -> None:
    shared = lock("x", wait=20)
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(5):
            with shared:
                inside.append(1)
                most.append(len(inside))
                inside.pop()
        connections.close_all()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(most) == 20
    assert max(most) == 1


def test_a_lease_may_be_released_by_another_thread() -> None:
    lease = lock("x").acquire()
    in_thread(lease.release)
    assert is_free("x")
    with lock("x"):
        pass


# -- nesting ---------------------------------------------------------------------------


def test_the_same_thread_does_not_wait_for_itself() -> None:
    with lock("x"), pytest.raises(AlreadyHeld, match="reentrant=True"):
        lock("x", wait=None).acquire()


def test_reentrant_nests_with_the_same_token() -> None:
    with lock("x", reentrant=True) as outer:
        with lock("x", reentrant=True) as inner:
            assert inner.token == outer.token
        assert not is_free("x")
        outer.check()
    assert is_free("x")


def test_a_nested_block_is_told_of_a_loss_as_well() -> None:
    with pytest.raises(LockLost), lock("x", ttl=0.2, renew=False):
        with pytest.raises(LockLost), lock("x", reentrant=True):
            time.sleep(0.3)


def test_reentrancy_sends_no_sql(django_assert_num_queries: Any) -> None:
    with lock("x"), django_assert_num_queries(0), lock("x", reentrant=True):
        pass


def test_reentrancy_belongs_to_the_thread() -> None:
    with lock("x", reentrant=True):
        assert in_thread(lambda: lock("x", reentrant=True).try_acquire()) is None


def test_a_lost_lease_does_not_nest() -> None:
    first = lock("x", ttl=0.2, renew=False).acquire()
    time.sleep(0.3)
    with lock("x") as second:
        assert second.token > first.token
    with pytest.raises(LockLost):
        first.release()


def test_a_lease_that_nobody_may_trust_does_not_nest() -> None:
    """Even if the keeper has not looked at it yet."""
    first = lock("x", renew=False).acquire()
    time.sleep(0.2)  # now the keeper sleeps
    first._term.trusted_until = 0.0
    with pytest.raises(LockBusy):
        lock("x", wait=0).acquire()
    with pytest.raises(LockLost):
        first.release()


# -- one round trip each ---------------------------------------------------------------


@servers
def test_acquire_and_release_are_one_statement_each(django_assert_num_queries: Any) -> None:
    if connection.vendor == "mysql" and not connection.mysql_is_mariadb:
        pytest.skip("MySQL has no RETURNING")
    connection.close()  # one that is used often has its statements planned once
    lock("x").acquire().release()
    with django_assert_num_queries(1):
        lease = lock("x").acquire()
    with django_assert_num_queries(1):
        lease.release()


# -- losing ----------------------------------------------------------------------------


def test_leaving_after_a_loss_raises() -> None:
    with pytest.raises(LockLost) as caught, lock("x", ttl=0.2, renew=False) as lease:
        time.sleep(0.3)
        assert lease.lost
        with pytest.raises(LockLost):
            lease.check()
    assert (caught.value.name, caught.value.token) == ("x", lease.token)


def test_a_loss_does_not_hide_the_bodys_exception() -> None:
    with pytest.raises(ZeroDivisionError), lock("x", ttl=0.2, renew=False):
        time.sleep(0.3)
        1 / 0


def test_a_late_release_leaves_the_next_holder_alone() -> None:
    lease = lock("x", ttl=60, renew=False).acquire()
    steal("x")
    thief = row("x")
    with pytest.raises(LockLost):
        lease.release()
    lease.release()  # told once
    assert row("x") == thief


def test_an_expired_lease_is_not_renewed_back_to_life() -> None:
    lease = lock("x", ttl=60, renew=False).acquire()
    with other_session() as cursor:
        cursor.execute("UPDATE distlock_distributedlock SET expires_at = '2000-01-01 00:00:00.0'")
    with pytest.raises(LockLost):
        lease.renew()
    assert is_free("x")


@servers
def test_a_renewal_that_meets_a_locked_row_changes_nothing() -> None:
    with lock("x", ttl=5, renew=False) as lease:
        before = lease.expires_at
        with other_session() as cursor:
            cursor.execute("BEGIN")
            cursor.execute("SELECT 1 FROM distlock_distributedlock WHERE name = 'x' FOR UPDATE")
            with pytest.raises(LockError, match="was not renewed"):
                lease.renew()
            cursor.execute("ROLLBACK")
        assert lease.expires_at == before
        lease.check()


def test_renew_extends_and_may_change_the_ttl() -> None:
    with lock("x", ttl=5, renew=False) as lease:
        before = lease.expires_at
        time.sleep(0.05)
        lease.renew()
        assert before < lease.expires_at < before + timedelta(seconds=3)
        lease.renew(ttl=timedelta(minutes=5))
        assert lease.expires_at > before + timedelta(minutes=4)
        assert 280 < lease.remaining < 300
        assert row("x")["ttl"] == 300_000_000


def test_dropping_the_last_reference_warns_and_stops_the_renewals() -> None:
    lease = lock("x", ttl=0.6).acquire()
    held = [lease]
    del lease
    with pytest.warns(ResourceWarning, match="without release"):
        held.clear()
    assert becomes_free("x", 2)
    with lock("x"):
        pass


# -- how long it is held ---------------------------------------------------------------


def test_min_hold_keeps_it_after_the_release() -> None:
    start = time.monotonic()
    with lock("x", min_hold=0.6):
        pass
    assert not is_free("x")
    holder = lock("x").holder()
    assert holder is not None
    assert holder.owner == ""
    assert becomes_free("x", 2)
    assert time.monotonic() - start >= 0.59


@servers
def test_min_hold_survives_a_rollback() -> None:
    with pytest.raises(ZeroDivisionError), transaction.atomic(), lock("x", min_hold=0.6):
        1 / 0
    assert not is_free("x")
    assert becomes_free("x", 2)


def test_min_hold_longer_than_ttl_sets_the_first_expiry() -> None:
    with lock("x", ttl=1, min_hold=5) as lease:
        assert lease.expires_at - lease.acquired_at == timedelta(seconds=5)


def test_max_hold_stops_the_renewals() -> None:
    with pytest.raises(LockLost), lock("x", ttl=0.6, max_hold=0.7) as lease:
        time.sleep(0.5)
        assert not lease.lost
        time.sleep(1.2)
        assert lease.lost


# -- crash_safe ------------------------------------------------------------------------


def test_crash_safe_false_is_held_and_released_all_the_same() -> None:
    with lock("x", crash_safe=False):
        assert not is_free("x")
    assert is_free("x")


# -- a lost connection -----------------------------------------------------------------


@servers
def test_a_dead_connection_is_replaced_and_the_grant_found_again() -> None:
    from tests.support import kill_session

    connection.ensure_connection()
    kill_session()
    with lock("x") as lease:
        kill_session()
        assert not lease.lost
    assert is_free("x")


# -- signals ---------------------------------------------------------------------------


def test_signals_tell_the_story() -> None:
    story: list[tuple[str, dict[str, Any]]] = []
    signals = {
        "acquired": lock_acquired,
        "busy": lock_busy,
        "released": lock_released,
        "lost": lock_lost,
    }

    def receiver(name: str) -> Any:
        def receive(sender: Any, signal: Any, **more: Any) -> None:
            about = more["lease"].name if "lease" in more else more["name"]
            if about.startswith("story"):  # another test's lease may be lost meanwhile
                story.append((name, more))

        return receive

    receivers = {name: receiver(name) for name in signals}
    for name, signal in signals.items():
        signal.connect(receivers[name])
    try:
        with lock("story 1"):
            with pytest.raises(LockBusy):
                in_thread(lambda: lock("story 1", wait=0).acquire())
        with pytest.raises(LockLost), lock("story 2", ttl=0.2, renew=False):
            time.sleep(0.5)
        time.sleep(0.1)
    finally:
        for name, signal in signals.items():
            signal.disconnect(receivers[name])
    assert [name for name, _ in story] == ["acquired", "busy", "released", "acquired", "lost"]
    assert set(story[0][1]) == {"lease", "waited", "took"}
    assert set(story[1][1]) == {"name", "holder", "waited"}
    assert set(story[2][1]) == {"lease", "held"}
    assert set(story[4][1]) == {"lease", "reason"}


def test_a_receiver_that_raises_changes_nothing() -> None:
    def fail(**kwargs: Any) -> None:
        raise RuntimeError

    lock_acquired.connect(fail)
    lock_released.connect(fail)
    try:
        with lock("x"):
            assert not is_free("x")
        assert is_free("x")
    finally:
        lock_acquired.disconnect(fail)
        lock_released.disconnect(fail)


# -- settings --------------------------------------------------------------------------


def test_settings_give_the_defaults() -> None:
    with override_settings(DISTLOCK={"TTL": 5, "WAIT": 0, "USING": "other"}):
        with lock("x") as lease:
            assert lease.expires_at - lease.acquired_at == timedelta(seconds=5)
            assert lock("x", using="default").holder() is None
            with pytest.raises(LockBusy) as caught:
                in_thread(lambda: lock("x").acquire())
            assert caught.value.waited < 1


# -- tests of users --------------------------------------------------------------------


class InsideTestCase(TestCase):
    """The blocks that TestCase opened do not count, and its own connection is used."""

    def test_held_and_released_at_the_end_of_the_block(self) -> None:
        with lock("x") as lease:
            assert lock("x").holder() is not None
            lease.check()
        assert lock("x").holder() is None

    def test_inside_the_users_own_atomic(self) -> None:
        with transaction.atomic(), lock("x"):
            pass
        assert lock("x").holder() is None
        with pytest.raises(ZeroDivisionError), transaction.atomic(), lock("x"):
            1 / 0
        assert lock("x").holder() is None

    def test_atomic_lock(self) -> None:
        with lock("x", atomic=True) as lease:
            lease.guard()
        assert lock("x").holder() is None

    def test_guard_outside_a_transaction_of_ones_own_is_an_error_here_too(self) -> None:
        with lock("x") as lease, pytest.raises(RuntimeError, match="transaction"):
            lease.guard()

    def test_busy_for_another_holder(self) -> None:
        lease = lock("x").acquire()
        assert in_thread(lambda: True)
        lease.release()

    @classmethod
    def tearDownClass(cls) -> None:
        super().tearDownClass()
        with other_session() as cursor:
            cursor.execute("SELECT count(*) FROM distlock_distributedlock WHERE name = 'x'")
            assert cursor.fetchone()[0] == 0


# -- forks -----------------------------------------------------------------------------


def in_fork(function: Any) -> None:
    """Run a function in a forked child; its exception fails the test."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            function()
            os.write(writer, b"ok")
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    said = b""
    while chunk := os.read(reader, 4096):
        said += chunk
    os.waitpid(pid, 0)
    os.close(reader)
    assert said == b"ok", said.decode()


def test_a_forked_child_owns_nothing_of_its_parents() -> None:
    with transaction.atomic():
        pass
    lease = lock("x", ttl=0.9).acquire()
    time.sleep(0.5)  # the keeper has a connection by now

    def child() -> None:
        assert lease.lost
        assert lease.__exit__(None, None, None) is None
        with pytest.raises(LockLost, match="fork"):
            lease.check()
        with pytest.raises(LockLost, match="fork"):
            lease.release()
        assert keeper._rounds == {}
        assert private("default")._connection is None
        gc.collect()

    in_fork(child)
    time.sleep(1)
    lease.check()  # the parent's keeper goes on, on its own session
    assert not is_free("x")
    lease.release()


def test_a_forked_child_takes_locks_of_its_own() -> None:
    with lock("x"):

        def child() -> None:
            for one in connections.all(initialized_only=True):
                one.connection = None  # Django's own rule: a child does not use inherited ones
            assert lock("x").try_acquire() is None
            with lock("y", ttl=0.6) as lease:
                time.sleep(1)
                lease.check()

        in_fork(child)
