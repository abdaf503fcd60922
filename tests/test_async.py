"""Locks in coroutines: who waits occupies no thread, and whoever is cancelled leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import connection, connections, transaction
from django.test import TestCase

from distlock import AlreadyHeld, Lease, LockBusy, LockLost, acquisitions, lock, signals
from distlock.backends import tickets
from distlock.errands import Errand
from distlock.keeper import keeper
from distlock.lookout import lookout
from distlock.models import Ticket
from distlock.signals import lock_acquired, lock_released
from tests.support import becomes_free, eventually, is_free, steal
from tests.support import run_async as run

T = TypeVar("T")

pytestmark = pytest.mark.django_db(transaction=True)
servers = pytest.mark.vendor("postgresql", "mysql")


async def elsewhere(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread of its own, which no synchronous code of this task waits for."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


async def step() -> None:
    await asyncio.sleep(0)


def nothing_is_left(name: str, within: float = 5.0) -> bool:
    """Whether nobody holds or awaits a lock of this process, or has a ticket, and others get it."""
    gc.collect()  # what was dropped without a release would warn here
    return (
        eventually(lambda: not keeper.rounds("default")._kept(), within)
        and not lookout("default")._queues
        and becomes_free(name, within)
        and eventually(lambda: not Ticket.objects.exists(), within)
    )


# -- what works as in a thread -------------------------------------------------------------------


def test_a_block_holds_the_lock() -> None:
    async def main() -> None:
        async with lock("x") as lease:
            assert lease.token > 0
            assert not await elsewhere(is_free, "x")
            await lease.acheck()
            before = lease.expires_at
            await lease.arenew(60)
            assert lease.expires_at > before
        with pytest.raises(LockLost, match="released"):
            await lease.acheck()
        assert await elsewhere(is_free, "x")

    run(main)


def test_by_hand() -> None:
    async def main() -> None:
        lease = await lock("x").atry_acquire()
        assert lease is not None
        holder = await lock("x").aholder()
        assert holder is not None
        assert holder.token == lease.token
        await lease.arelease()
        await lease.arelease()
        assert await lock("x").aholder() is None
        async with await lock("x").aacquire() as again:
            assert again.token > lease.token

    run(main)


def test_the_task_is_the_holder() -> None:
    async def main() -> None:
        asyncio.current_task().set_name("checkout 42")  # type: ignore[union-attr]
        async with lock("x"):
            holder = await lock("x").aholder()
            assert holder is not None
            assert holder.thread == "checkout 42"

    run(main)


def test_who_waits_too_long_is_told_who_holds_the_lock() -> None:
    async def main() -> None:
        async with lock("x"):
            other = asyncio.create_task(lock("x", wait=0.4).aacquire())
            start = time.monotonic()
            with pytest.raises(LockBusy) as busy:
                await other
            assert 0.3 < time.monotonic() - start < 3
            assert busy.value.holder is not None
            assert await asyncio.create_task(lock("x").atry_acquire()) is None

    run(main)


def test_one_after_the_other() -> None:
    """Tasks of one loop, and threads beside it."""
    inside: list[int] = []
    done: list[str] = []

    def enter(who: str) -> None:
        assert not inside, "two at once"
        inside.append(1)
        done.append(who)

    async def work(who: str) -> None:
        async with lock("x", wait=30):
            enter(who)
            await asyncio.sleep(0.005)
            inside.clear()

    def sync_work(who: str) -> None:
        try:
            with lock("x", wait=30):
                enter(who)
                time.sleep(0.005)
                inside.clear()
        finally:
            connections.close_all()

    async def main() -> None:
        tasks = [asyncio.create_task(work(f"task {n}")) for n in range(20)]
        threads = [elsewhere(sync_work, f"thread {n}") for n in range(4)]
        await asyncio.gather(*tasks, *threads)

    run(main)
    assert len(done) == 24


def test_tasks_are_served_in_the_order_they_came() -> None:
    order: list[int] = []

    async def work(n: int) -> None:
        async with lock("x", wait=30):
            order.append(n)

    async def main() -> None:
        async with lock("x"):
            tasks = []
            for n in range(10):
                tasks.append(asyncio.create_task(work(n)))
                await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)

    run(main)
    assert order == list(range(10))


def test_a_task_nests_and_its_children_do_not() -> None:
    async def main() -> None:
        async with lock("x", reentrant=True) as outer:
            async with lock("x", reentrant=True) as inner:
                assert inner.token == outer.token
            await outer.acheck()
            with pytest.raises(AlreadyHeld):
                await lock("x").aacquire()
            child = asyncio.create_task(lock("x", reentrant=True).atry_acquire())
            assert await child is None

    run(main)


def test_one_lock_object_in_many_tasks() -> None:
    shared = lock("x", wait=30)
    tokens: list[int] = []

    async def work() -> None:
        async with shared as lease:
            tokens.append(lease.token)
            await asyncio.sleep(0.01)

    async def main() -> None:
        await asyncio.gather(*(work() for _ in range(6)))

    run(main)
    assert len(set(tokens)) == 6
    assert not shared._entered


@servers
def test_a_lost_lease_is_told_at_the_end_of_the_block() -> None:
    async def main() -> None:
        with pytest.raises(LockLost):
            async with lock("x", renew=False):
                await elsewhere(steal, "x")
        with pytest.raises(KeyError):
            async with lock("y", renew=False):
                await elsewhere(steal, "y")
                raise KeyError("goes first")

    run(main)


def test_signals_may_ask_the_database() -> None:
    held: list[Any] = []

    def look(lease: Lease, **kwargs: object) -> None:
        held.append(lock(lease.name).holder())

    async def main() -> None:
        async with lock("x"):
            pass

    lock_acquired.connect(look)
    lock_released.connect(look)
    try:
        run(main)
    finally:
        lock_acquired.disconnect(look)
        lock_released.disconnect(look)
    assert held[0].name == "x"
    assert held[1] is None


def test_a_decorated_coroutine() -> None:
    @lock("x:{n}", wait=0)
    async def work(n: int, *, say: str = "done") -> str:
        assert not await elsewhere(is_free, f"x:{n}")
        return say

    async def main() -> None:
        assert await work(1) == "done"
        assert await work(2, say="yes") == "yes"
        async with lock("x:3"):
            with pytest.raises(LockBusy):
                await asyncio.create_task(work(3))

    assert work.__name__ == "work"
    run(main)


def test_a_decorated_coroutine_may_be_skipped() -> None:
    @lock("x", wait=0, on_busy="skip")
    async def work() -> str:
        await asyncio.sleep(0.2)
        return "done"

    async def main() -> list[str]:
        return await asyncio.gather(work(), work(), work())

    assert sorted(run(main), key=str) == [None, None, "done"]


def test_a_busy_lock_inside_the_body_is_not_skipped() -> None:
    @lock("x", wait=0, on_busy="skip")
    async def work() -> None:
        raise LockBusy("another", name="y")

    with pytest.raises(LockBusy, match="another"):
        run(work)


def test_an_object_that_is_called_as_a_coroutine() -> None:
    class Work:
        async def __call__(self) -> bool:
            return await elsewhere(is_free, "x")

    assert run(lock("x")(Work())) is False


@pytest.mark.parametrize(
    "use",
    [
        lambda: lock("x", atomic=True).aacquire(),
        lambda: lock("x", atomic=True).atry_acquire(),
        lambda: lock("x", atomic=True).__aenter__(),
    ],
)
def test_no_transaction_is_run_in_a_coroutine(use: Callable[[], Awaitable[Any]]) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match="atomic=True"):
            await use()

    run(main)
    assert is_free("x")


def test_no_transaction_is_run_in_a_decorated_coroutine() -> None:
    with pytest.raises(TypeError, match="atomic=True"):

        @lock("x", atomic=True)
        async def work() -> None: ...


@servers
def test_the_thread_of_synchronous_code_may_have_a_transaction() -> None:
    async def main() -> None:
        begin = transaction.atomic()
        await sync_to_async(begin.__enter__)()
        async with lock("x") as lease:
            await lease.aguard()
        assert not await elsewhere(is_free, "x")
        await sync_to_async(begin.__exit__)(None, None, None)
        assert await elsewhere(becomes_free, "x")

    run(main)


class InATestCase(TestCase):
    """Where no other connection sees the lock, waiting is done by trying."""

    async def test_waiting(self) -> None:
        async with lock("x", renew=False):
            with pytest.raises(LockBusy):
                await asyncio.create_task(lock("x", wait=0.1).aacquire())
            later = asyncio.create_task(lock("x", wait=10).aacquire())
            await asyncio.sleep(0.05)
        lease = await later
        await lease.arelease()


# -- threads and loops that end, or have no time -------------------------------------------------


def test_a_mistake_is_told_at_once_and_does_not_block_the_loop() -> None:
    """Also where others stand in line, so that no statement would be sent at first."""

    async def main() -> None:
        async with lock("x"):
            other = asyncio.create_task(lock("x", wait=30).aacquire())
            await asyncio.sleep(0.2)
            start = time.monotonic()
            with pytest.raises(SynchronousOnlyOperation, match="aacquire"):
                lock("x", wait=5).acquire()
            assert time.monotonic() - start < 1
        await (await other).arelease()

    run(main)


# Django's: by psycopg, and by sqlite3 from Python 3.13 on.
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
def test_a_task_that_outlives_its_request() -> None:
    """Django gives each request a thread for synchronous code, and takes it away at the end."""

    async def main() -> None:
        async with ThreadSensitiveContext():
            lease = await lock("x").aacquire()
            task = asyncio.create_task(lock("x", wait=20).aacquire())
            await asyncio.sleep(0.3)
            await lease.arelease()
            await sync_to_async(connections.close_all)()
        async with await task:
            assert not await elsewhere(is_free, "x")

    run(main)
    assert nothing_is_left("x")


@servers
def test_a_release_does_not_wait_for_a_thread_that_waits_for_it() -> None:
    """The one thread of synchronous code waits for the lock that a task wants to release."""

    def wait_for_it() -> float:
        start = time.monotonic()
        with lock("x", wait=20):
            return time.monotonic() - start

    async def main() -> float:
        lease = await lock("x").aacquire()
        waiting = asyncio.create_task(sync_to_async(wait_for_it)())
        await asyncio.sleep(0.3)
        await lease.arelease()
        return await waiting

    assert run(main) < 5
    assert nothing_is_left("x")


@servers
def test_a_release_that_no_thread_takes_on_is_left_to_the_keeper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        lease = await lock("x").aacquire()

        def refuse(function: object) -> object:
            raise RuntimeError("cannot schedule new futures after shutdown")

        with monkeypatch.context() as patch:
            patch.setattr("distlock.errands.sync_to_async", refuse)
            with pytest.raises(RuntimeError):
                await lease.arelease()
        assert await elsewhere(becomes_free, "x", 5.0)

    run(main)
    assert nothing_is_left("x")


@servers
def test_a_loop_that_was_closed_with_a_task_in_line_holds_nobody_up() -> None:
    with lock("x"):
        loop = asyncio.new_event_loop()
        task = loop.create_task(lock("x", wait=60).aacquire())
        loop.run_until_complete(asyncio.sleep(0.5))
        loop.run_until_complete(sync_to_async(connections.close_all)())
        loop.close()
    assert becomes_free("x", 5.0)
    start = time.monotonic()
    for _ in range(5):
        assert becomes_free("x", 5.0)
    assert time.monotonic() - start < 2
    assert not lookout("default")._queues
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_the_lock_may_be_taken_again_after_a_release_that_was_cancelled() -> None:
    async def main() -> None:
        lease = await lock("x").aacquire()

        async def release() -> None:
            await lease.arelease()

        asyncio.current_task().cancel()  # type: ignore[union-attr]
        with pytest.raises(asyncio.CancelledError):
            await release()
        await (await lock("x", wait=20).aacquire()).arelease()

    run(main)
    assert nothing_is_left("x")


# -- waiting costs no thread ---------------------------------------------------------------------


def test_who_waits_occupies_no_thread() -> None:
    """A hundred wait, and what else the loop and its thread have to do goes on."""

    async def main() -> None:
        async with lock("x", renew=False):
            others = [asyncio.create_task(lock("x", wait=30).aacquire()) for _ in range(100)]
            await asyncio.sleep(0.5)
            threads = threading.active_count()
            slowest = 0.0
            for _ in range(50):
                start = time.monotonic()
                await sync_to_async(time.monotonic)()
                slowest = max(slowest, time.monotonic() - start)
            assert slowest < 0.5
            assert threading.active_count() <= threads
            assert threads < 20
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    run(main)
    assert nothing_is_left("x")


# -- cancelled -----------------------------------------------------------------------------------


async def ended(task: asyncio.Task[Lease]) -> bool:
    """Cancel an acquire, release what it got before that, and say whether it was cancelled."""
    task.cancel()
    try:
        await (await task).arelease()
    except asyncio.CancelledError:
        return True
    return False


@pytest.mark.parametrize("fair", [False, True])
def test_cancelled_at_random_instants(fair: bool) -> None:
    """The first half has the lock for itself, the others wait for it; a thousand together."""
    random.seed(4)
    cancelled = {"free": 0, "held": 0}

    def acquire() -> asyncio.Task[Lease]:
        return asyncio.create_task(lock("x", wait=30, fair=fair).aacquire())

    async def main() -> None:
        usual = 1.0
        for _ in range(10):
            start = time.monotonic()
            lease = await lock("x", fair=fair).aacquire()
            usual = min(usual, time.monotonic() - start)
            await lease.arelease()
        for _ in range(500):
            task = acquire()
            await asyncio.sleep(random.random() * 1.5 * usual)
            cancelled["free"] += await ended(task)
        for _ in range(50):
            async with lock("x", wait=30):
                tasks = [acquire() for _ in range(10)]
                await asyncio.sleep(random.random() * 2 * usual)
                for task in tasks[:-1]:
                    cancelled["held"] += await ended(task)
            await asyncio.sleep(random.random() * 2 * usual)
            cancelled["held"] += await ended(tasks[-1])

    run(main, 100)
    assert cancelled["free"] > 100, cancelled
    assert cancelled["held"] > 400, cancelled
    assert nothing_is_left("x", 10)


@asynccontextmanager
async def begun() -> AsyncIterator[None]:
    """A transaction in the thread of this task's synchronous code."""
    block = transaction.atomic()
    await sync_to_async(block.__enter__)()
    try:
        yield
    finally:
        await sync_to_async(block.__exit__)(None, None, None)


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize(
    ("busy", "inside"),
    [(False, False), (True, False), (False, True)],
    ids=["free", "busy", "in a transaction"],
)
def test_cancelled_at_every_turn_of_the_loop(busy: bool, inside: bool, fair: bool) -> None:
    """However many turns the loop has taken since: 0, 1, 2, .. until the acquire is through."""

    async def attempt(turns: int) -> bool:
        task = asyncio.create_task(lock("x", wait=30, fair=fair).aacquire())
        for _ in range(turns):
            await step()
            if task.done():
                break
        return await ended(task)

    async def main() -> int:
        for turns in range(300):
            if busy:
                async with lock("x", wait=30):
                    assert await attempt(turns)
            elif not await attempt(turns):
                return turns
            else:
                await (await lock("x", wait=30).aacquire()).arelease()
        return 300

    async def within() -> int:
        async with begun():
            return await main()

    turns = run(within if inside else main, 100)
    assert turns > 2
    assert nothing_is_left("x", 10)


async def take() -> None:
    await lock("x", ttl=60, wait=20, min_hold=60).aacquire()  # which waits for work to be done


async def take_again() -> None:
    """Go on after a timeout: whatever becomes of the first lease, the task does not hold it."""
    with pytest.raises(asyncio.CancelledError):
        await take()
    lease = await lock("x", wait=20).aacquire()
    await lease.arelease()


class Cancelled:
    """An acquire of `x` by a task that is cancelled once it has been granted the lock.

    `told`: while the grant is told; else later, when only the event loop does not know of it yet.
    """

    def __init__(self, told: bool) -> None:
        self._told = told
        self._arrived, self._go_on, self._done = (threading.Event() for _ in range(3))

    async def run(self, work: Callable[[], Coroutine[Any, Any, None]] = take) -> None:
        lock_acquired.connect(self._tell)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Errand, "_run", self._instead_of(Errand._run))
                task = asyncio.create_task(work())
                assert await elsewhere(self._arrived.wait, 20)
                if not self._told:
                    self._go_on.set()
                    assert self._done.wait(20), "the loop stands still meanwhile"
                task.cancel()
                await step()
                await step()
        finally:
            self._go_on.set()
            lock_acquired.disconnect(self._tell)
        if work is take:
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
        else:
            await task

    def _tell(self, **more: Any) -> None:
        if self._told:
            self._stop()

    def _stop(self) -> None:
        self._arrived.set()
        assert self._go_on.wait(20)

    def _instead_of(self, real: Any) -> Any:
        def run(errand: Any) -> Any:
            if not self._told and not self._arrived.is_set():
                self._stop()
            try:
                return real(errand)
            finally:
                self._done.set()

        return run


@contextmanager
def endings() -> Iterator[list[str]]:
    """How the leases of `x` have ended that were told as granted."""
    said: list[str] = []

    def receiver_for(name: str) -> Callable[..., None]:
        def receive(lease: Lease, **more: Any) -> None:
            if lease.name == "x":
                said.append(name)

        return receive

    receivers = {
        name: receiver_for(name) for name in ("lock_released", "lock_lost", "lock_dropped")
    }
    for name, receiver in receivers.items():
        getattr(signals, name).connect(receiver)
    yield said
    for name, receiver in receivers.items():
        getattr(signals, name).disconnect(receiver)


moments = pytest.mark.parametrize("told", [True, False], ids=["while it is told", "after that"])


@moments
@pytest.mark.parametrize("kept", [True, False], ids=["by the keeper", "by its thread"])
def test_what_was_granted_to_a_cancelled_task_is_given_back(
    monkeypatch: pytest.MonkeyPatch, told: bool, kept: bool
) -> None:
    """`by its thread`: as in a database in memory, which no other connection sees."""
    monkeypatch.setattr("distlock.acquisitions.can_keep", lambda connection: kept)
    with endings() as ended:
        run(Cancelled(told).run)
        assert nothing_is_left("x")
        assert eventually(lambda: ended == ["lock_released"] * 2), ended


@moments
@pytest.mark.parametrize("end", [None, KeyError], ids=["committed", "rolled back"])
def test_what_was_granted_to_a_cancelled_task_in_a_transaction_is_given_back(
    told: bool, end: type[Exception] | None
) -> None:
    with endings() as ended:
        with suppress(KeyError), transaction.atomic():
            async_to_sync(Cancelled(told).run)()
            if connection.vendor != "sqlite":
                assert nothing_is_left("x"), "before the transaction ends"
            if end:
                raise end
        assert nothing_is_left("x")
        assert eventually(lambda: len(ended) > 1)
        assert set(ended) == {"lock_released"}


@moments
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a transaction"])
def test_a_task_may_take_the_lock_again_after_a_timeout(told: bool, inside: bool) -> None:
    async def main() -> None:
        await Cancelled(told).run(take_again)

    if inside:
        with transaction.atomic():
            async_to_sync(main)()
    else:
        run(main)
    assert nothing_is_left("x")


class CancelledInATestCase(TestCase):
    """One test only: the end of each closes the connection, and so the transaction of the class."""

    async def test_what_was_granted_is_given_back(self) -> None:
        for told in (True, False):
            for work in (take, take_again):
                await Cancelled(told).run(work)
                lease = await lock("x").atry_acquire()
                assert lease is not None
                await lease.arelease()


def test_what_a_cancelled_task_has_adopted_is_its_holders_after_a_rollback() -> None:
    lease = lock("x", ttl=60).acquire()
    with suppress(KeyError), transaction.atomic():
        lease.release()
        async_to_sync(Cancelled(False).run)()
        raise KeyError
    with pytest.raises(LockBusy):
        becomes_free("x")
    lease.check()
    assert lease._term in keeper.rounds("default")._kept()
    lease.release()
    assert nothing_is_left("x")


def test_cancelled_twice() -> None:
    async def main() -> None:
        for _ in range(30):
            task = asyncio.create_task(lock("x", wait=30).aacquire())
            await step()
            await step()
            task.cancel()
            await step()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(main)
    assert nothing_is_left("x")


def test_cancelled_in_the_body() -> None:
    async def work() -> None:
        async with lock("x"):
            await asyncio.sleep(30)

    async def main() -> None:
        task = asyncio.create_task(work())
        await elsewhere(eventually, lambda: not is_free("x"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await elsewhere(is_free, "x"), "the block had not ended"

    run(main)
    assert nothing_is_left("x")


def test_cancelled_while_it_releases() -> None:
    """At every turn of the loop: the lock is given back all the same."""

    async def main() -> None:
        for turns in range(1, 12):
            lease = await lock("x", wait=30).aacquire()
            task = asyncio.create_task(lease.arelease())
            for _ in range(turns):
                await step()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await elsewhere(becomes_free, "x", 5.0)

    run(main)
    assert nothing_is_left("x")


@servers
def test_a_cancelled_release_still_happens_in_its_thread() -> None:
    """Where a transaction is open: nobody else could release as part of that."""

    async def main() -> None:
        begin = transaction.atomic()
        await sync_to_async(begin.__enter__)()
        lease = await lock("x", renew=False).aacquire()
        busy = asyncio.create_task(sync_to_async(time.sleep)(0.5))
        await asyncio.sleep(0.1)
        release = asyncio.create_task(lease.arelease())
        await asyncio.sleep(0.1)
        release.cancel()
        await asyncio.gather(release, busy, return_exceptions=True)
        await sync_to_async(begin.__exit__)(None, None, None)
        assert await elsewhere(becomes_free, "x", 1.0)

    run(main)
    assert nothing_is_left("x")


def test_a_ticket_that_is_drawn_for_a_cancelled_task_is_torn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawing, cancelled, real = threading.Event(), threading.Event(), tickets.draw

    def slow(*arguments: Any) -> None:
        drawing.set()
        cancelled.wait(20)
        real(*arguments)

    monkeypatch.setattr(tickets, "draw", slow)

    async def main() -> None:
        async with lock("x"):
            task = asyncio.create_task(lock("x", fair=True, wait=30).aacquire())
            assert await elsewhere(drawing.wait, 20)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(0.5)  # the task has had its ticket torn, before it was drawn
            cancelled.set()
            await sync_to_async(time.monotonic)()
            assert not await Ticket.objects.aexists()

    run(main)
    assert nothing_is_left("x")


def test_a_ticket_for_a_task_that_was_cancelled_before_it_had_a_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread had begun, and draws for a task that could not know of it."""
    begun, cancelled, drawn = threading.Event(), threading.Event(), threading.Event()
    real_place, real_draw = acquisitions.place, tickets.draw

    def slow(*arguments: Any, **more: Any) -> Any:
        begun.set()
        cancelled.wait(20)
        return real_place(*arguments, **more)

    def draw(*arguments: Any) -> None:
        real_draw(*arguments)
        drawn.set()

    async def main() -> None:
        async with lock("x"):
            monkeypatch.setattr(acquisitions, "place", slow)
            monkeypatch.setattr(tickets, "draw", draw)
            task = asyncio.create_task(lock("x", fair=True, wait=30).aacquire())
            assert await elsewhere(begun.wait, 20)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            cancelled.set()
            assert await elsewhere(drawn.wait, 20)

    run(main)
    assert nothing_is_left("x")


@servers
def test_a_loss_is_told_also_if_no_thread_had_time_for_the_release() -> None:
    async def main() -> None:
        lease = await lock("x", ttl=0.5, renew=False).aacquire()
        busy = asyncio.create_task(sync_to_async(time.sleep)(1.6))
        await asyncio.sleep(0.6)
        with pytest.raises(LockLost):
            await lease.arelease()
        await busy

    run(main)
    assert nothing_is_left("x")


def test_timeouts_end_the_waiting() -> None:
    async def main() -> None:
        async with lock("x"):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.create_task(lock("x", wait=30).aacquire()), 0.2)
            if hasattr(asyncio, "timeout"):
                await asyncio.create_task(by_timeout())

    async def by_timeout() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), lock("x", wait=30):
                pass

    run(main)
    assert nothing_is_left("x")


def test_a_loop_that_ends_meanwhile() -> None:
    """Nobody awaits the acquire any more, nor is there a loop that could give the lock back."""

    tasks: list[asyncio.Task[Lease]] = []

    async def main(turns: int) -> None:
        tasks.append(asyncio.create_task(lock("x", wait=30).aacquire()))
        for _ in range(turns):
            await step()

    for turns in range(8):
        asyncio.run(main(turns))
        task = tasks.pop()
        if not task.cancelled():  # it came through in the last turn of the loop
            task.result().release()
        del task
        assert nothing_is_left("x")
    asyncio.run(sync_to_async(connections.close_all)())


@pytest.fixture(autouse=True)
def no_thread_keeps_a_connection() -> Iterator[None]:
    yield
    connections.close_all()
