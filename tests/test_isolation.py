"""Guard and release as a fence, at each isolation level, while others are at the same row.

"+ snapshot" is MariaDB's `innodb_snapshot_isolation`, which refuses to lock what was written after
a transaction's snapshot; from 11.6 on it is the default.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import pytest
from django.db import DatabaseError, connection, connections, transaction

from distlock import Lease, LockBusy, LockLost, lock
from distlock.backends import backend_for
from distlock.backends.base import error_code
from tests.app.models import Counter
from tests.isolation import (
    LEVELS,
    expire,
    expire_now,
    has_snapshot,
    mark,
    rows,
    set_level,
    snap,
    told_losses,
)
from tests.support import eventually, in_thread, is_free, row, steal

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.vendor("postgresql", "mysql"),
]

TTL = 0.8
Protected = Callable[..., AbstractContextManager[Lease]]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every new connection has that level, as OPTIONS would give it."""
    with set_level(request.param):
        yield request.param


@contextmanager
def guarded_first(name: str, **more: Any) -> Iterator[Lease]:
    with lock(name, **more) as lease, transaction.atomic():
        snap()
        lease.guard()
        yield lease


@contextmanager
def guarded_last(name: str, **more: Any) -> Iterator[Lease]:
    with lock(name, **more) as lease, transaction.atomic():
        snap()
        yield lease
        lease.guard()


@contextmanager
def released(name: str, **more: Any) -> Iterator[Lease]:
    with lock(name, **more) as lease, transaction.atomic():
        snap()
        yield lease
        lease.release()


@contextmanager
def atomic(name: str, **more: Any) -> Iterator[Lease]:
    with lock(name, atomic=True, **more) as lease:
        snap()
        yield lease


@pytest.fixture(params=[guarded_first, guarded_last, released, atomic], ids=lambda f: f.__name__)
def protected(request: pytest.FixtureRequest) -> Protected:
    """A transaction that the lock protects, its snapshot taken at the beginning."""
    chosen: Protected = request.param
    return chosen


@pytest.fixture(params=[guarded_last, released, atomic], ids=lambda f: f.__name__)
def fenced_late(request: pytest.FixtureRequest) -> Protected:
    """One whose fence stands at its end."""
    chosen: Protected = request.param
    return chosen


@pytest.fixture
def losses() -> Iterator[list[str]]:
    """The reasons of the losses that are told."""
    with told_losses() as told:
        yield told


@contextmanager
def meanwhile(function: Callable[[], object]) -> Iterator[list[Any]]:
    """Do something again and again in another thread until the block ends; yield the results."""
    results: list[Any] = []
    errors: list[BaseException] = []
    stop = threading.Event()

    def run() -> None:
        try:
            while not stop.is_set():
                results.append(function())
                stop.wait(0.01)
        except BaseException as error:
            errors.append(error)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield results
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()
        if errors:
            raise errors[0]


def forget(results: list[Any]) -> None:
    """Forget what was found before this call, by one that is under way, too."""
    results.clear()
    assert eventually(lambda: results)
    results.clear()


def guard(lease: Lease) -> None:
    """Guard a transaction that has its snapshot already."""
    with transaction.atomic():
        snap()
        lease.guard()


def attempt() -> bool:
    """Whether the lock is granted, for a moment."""
    lease = lock("x", renew=False).try_acquire()
    if lease is not None:
        lease.release()
    return lease is not None


# -- no false loss -----------------------------------------------------------------------


def test_a_body_of_three_ttl_among_renewals_waiters_and_marks(
    level: str, protected: Protected, losses: list[str]
) -> None:
    renewals_pass = protected is not guarded_first or connection.vendor == "postgresql"
    with meanwhile(attempt) as granted, meanwhile(lambda: mark("x")) as marked:
        time.sleep(0.05)
        granted.clear()
        with protected("x", ttl=TTL, wait=10) as lease:
            before = row("x")["expires_at"]
            forget(granted)
            Counter.objects.create(name="c", value=1)
            time.sleep(3 * TTL)
            assert not lease.lost
            assert (row("x")["expires_at"] > before) is renewals_pass
            assert len(granted) > 20
            assert not any(granted), "somebody else was granted the lock"
            assert any(marked), "no mark could be written, so this proves nothing"
    assert Counter.objects.filter(name="c").exists()
    assert losses == []
    assert is_free("x")


@pytest.mark.parametrize("fence", [Lease.release, guard], ids=["releases", "guards"])
def test_a_late_holder_does_not_disturb_the_next(
    level: str, protected: Protected, fence: Callable[[Lease], None], losses: list[str]
) -> None:
    """It resumes from a pause while its successor is at work, and finds out."""
    late = in_thread(lambda: lock("x", renew=False).acquire())
    expire("x")
    outcome: list[BaseException] = []

    def resume() -> None:
        try:
            fence(late)
        except BaseException as error:
            outcome.append(error)
        finally:
            connections.close_all()

    thread = threading.Thread(target=resume)
    with protected("x", ttl=5):
        thread.start()
        time.sleep(0.3)
        Counter.objects.create(name="c", value=1)
    thread.join(20)
    assert Counter.objects.filter(name="c").exists()
    assert [type(error) for error in outcome] == [LockLost]
    assert eventually(lambda: losses)
    assert len(losses) == 1, "only the late holder has lost it"
    assert is_free("x")
    with suppress(LockLost):
        late.release()


def test_threads_that_share_a_lease_guard_at_the_same_time(level: str, losses: list[str]) -> None:
    both = threading.Barrier(2, timeout=10)

    def work(name: str, seconds: float) -> None:
        with transaction.atomic():
            lease.guard()
            both.wait()
            Counter.objects.create(name=name, value=1)
            time.sleep(seconds)

    with lock("x", ttl=TTL) as lease:
        thread = threading.Thread(target=lambda: (work("c", 0.1), connections.close_all()))
        thread.start()
        work("d", 2 * TTL)
        thread.join(20)
        time.sleep(TTL)
        lease.check()
    assert Counter.objects.count() == 2
    assert losses == []
    assert is_free("x")


# -- no loss is missed -------------------------------------------------------------------


def force(name: str) -> None:
    """Take the lock from its holder, as the admin does."""
    token = row(name)["fencing_token"]
    assert in_thread(lambda: backend_for(connection).force_release(connection, name, 0, token))


def come_and_go(name: str) -> None:
    """Take an expired lock, work and release it."""
    expire(name)
    in_thread(lambda: lock(name, renew=False).acquire().release())


def purge(name: str) -> None:
    """Delete the row of an expired lock."""
    expire(name)
    in_thread(lambda: backend_for(connection).purge(connection, 0, 0, 10))


def purge_and_steal(name: str) -> None:
    purge(name)
    steal(name)


THIEVES = [steal, come_and_go, force, purge, purge_and_steal]
thieves = pytest.mark.parametrize("rob", THIEVES, ids=lambda f: f.__name__)


@thieves
def test_a_loss_after_the_snapshot_is_not_missed(
    level: str, fenced_late: Protected, rob: Callable[[str], None]
) -> None:
    with pytest.raises(DatabaseError) as caught, fenced_late("x", renew=False):
        Counter.objects.create(name="c", value=1)
        rob("x")
        found = rows("x")
    assert not Counter.objects.exists()
    assert rows("x") == found, "what came after was touched"
    if not (has_snapshot(level) and connection.vendor == "postgresql"):
        assert isinstance(caught.value, LockLost)
    elif not isinstance(caught.value, LockLost):
        assert error_code(caught.value) == "40001"


@thieves
@pytest.mark.parametrize("fence", [Lease.guard, Lease.release], ids=["guard", "release"])
def test_a_loss_before_the_transaction_is_not_missed(
    level: str, fence: Callable[[Lease], None], rob: Callable[[str], None]
) -> None:
    with pytest.raises(LockLost), lock("x", renew=False) as lease:
        rob("x")
        found = rows("x")
        with transaction.atomic():
            Counter.objects.create(name="c", value=1)
            fence(lease)
    assert not Counter.objects.exists()
    assert rows("x") == found, "what came after was touched"


@pytest.mark.parametrize("fence", [Lease.guard, Lease.release], ids=["guard", "release"])
def test_nobody_is_granted_the_lock_between_the_fence_and_the_commit(
    level: str, fence: Callable[[Lease], None]
) -> None:
    """The lease is over by then; what follows it begins after the commit, and sees the work."""
    seen: list[int] = []

    def follow() -> None:
        with lock("x", wait=20, renew=False):
            seen.append(Counter.objects.count())
        connections.close_all()

    thread = threading.Thread(target=follow)
    lease = lock("x", ttl=0.3, renew=False).acquire()
    with transaction.atomic():
        snap()
        fence(lease)
        Counter.objects.create(name="c", value=1)
        thread.start()
        time.sleep(0.6)
        purged = in_thread(lambda: backend_for(connection).purge(connection, 0, 0, 10))
        assert purged is None or purged[0] == 0
        assert seen == []
    thread.join(20)
    assert seen == [1]
    with suppress(LockLost):
        lease.release()


# -- at random ---------------------------------------------------------------------------

ROUNDS = 15


def test_no_update_is_lost_to_a_thief(level: str, protected: Protected) -> None:
    """Two holders who read, wait and write; either may lose the lock at any moment, and not know.

    What is written is the token, too: protected transactions are committed in its order.
    """
    counter = Counter.objects.create(name="c", value=0)
    committed: list[tuple[int, int]] = []
    told: list[str] = []
    both = threading.Barrier(2, timeout=20)

    def work(seed: int) -> None:
        dice = random.Random(f"{seed} {level}")
        both.wait()
        for _ in range(ROUNDS):
            with suppress(DatabaseError, LockBusy):
                committed.append(add(dice))
        connections.close_all()

    def add(dice: random.Random) -> tuple[int, int]:
        steal_at = dice.choice(["before reading", "before writing", "before the end", "never"])

        def pause(moment: str) -> None:
            if moment == steal_at:
                told.append(moment)
                expire_now("x")
                time.sleep(dice.uniform(0, 0.1))

        with protected("x", wait=20, renew=False) as lease:
            pause("before reading")
            value = Counter.objects.values_list("value", flat=True).get(pk=counter.pk)
            pause("before writing")
            time.sleep(dice.uniform(0, 0.002))
            Counter.objects.filter(pk=counter.pk).update(value=value + 1)
            Counter.objects.create(name=f"token {lease.token}", value=value + 1)
            pause("before the end")
        return value + 1, lease.token

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()
    written = Counter.objects.filter(name__startswith="token").order_by("value")
    tokens = [int(one.name.split()[1]) for one in written]
    assert [one.value for one in written] == list(range(1, len(written) + 1)), "an update was lost"
    assert tokens == sorted(tokens), "an earlier holder committed after a later one"
    assert Counter.objects.get(pk=counter.pk).value == len(written)
    known = {token for _, token in committed}
    assert known <= set(tokens), "what was reported as done was not"
    assert len(tokens) >= ROUNDS / 2
    assert len(told) >= ROUNDS / 2
    if protected is not guarded_first:
        assert len(tokens) < 2 * ROUNDS, "nobody was robbed, so this proves nothing"
