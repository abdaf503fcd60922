"""`fair=True`: first come, first served, in tasks, threads and processes."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from asgiref.sync import sync_to_async
from django.core.management import call_command
from django.db import OperationalError, connection, connections, transaction

from distlock import LockBusy, lock
from distlock.backends import backend_for
from distlock.backends import tickets as store
from distlock.connections import Private
from distlock.deadlines import clock
from distlock.ears import Ears
from distlock.lookout import KEEP, LIFE, Lookout
from distlock.models import Ticket
from distlock.waiting import Sleeper
from tests.support import eventually, in_thread, is_free

T = TypeVar("T")

pytestmark = pytest.mark.django_db(transaction=True)
servers = pytest.mark.vendor("postgresql", "mysql")
ROOT = Path(__file__).resolve().parent.parent


def tickets() -> int:
    return Ticket.objects.count()


def in_line(number: int) -> bool:
    return eventually(lambda: tickets() == number)


class Waiters:
    """Threads that wait for "x" with `fair=True`, and note when they have it."""

    def __init__(self) -> None:
        self.served: list[str] = []
        self._threads: list[threading.Thread] = []

    def add(self, name: str, **options: Any) -> None:
        before = tickets()
        thread = threading.Thread(target=self._run, args=(name, options))
        thread.start()
        self._threads.append(thread)
        assert in_line(before + 1)

    def finish(self) -> list[str]:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        return self.served

    def _run(self, name: str, options: dict[str, Any]) -> None:
        try:
            with lock("x", **{"fair": True, "wait": 30, **options}):
                self.served.append(name)
        except LockBusy:
            self.served.append(f"{name}: busy")
        finally:
            connections.close_all()


PROCESS = """
import sys, threading, django; django.setup()
from django.conf import settings
settings.DATABASES["default"]["NAME"] = sys.argv[1]
from django.db import connections
from distlock import lock
def work(name):
    with lock("x", wait=60, fair=True):
        print(name, flush=True)
    connections.close_all()
for line in sys.stdin:
    threading.Thread(target=work, args=(line.strip(),)).start()
"""


class Process:
    """Another process; each line that it is told is a waiter, each that it says one served."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("ab")
        self._child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), str(connection.settings_dict["NAME"])],
            cwd=ROOT,
            env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"},
            stdin=subprocess.PIPE,
            stdout=self._log,
        )

    def wait_for_x(self, name: str) -> None:
        before = tickets()
        assert self._child.stdin is not None
        self._child.stdin.write(f"{name}\n".encode())
        self._child.stdin.flush()
        assert eventually(lambda: tickets() == before + 1, 20)

    def kill(self) -> None:
        self._child.send_signal(signal.SIGKILL)
        self._child.wait(20)
        with suppress(BrokenPipeError):
            self._child.stdin.close()  # type: ignore[union-attr]

    def end(self) -> None:
        if self._child.poll() is None:
            assert self._child.stdin is not None
            self._child.stdin.close()
            self._child.wait(60)
        self._log.close()


def test_threads_are_served_in_order_and_leave_no_ticket() -> None:
    waiters = Waiters()
    with lock("x"):
        for n in range(6):
            waiters.add(str(n))
    assert waiters.finish() == list("012345")
    assert tickets() == 0


def test_a_free_lock_needs_no_ticket() -> None:
    with lock("x", fair=True):
        assert tickets() == 0
    assert is_free("x")


@servers
def test_processes_are_served_in_order(tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [Process(log) for _ in range(3)]
    order = [0, 1, 2, 2, 0, 1, 1, 2, 0, 0, 2, 1]
    try:
        with lock("x", ttl=60):
            for number, process in enumerate(order):
                processes[process].wait_for_x(str(number))
        assert eventually(lambda: len(log.read_text().split()) == len(order), 30)
    finally:
        for one in processes:
            one.end()
    assert log.read_text().split() == [str(number) for number in range(len(order))]
    assert tickets() == 0


@servers
def test_the_dead_hold_nobody_up(tmp_path: Path) -> None:
    log = tmp_path / "log"
    dead, living = Process(log), Process(log)
    try:
        with lock("x", ttl=60):
            for n in range(5):
                dead.wait_for_x(f"dead {n}")
            living.wait_for_x("first")
            living.wait_for_x("second")
            dead.kill()
        released = time.monotonic()
        assert eventually(lambda: log.read_text().split() == ["first", "second"], 20)
        assert time.monotonic() - released < LIFE + 3
    finally:
        dead.end()
        living.end()
    assert eventually(lambda: tickets() == 0)


def test_who_gives_up_leaves_no_ticket() -> None:
    waiters = Waiters()
    with lock("x"):
        waiters.add("impatient", wait=0.5)
        waiters.add("patient")
        assert in_line(1)
    assert waiters.finish() == ["impatient: busy", "patient"]
    assert tickets() == 0


def test_whoever_does_not_stand_in_line_may_be_first() -> None:
    """A try, and a lock without `fair`, ask nobody."""
    waiters = Waiters()
    with lock("x"):
        waiters.add("in line")
    now = backend_for(connection).clock(connection)
    Ticket.objects.create(name="y", owner="somebody", alive_until=now + 60_000_000)
    lease = lock("y", fair=True).try_acquire()
    assert lease is not None
    lease.release()
    assert waiters.finish() == ["in line"]


def test_a_ticket_of_another_name_or_slot_counts_for_nothing() -> None:
    later = backend_for(connection).clock(connection) + 60_000_000
    Ticket.objects.create(name="X", owner="somebody", alive_until=later)
    Ticket.objects.create(name="x", slot=1, owner="somebody", alive_until=later)
    start = time.monotonic()
    with lock("x", fair=True):
        assert time.monotonic() - start < LIFE / 2
    assert tickets() == 2


def test_a_ticket_that_was_torn_is_drawn_again() -> None:
    waiters = Waiters()
    with lock("x"):
        waiters.add("passed by")
        Ticket.objects.all().delete()
        Ticket.objects.create(name="x", owner="dead")
    assert waiters.finish() == ["passed by"]
    assert tickets() == 0


@servers
def test_inside_a_transaction() -> None:
    waiters = Waiters()
    with lock("x"):
        waiters.add("first")

        def work() -> None:
            with transaction.atomic(), lock("x", fair=True, wait=30):
                waiters.served.append("second")

        thread = threading.Thread(target=lambda: in_thread(work))
        thread.start()
        assert in_line(2), "others see the ticket before the transaction ends"
    thread.join(30)
    assert waiters.finish() == ["first", "second"]
    assert tickets() == 0


def test_tasks_stand_in_the_same_line() -> None:
    waiters = Waiters()

    async def elsewhere(function: Callable[..., T], *args: Any) -> T:
        """Not in the thread that the tasks draw their tickets in."""
        return await asyncio.to_thread(in_thread, lambda: function(*args))

    async def main() -> None:
        async with lock("x"):
            await elsewhere(waiters.add, "thread")
            task = asyncio.create_task(lock("x", fair=True, wait=30).aacquire())
            cancelled = asyncio.create_task(lock("x", fair=True, wait=30).aacquire())
            assert await elsewhere(in_line, 3)
            cancelled.cancel()
            assert await elsewhere(in_line, 2)
        async with await task:
            waiters.served.append("task")
        await sync_to_async(connections.close_all)()

    asyncio.run(main())
    assert waiters.finish() == ["thread", "task"]
    assert eventually(lambda: tickets() == 0)


def test_old_tickets_are_purged() -> None:
    now = backend_for(connection).clock(connection)
    Ticket.objects.create(name="x", owner="old", alive_until=now - 100_000_000)
    Ticket.objects.create(name="x", owner="new", alive_until=now)
    call_command("purge_locks", verbosity=0)
    assert [ticket.owner for ticket in Ticket.objects.all()] == ["new"]


def test_a_dead_ticket_refuses_nobody_a_free_lock() -> None:
    now = backend_for(connection).clock(connection)
    for n in range(200):
        Ticket.objects.create(name="x", owner=f"dead {n}", alive_until=now - n)
    Ticket.objects.create(name="x", owner="seems alive", alive_until=now + 60_000_000)
    with lock("x", fair=True, wait=0.4):
        assert tickets() == 1


def test_who_came_shortly_before_a_release_does_not_overtake() -> None:
    waiters = Waiters()
    with lock("x"):
        waiters.add("first")
        time.sleep(0.8)
        waiters.add("second")
        time.sleep(0.7)
    assert waiters.finish() == ["first", "second"]


def test_fair_is_a_flag() -> None:
    with pytest.raises(TypeError, match="fair"):
        lock("x", fair="yes")  # type: ignore[arg-type]


def test_threads_that_draw_at_the_same_time_are_served_by_their_tickets() -> None:
    """Whoever is first in this process may have a later ticket than the next one."""
    served: list[str] = []

    def work(name: str) -> None:
        try:
            with lock("x", fair=True, wait=30):
                served.append(name)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(24)]
    with lock("x"):
        for thread in threads:
            thread.start()
        assert in_line(len(threads))
        time.sleep(0.5)
        start = time.monotonic()
    for thread in threads:
        thread.join(30)
    assert len(served) == len(threads)
    assert time.monotonic() - start < LIFE * 2
    assert tickets() == 0


# -- the lookout's part --------------------------------------------------------------------------


class OwnEars(Ears):
    """Ears on a connection that no other lookout of this process listens on."""

    private: Any = None


@pytest.fixture
def still() -> Iterator[Lookout]:
    """A lookout without a thread: the test takes its steps."""
    one = Lookout("default")
    one._ears.forget()
    one._ears = ears = OwnEars("default")
    one._thread.ensure_started = lambda: None  # type: ignore[method-assign]
    ears.private = Private("default")
    yield one
    ears.close()
    ears.forget()


def drawn(owner: str = "owner") -> Ticket:
    """A ticket without a sign of life."""
    store.draw(connection, "x", 0, owner, 0)
    return Ticket.objects.get(owner=owner)


def test_who_was_not_well_for_a_while_has_signs_of_life_again(
    monkeypatch: pytest.MonkeyPatch, still: Lookout
) -> None:
    ticket, ahead = drawn(), 0.0
    waiter = Sleeper(lambda: ticket.pk)
    still.join(("x", 0), waiter)
    monkeypatch.setattr("distlock.lookout.clock", lambda: clock() + ahead)

    waiter._seen -= 60  # its try takes long, or the process was stopped
    ahead += KEEP
    assert not still._keep_tickets()
    assert still._delay() <= KEEP

    waiter._seen += 60
    ahead += KEEP
    assert still._keep_tickets()
    now = backend_for(connection).clock(connection)
    assert 0 < Ticket.objects.get().alive_until - now <= LIFE * 1e6

    still.leave(("x", 0), waiter, granted=False)
    ahead += KEEP
    assert not still._keep_tickets()
    assert still._delay() > KEEP, "nobody waits"


@pytest.mark.vendor("postgresql")
def test_a_message_that_comes_with_the_answer_to_a_sign_of_life(
    monkeypatch: pytest.MonkeyPatch, still: Lookout
) -> None:
    """What a statement has read from the wire wakes no sleeper."""
    ticket, keep = drawn(), store.keep
    waiter = Sleeper(lambda: ticket.pk)
    lease = lock("x", ttl=300).acquire()
    still.join(("x", 0), waiter)
    still._step()
    assert still._ears.open
    assert not waiter._bell.is_set()

    def late(*arguments: Any) -> None:
        lease.release()
        assert select.select([still._ears.private.wire], [], [], 20)[0], "the message has come"
        keep(*arguments)

    monkeypatch.setattr(store, "keep", late)
    still._keep_at = 0.0
    still._step()
    assert waiter._bell.is_set()


def test_tickets_are_given_back_in_one_statement(
    monkeypatch: pytest.MonkeyPatch, still: Lookout
) -> None:
    calls, tear = [], store.tear
    monkeypatch.setattr(store, "tear", lambda *given: (calls.append(given[1:]), tear(*given)))
    for owner in ("a", "b", "c"):
        drawn(owner)
    for owner in ("a", "b"):
        still.tear(("x", 0), owner)
    still._step()
    assert calls == [("x", 0, ["a", "b"])]
    assert [ticket.owner for ticket in Ticket.objects.all()] == ["c"]


def test_a_ticket_that_cannot_be_given_back_is_nobodys_error(
    monkeypatch: pytest.MonkeyPatch, still: Lookout
) -> None:
    def fail(*arguments: Any) -> None:
        raise OperationalError("no answer")

    drawn()
    with monkeypatch.context() as patch:
        patch.setattr(store, "tear", fail)
        still.tear(("x", 0), "owner")
        still._step()
    still._step()
    assert tickets() == 1, "it counts for nothing, and is not tried for again"


def test_who_is_cancelled_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are: the lookout gives the tickets back."""
    threads, tear = [], store.tear

    def noted(*arguments: Any) -> None:
        threads.append(threading.current_thread().name)
        tear(*arguments)

    monkeypatch.setattr(store, "tear", noted)

    async def main() -> None:
        async with lock("x"):
            tasks = [asyncio.create_task(lock("x", fair=True).aacquire()) for _ in range(20)]
            assert await asyncio.to_thread(in_thread, lambda: in_line(20))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert await asyncio.to_thread(in_thread, lambda: in_line(0))
        await sync_to_async(connections.close_all)()

    asyncio.run(main())
    assert set(threads) == {"distlock-lookout-default"}
