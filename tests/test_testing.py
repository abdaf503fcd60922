"""`distlock.testing` under `TestCase` and `TransactionTestCase`, and among threads and tasks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.core.management import call_command
from django.db import connection, connections, transaction
from django.test import TestCase, TransactionTestCase

from distlock import AlreadyHeld, LockBusy, LockError, LockLost, lock, once
from distlock.backends.base import TABLE
from distlock.connections import in_testcase
from distlock.deadlines import Deadline, Limit
from distlock.deadlines import clock as engine_clock
from distlock.keeper import keeper
from distlock.lookout import lookout
from distlock.models import DistributedLock
from distlock.signals import lock_lost
from distlock.terms import Term
from distlock.testing import (
    aassert_locked,
    aassert_not_locked,
    aexpire,
    alose,
    assert_locked,
    assert_not_locked,
    clocks,
    expire,
    fake_clock,
    held_by_another,
    locks_disabled,
    lose,
)
from tests.support import eventually, in_thread, is_free, other_session

servers = pytest.mark.vendor("postgresql", "mysql")


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer, in real time."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


class Others:
    """What others do to a lock."""

    def test_a_lock_held_by_another_is_busy_and_says_by_whom(self) -> None:
        with held_by_another("x", note="the night job") as holder:
            with pytest.raises(LockBusy, match=r"another holder.*another-host, the night job") as e:
                lock("x").acquire(wait=0)
            assert e.value.holder == holder
            assert (holder.name, holder.note) == ("x", "the night job")
            assert holder.pid != os.getpid()
            assert lock("y").try_acquire().release() is None  # type: ignore[union-attr]
        with lock("x", wait=0) as lease:
            assert lease.token > holder.token

    @held_by_another("x")
    def test_a_decorated_test(self) -> None:
        assert lock("x").try_acquire() is None

    @held_by_another("x")
    async def test_a_decorated_coroutine(self) -> None:
        assert await lock("x").atry_acquire() is None
        async with held_by_another("y"):
            assert await lock("y").atry_acquire() is None
        async with lock("y", wait=0):
            pass

    def test_a_decorated_function_may_be_called_again(self) -> None:
        @held_by_another("x")
        def busy() -> bool:
            return lock("x").try_acquire() is None

        assert busy()
        assert_not_locked("x")
        assert busy()

    def test_what_is_held_cannot_be_held_by_another(self) -> None:
        with lock("x", note="mine"), pytest.raises(AssertionError, match=r"held already.*mine"):
            held_by_another("x").__enter__()

    def test_one_of_another_that_ends(self) -> None:
        with held_by_another("x", ttl=0.05):
            lock("x", wait=5).acquire().release()
        lock("x", wait=0).acquire().release()

    def test_inside_a_transaction(self) -> None:
        with transaction.atomic(), held_by_another("x"):
            assert lock("x").try_acquire() is None
        assert_not_locked("x")

    def test_a_lost_lease_is_told_everywhere(self) -> None:
        told: list[str] = []

        def note(sender: object, *, lease: Any, **more: object) -> None:
            told.append(lease.owner)

        lock_lost.connect(note)
        lease = lock("x").acquire()
        lose(lease)
        assert lease.lost
        assert lease.remaining == 0
        for tells in (lease.check, lease.renew, lease.release):
            with pytest.raises(LockLost, match="another owner"):
                tells()
        assert assert_locked("x").token > lease.token
        assert eventually(lambda: told.count(lease.owner) == 1)  # of others, earlier tests may tell
        lock_lost.disconnect(note)

    def test_the_end_of_a_block_tells_the_loss(self) -> None:
        with pytest.raises(LockLost), lock("x") as lease:
            lose(lease)
        with pytest.raises(LockLost), lock("y") as lease:
            lose(lease, known=False)

    def test_a_loss_that_nobody_has_noticed(self) -> None:
        lease = lock("x").acquire()
        lose(lease, known=False)
        lease.check()
        assert not lease.lost
        with pytest.raises(LockLost), transaction.atomic():
            lease.guard()
        assert lease.lost
        other = lock("y").acquire()
        lose(other, known=False)
        with pytest.raises(LockLost):
            other.release()

    def test_atomic_work_of_a_loser_is_not_committed(self) -> None:
        for known in (True, False):
            with suppress(LockLost), lock("x", atomic=True) as lease:
                DistributedLock.objects.create(name="work")
                if connection.vendor == "sqlite" and not in_testcase(connection):
                    with pytest.raises(RuntimeError, match="running transaction"):
                        lose(lease, known=known)
                    raise LockLost
                lose(lease, known=known)
            assert not DistributedLock.objects.filter(name="work").exists()
            expire("x") if lock("x").holder() else None

    def test_losing_once_more(self) -> None:
        lease = lock("x").acquire()
        lose(lease, known=False)
        lose(lease)
        assert lease.lost
        with pytest.raises(AssertionError, match=r"'x'.*lost"):
            lose(lease)
        with pytest.raises(LockLost):
            lease.release()

    def test_an_expired_lock_is_free(self) -> None:
        with held_by_another("x"):
            expire("x")
            with lock("x", wait=0):
                pass
            assert_not_locked("x")
        assert_not_locked("x")

    def test_ones_own_expired_lease_is_lost(self) -> None:
        with pytest.raises(LockLost, match="not renewed in time"), lock("x") as lease:
            expire("x")
            assert lease.lost
            assert_not_locked("x")

    def test_what_min_hold_keeps_can_expire(self) -> None:
        with lock("x", min_hold=60):
            pass
        assert_locked("x")
        expire("x")
        lock("x", wait=0).acquire().release()

    def test_what_nobody_holds_cannot_expire(self) -> None:
        with pytest.raises(AssertionError, match=r"Nobody holds the lock 'x'. No lock is held."):
            expire("x")

    def test_messages_say_who_holds_what(self) -> None:
        with lock("y", note="why"), lock("z"):
            with pytest.raises(AssertionError, match=r"Nobody holds .*'x'. These .*: 'y', 'z'\."):
                assert_locked("x")
            with pytest.raises(
                AssertionError, match=rf"'y' is held by .*{os.getpid()}.*, why: tok"
            ):
                assert_not_locked("y")
            assert assert_locked("y").note == "why"
            assert_not_locked("x")

    async def test_in_a_coroutine(self) -> None:
        async with lock("x") as lease:
            await aassert_locked("x")
            for blocks in (lose, lambda lease: expire("x"), lambda lease: lock("x").holder()):
                with pytest.raises(SynchronousOnlyOperation):
                    blocks(lease)
            with pytest.raises(LockLost):
                await alose(lease)
                await lease.acheck()
            with pytest.raises(LockLost):
                await lease.arelease()
        await aexpire("x")
        await aassert_not_locked("x")


class Clocks:
    """Time that passes at once."""

    def test_a_lease_without_renewals_ends(self) -> None:
        with fake_clock() as clock, pytest.raises(LockLost):
            with lock("x", ttl=30, renew=False) as lease:
                clock.advance(20)
                assert 7 < lease.remaining < 10
                lease.check()
                clock.advance(timedelta(seconds=11))
                assert_not_locked("x")
                assert lease.lost

    def test_a_lease_is_renewed_meanwhile(self) -> None:
        with within(10), fake_clock() as clock, lock("x", ttl=30) as lease:
            clock.advance(600)
            lease.check()
            assert lease.remaining > 17
            assert assert_locked("x").token == lease.token

    def test_max_hold_ends_the_renewals(self) -> None:
        with fake_clock() as clock, lock("x", ttl=30, max_hold=100) as lease:
            clock.advance(100)
            lease.check()
            clock.advance(30)
            assert lease.lost
            assert_not_locked("x")
            with pytest.raises(LockLost):
                lease.release()

    def test_a_loss_is_noticed_at_the_next_renewal(self) -> None:
        with fake_clock() as clock, pytest.raises(LockLost), lock("x", ttl=30) as lease:
            lose(lease, known=False)
            clock.advance(9)
            lease.check()
            clock.advance(2)
            assert lease.lost

    def test_nobody_sleeps_for_a_lock_that_another_holds(self) -> None:
        with within(5), fake_clock(), held_by_another("x"):
            started = engine_clock()
            with pytest.raises(LockBusy) as e:
                lock("x", wait=3600).acquire()
            assert 3600 <= e.value.waited < 3605
            assert engine_clock() - started >= 3600

    def test_one_waits_for_the_end_of_anothers_lease_and_no_longer(self) -> None:
        with within(5), fake_clock(), held_by_another("x", ttl=40):
            started = engine_clock()
            with lock("x", wait=None):
                assert 39 < engine_clock() - started < 45
            assert 39e6 < DistributedLock.objects.get(name="x").longest_wait < 45e6

    def test_min_hold_passes(self) -> None:
        with within(5), fake_clock() as clock:
            with lock("x", min_hold=50):
                clock.advance(20)
            assert_locked("x")
            started = engine_clock()
            with lock("x", wait=60):
                assert 29 < engine_clock() - started < 31

    def test_ones_own_leases_are_renewed_while_one_waits(self) -> None:
        with within(10), fake_clock(), held_by_another("x"), lock("y", ttl=30) as lease:
            with pytest.raises(LockBusy):
                lock("x", wait=120).acquire()
            lease.check()
            assert_locked("y")

    def test_a_decorated_test_and_a_block_in_a_block(self) -> None:
        @fake_clock()
        @held_by_another("x")
        def busy() -> None:
            with fake_clock() as clock:
                clock.advance(1)
            with pytest.raises(LockBusy):
                lock("x", wait=30).acquire()

        with within(5):
            busy()

    def test_without_it_one_sleeps_as_ever(self) -> None:
        @fake_clock()
        def nested(times: int) -> None:
            if times:
                nested(times - 1)

        nested(2)
        started = time.monotonic()
        with held_by_another("x"), pytest.raises(LockBusy):
            lock("x", wait=0.3).acquire()
        assert time.monotonic() - started >= 0.3

    def test_what_was_long_ago_can_be_purged(self) -> None:
        lock("x").acquire().release()
        with fake_clock() as clock:
            call_command("purge_locks", verbosity=0)
            assert DistributedLock.objects.filter(name="x").exists()
            clock.advance(timedelta(days=31))
            call_command("purge_locks", verbosity=0)
        assert not DistributedLock.objects.filter(name="x").exists()

    def test_a_receipt_expires(self) -> None:
        runs: list[int] = []
        job = once("k", keep=3600)
        with fake_clock() as clock:
            for seconds, expected in ((0, 1), (3500, 1), (200, 2)):
                clock.advance(seconds)
                job.run(runs.append, 1)
                assert len(runs) == expected

    async def test_in_a_coroutine(self) -> None:
        with within(5), fake_clock() as clock:
            async with lock("x", ttl=30, renew=False) as lease:
                with pytest.raises(SynchronousOnlyOperation):
                    clock.advance(1)
                await clock.aadvance(20)
                assert lease.remaining < 10
            async with held_by_another("y"):
                with pytest.raises(LockBusy) as e:
                    await lock("y").aacquire(wait=60)
            assert 60 <= e.value.waited < 62


class Disabled:
    """Code in which locks do not matter."""

    def test_everything_is_granted_without_sql(self) -> None:
        with self.assertNumQueries(0), locks_disabled():  # type: ignore[attr-defined]
            with lock("x", ttl=30, renew=False) as first, fake_clock() as clock:
                second = in_thread(lambda: lock("x").acquire(wait=0))
                assert second.token > first.token
                clock.advance(3600)
                first.check()
                first.renew()
                assert assert_locked("x").token == second.token
                second.release()
                second.release()
                assert lock("x").holder().owner == first.owner  # type: ignore[union-attr]
            assert_not_locked("x")
        assert DistributedLock.objects.count() == 0
        with held_by_another("x"):
            assert lock("x").try_acquire() is None

    @locks_disabled()
    def test_wrong_use_is_still_wrong(self) -> None:
        with lock("x", reentrant=True) as outer:
            with pytest.raises(AlreadyHeld):
                lock("x").acquire()
            with lock("x", reentrant=True) as inner:
                assert inner.token == outer.token
            with pytest.raises(RuntimeError, match="needs an open transaction"):
                outer.guard()
            with transaction.atomic():
                outer.guard()
        with pytest.raises(ValueError, match="name"):
            lock("")
        for useless in (lambda: held_by_another("x").__enter__(), lambda: expire("x")):
            with pytest.raises(RuntimeError, match="Locks are disabled"):
                useless()

    @locks_disabled()
    async def test_in_a_coroutine(self) -> None:
        async with lock("x") as lease:
            await lease.arenew()
            async with locks_disabled():
                later = await asyncio.create_task(lock("x").aacquire(wait=0))
                await later.arelease()
        assert later.token > lease.token

    @locks_disabled()
    def test_transactions_are_the_users_own(self) -> None:
        with lock("x", atomic=True):
            DistributedLock.objects.create(name="work")
        assert DistributedLock.objects.filter(name="work").exists()
        with transaction.atomic():
            with lock("x"):
                pass
            assert_not_locked("x")
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            lease = lock("x").acquire()
            1 / 0
        lease.release()

    def test_leases_do_not_outlive_the_block_nor_enter_it(self) -> None:
        before = lock("x").acquire()
        with locks_disabled():
            inside = lock("y").acquire()
            with pytest.raises(LockError, match="before locks were disabled"):
                before.release()
        inside.release()
        expire("x")


class Real(TransactionTestCase):
    """Where transactions are real, and other connections see what is committed."""

    available_apps = ["distlock"]


class OthersInATestCase(Others, TestCase):
    pass


class OthersInATransactionTestCase(Others, Real):
    pass


class ClocksInATestCase(Clocks, TestCase):
    pass


class ClocksInATransactionTestCase(Clocks, Real):
    pass


class DisabledInATestCase(Disabled, TestCase):
    pass


class DisabledInATransactionTestCase(Disabled, Real):
    pass


# -- threads, tasks and transactions -------------------------------------------------------------

real = pytest.mark.django_db(transaction=True, available_apps=["distlock"])


def waiter(wait: float | None) -> tuple[threading.Thread, list[Any]]:
    """A thread that waits for the lock "x", and what becomes of that."""
    ended: list[Any] = []

    def run() -> None:
        try:
            lock("x", wait=wait).acquire().release()
            ended.append("granted")
        except LockBusy as busy:
            ended.append(busy.waited)
        finally:
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended


@real
def test_who_waits_for_a_thread_of_this_process_waits_for_it() -> None:
    with fake_clock():
        lease = lock("x").acquire()
        started = engine_clock()
        thread, ended = waiter(30)
        time.sleep(0.3)
        assert not ended
        lease.release()
        thread.join(10)
        assert ended == ["granted"]
        assert engine_clock() - started < 10


@real
def test_a_wait_without_an_end_for_a_holder_that_lives_is_a_real_one() -> None:
    with fake_clock():
        started = engine_clock()
        with held_by_another("x"):
            thread, ended = waiter(None)
            time.sleep(0.3)
            assert not ended
        thread.join(10)
        assert ended == ["granted"]
        assert engine_clock() - started < 10


@real
def test_all_whose_wait_is_over_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlock.waiting.DOUBT", 30.0)  # nobody looks at the clock by himself
    with fake_clock() as clock, lock("x"):
        waiters = [waiter(wait) for wait in (300, 60, 70, 60)]
        line = lookout("default")._queues
        assert eventually(lambda: ("x", 0) in line and len(line["x", 0].waiters) == 4)
        clock.advance(61)
        for index in (1, 3):
            waiters[index][0].join(10)
            assert 60 <= waiters[index][1][0] < 75
        assert not waiters[0][1]
        assert not waiters[2][1]
    for thread, _ in waiters:
        thread.join(10)
    assert waiters[0][1] == waiters[2][1] == ["granted"]


@servers
@real
def test_a_lock_that_a_transaction_has_pinned_is_waited_for() -> None:
    """Nobody can tell when that ends."""
    lock("x").acquire().release()
    with fake_clock(), other_session() as other:
        other.execute("BEGIN")
        other.execute(f"SELECT 1 FROM {TABLE} WHERE name = 'x' FOR UPDATE")
        started = time.monotonic()
        with pytest.raises(LockBusy):
            lock("x", wait=0.3).acquire()
        assert time.monotonic() - started >= 0.3


@real
def test_a_fair_wait_passes_too() -> None:
    with within(5), fake_clock(), held_by_another("x"):
        with pytest.raises(LockBusy):
            lock("x", wait=600, fair=True).acquire()


@servers  # SQLite gives the lock to nobody else before that transaction ends
@real
def test_time_passes_in_a_transaction_but_for_the_rows_that_it_has_locked() -> None:
    with fake_clock() as clock, transaction.atomic():
        with pytest.raises(LockLost), lock("x", ttl=30, renew=False):
            clock.advance(31)
        transaction.set_rollback(True)
    with fake_clock() as clock, transaction.atomic():
        with lock("x", ttl=30, renew=False):
            pass
        with within(2):
            clock.advance(31)
    assert is_free("x")
    with fake_clock() as clock, held_by_another("y", ttl=30), transaction.atomic():
        clock.advance(31)
        assert is_free("y")


@servers
@real
def test_nobody_can_take_a_lock_that_a_transaction_keeps() -> None:
    with lock("x") as lease:
        with transaction.atomic():
            lease.guard()
            for known in (True, False):
                with pytest.raises(RuntimeError, match="guard"):
                    lose(lease, known=known)
        lease.check()
        assert assert_locked("x").owner == lease.owner
    with transaction.atomic():
        with lock("x") as lease:
            pass
        with pytest.raises(RuntimeError, match="running transaction"):
            expire("x")


@real
def test_a_renewal_while_time_passes_is_never_trusted_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = clocks._age

    def renew_and_age(alias: str, microseconds: int) -> None:
        lease.renew()
        original(alias, microseconds)

    monkeypatch.setattr(clocks, "_age", renew_and_age)
    with fake_clock() as clock, lock("x", ttl=100, renew=False) as lease:
        clock.advance(60)
        assert lease.remaining < 40


@real
def test_a_keeper_that_hangs_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clocks, "PATIENCE", 0.2)
    monkeypatch.setattr(clocks, "look_at_the_time", lambda: None)
    with fake_clock() as clock, lock("x", ttl=300):
        with pytest.raises(TimeoutError, match="'x'"):
            clock.advance(150)


@real
def test_the_keeper_makes_the_renewals_of_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    renewed: list[float] = []
    confirm = Term.confirm

    def note(term: Term, *args: Any, **more: Any) -> None:
        renewed.append(round(engine_clock() - started))
        confirm(term, *args, **more)

    with fake_clock() as clock, lock("x", ttl=30) as lease:
        assert keeper.keeps(lease._term)
        started = engine_clock()
        monkeypatch.setattr(Term, "confirm", note)
        clock.advance(60)
        monkeypatch.undo()
    assert renewed[:5] == [10, 20, 30, 40, 50]


@real
def test_a_task_of_this_process_is_waited_for() -> None:
    async def main() -> float:
        started = engine_clock()
        async with lock("x"):
            later = asyncio.create_task(lock("x", wait=30).aacquire())
            await asyncio.sleep(0.1)
            assert not later.done()
        await (await later).arelease()
        await sync_to_async(connections.close_all)()
        return engine_clock() - started

    with fake_clock():
        assert asyncio.run(main()) < 10


@pytest.mark.vendor("sqlite")
def test_how_long_a_statement_may_take_is_real_time() -> None:
    limit, deadline = Limit(30), Deadline(30)
    with locks_disabled(), fake_clock() as clock:
        clock.advance(60)
    assert limit.left > 29
    assert deadline.left == 0


@pytest.mark.vendor("sqlite")
def test_other_aliases_get_older_if_they_are_named() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        fake_clock(using=["default", "nowhere"])


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_an_alias_of_ones_own() -> None:
    for using in ("other", ["default", "other"]):
        with within(5), fake_clock(using=using) as clock:
            with held_by_another("x", using="other", ttl=60), pytest.raises(LockBusy):
                lock("x", using="other", wait=30).acquire()
            with held_by_another("y", using="other", ttl=60):
                clock.advance(61)
                assert_not_locked("y", using="other")


@pytest.mark.parametrize("useless", [type, object(), "x"])
@pytest.mark.vendor("sqlite")
def test_what_is_no_function_is_not_decorated(useless: Any) -> None:
    with pytest.raises(TypeError, match="setUp"):
        held_by_another("x")(useless)


@pytest.mark.vendor("sqlite")
@pytest.mark.parametrize(
    ("wrong", "argument"),
    [
        (lambda: held_by_another(""), "name"),
        (lambda: held_by_another("x", ttl=-1), "ttl"),
        (lambda: held_by_another("x", using="nowhere"), "nowhere"),
        (lambda: fake_clock(using="nowhere"), "nowhere"),
        (lambda: fake_clock().advance(-1), "seconds"),
    ],
)
def test_bad_arguments(wrong: Any, argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        wrong()


OUTSIDE_OF_TESTS = """
import django
from django.conf import settings
sqlite = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
settings.configure(INSTALLED_APPS=["distlock"], DATABASES={"default": sqlite})
django.setup()
from distlock.testing import fake_clock, locks_disabled
for block in fake_clock, locks_disabled:
    try:
        block()
    except RuntimeError as error:
        print(error)
from django.test.utils import setup_test_environment
setup_test_environment()
with locks_disabled(), fake_clock():
    print("works")
"""


@pytest.mark.vendor("sqlite")
def test_they_are_refused_outside_of_tests() -> None:
    environ = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", OUTSIDE_OF_TESTS],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.count("is for tests only") == 2
    assert done.stdout.endswith("works\n")
    assert "locks_disabled: until the end of this block" in done.stderr
