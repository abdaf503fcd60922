"""Waiting where something breaks: sessions, the server, threads, forks, holders, the lookout."""

from __future__ import annotations

import linecache
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import OperationalError, connection, connections

from distlock import LockBusy, lock
from distlock.backends import backend_for
from distlock.backends.base import Claim
from distlock.lookout import Ears, Lookout, lookout
from tests.support import eventually, in_thread, other_session
from tests.test_keeper import run_script
from tests.test_leases import in_fork
from tests.waiters import (
    Waiter,
    calls_of,
    ended,
    held,
    in_line,
    instead_of,
    kill_own_sessions,
    line_up,
    listens,
    own_sessions,
    running,
    settle,
)

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")
told = pytest.mark.vendor("postgresql")

TOLD, POLLED = 0.2, 0.8
SOON = TOLD if os.environ["DISTLOCK_TEST_URL"].startswith("postgresql") else POLLED


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "distlock" and record.levelno >= logging.WARNING
    ]


# -- the connection that listens -----------------------------------------------------------------


@told
def test_a_session_that_was_killed_is_replaced_and_nobody_notices(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with held("x") as (lease,):
        waiters = line_up("x", 2)
        assert listens()
        settle("x")
        before = own_sessions()
        kill_own_sessions()
        assert eventually(lambda: own_sessions() and not set(before) & set(own_sessions()))
        settle("x")
        released = time.monotonic()
        lease.release()
        assert waiters[0].result() - released < TOLD
        assert waiters[1].result() - released < TOLD + 0.1
    assert warnings_of(caplog) == []


@told
def test_what_is_released_while_nobody_listens_is_found_by_a_look() -> None:
    with held("x") as (lease,):
        waiter = Waiter("x")
        assert listens()
        settle("x")
        with instead_of("listen", cannot_listen):
            kill_own_sessions()
            released = time.monotonic()
            lease.release()
            assert waiter.result() - released < POLLED


def cannot_listen(real: Any, on: Any) -> bool:
    raise OperationalError("just now it cannot")


@told
def test_who_cannot_listen_says_so_once_polls_and_listens_later(
    caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr("distlock.lookout.DEAF", 0.3)
    with held("x", "y") as (lease, other):
        waiters = [Waiter("x"), Waiter("y")]
        assert listens()
        settle("x", "y")
        with instead_of("listen", cannot_listen) as tries:
            kill_own_sessions()
            assert eventually(lambda: len(tries) >= 4)
            (said,) = warnings_of(caplog)
            assert "lock_waiting_polls" in said
            assert "just now it cannot" in said
            released = time.monotonic()
            lease.release()
            assert waiters[0].result() - released < POLLED
        assert listens()
        settle("y")
        released = time.monotonic()
        other.release()
        assert waiters[1].result() - released < TOLD
    assert len(warnings_of(caplog)) == 1


@pytest.mark.vendor("pgbouncer")
def test_behind_a_pooler_waiting_polls_and_that_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    if not os.environ["DISTLOCK_TEST_URL"].startswith("pgbouncer"):
        pytest.fail("this is for PgBouncer")
    monkeypatch.setattr("distlock.lookout.DEAF", 0.3)
    monkeypatch.setattr(lookout("default"), "_deaf", False)
    monkeypatch.setattr(lookout("default"), "_listen_at", 0.0)
    with held("x") as (lease,):
        waiter = Waiter("x")
        with instead_of("listen", lambda real, on: real(on)) as tries:
            assert eventually(lambda: len(tries) >= 3)
        released = time.monotonic()
        lease.release()
        assert waiter.result() - released < POLLED
    (said,) = warnings_of(caplog)
    assert "pooler" in said


RESTARTED = """
import logging, sys, threading, time, django
django.setup()
from django.core.management import call_command
from distlock import lock
from distlock.lookout import lookout
import distlock.lookout
distlock.lookout.DEAF = 0.5
logging.basicConfig(level="WARNING", stream=sys.stdout, format="%(levelname)s %(message)s")
call_command("migrate", verbosity=0)
lease = lock("x", ttl=60).acquire()
def wait():
    global granted
    with lock("x", wait=50):
        granted = time.monotonic()
thread = threading.Thread(target=wait)
thread.start()
ears = lookout("default")._ears
while not ears.open:
    time.sleep(0.01)
time.sleep(0.5)
print("waits", flush=True)
sys.stdin.readline()
while not ears.open:
    time.sleep(0.01)
time.sleep(0.5)
released = time.monotonic()
lease.release()
thread.join()
print("after", granted - released, flush=True)
"""


@told
def test_who_waits_outlives_a_restart_of_the_server() -> None:
    """What it polls meanwhile fails as well, and is not the waiter's error."""
    from tests.servers import PostgreSQL

    with PostgreSQL() as server:
        with running(RESTARTED, environ={"DISTLOCK_TEST_URL": server.url}) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "waits\n"
            server.restart()
            said = ended(process, "go\n")
    *logged, last = said.splitlines()
    assert float(last.removeprefix("after ")) < TOLD, said
    assert len([line for line in logged if "lock_waiting_polls" in line]) <= 1


def test_a_wire_that_is_closed_meanwhile_does_not_end_the_thread() -> None:
    ears = Ears("default")

    class Gone:
        wire = type("Wire", (), {"fileno": lambda self: -1})()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ears, "private", Gone)
        ears._listening = object()
        ears.wait(0.01)
    ears.forget()


# -- the lookout ---------------------------------------------------------------------------------


class Deaf:
    """A waiter that is woken and does nothing."""

    def wake(self) -> None:
        pass


def test_a_turn_that_nobody_takes_goes_to_the_next() -> None:
    with held("x") as (lease,):
        dead = Deaf()
        lookout("default").join(("x", 0), dead)
        waiter = line_up("x", 1)[0]
        settle("x")
        released = time.monotonic()
        lease.release()
        assert waiter.result() - released < 1.0 + SOON + 0.5
        lookout("default").leave(("x", 0), dead, granted=False)


@contextmanager
def hung_looks() -> Iterator[None]:
    """No look at the row comes back, nor does a message."""
    end = threading.Event()

    def hang(real: Any, on: Any, *arguments: Any) -> Any:
        end.wait(20)
        return real(on, *arguments)

    with instead_of("look", hang):
        yield
        end.set()


def test_a_lookout_that_hangs_keeps_nobody_beyond_the_deadline() -> None:
    with held("x") as (lease,), hung_looks():
        waiters = line_up("x", 3, wait=1.2)
        for waiter in waiters:
            with pytest.raises(LockBusy):
                waiter.result()
            assert 1.2 <= waiter.ended - waiter.began < 2
        late = Waiter("x", wait=1.5)
        time.sleep(0.7)
        lease.release()
        assert late.result() - late.began < 2


def test_if_the_lookout_hangs_for_long_each_tries_by_itself(monkeypatch: Any) -> None:
    monkeypatch.setattr("distlock.lookout.STUCK", 1.0)
    with held("x") as (lease,), hung_looks():
        waiters = line_up("x", 2, wait=20)
        time.sleep(1.5)
        released = time.monotonic()
        lease.release()
        for waiter in waiters:
            assert waiter.result() - released < 2.5


@pytest.mark.parametrize("error", [OperationalError, ZeroDivisionError])
def test_if_no_look_succeeds_the_first_in_line_tries_by_itself(
    monkeypatch: Any, error: type[Exception]
) -> None:
    def fail(real: Any, *arguments: Any) -> Any:
        raise error("no answer")

    monkeypatch.setattr("distlock.lookout.STUCK", 1.0)
    with held("x") as (lease,):
        waiter = Waiter("x")
        settle("x")
        with instead_of("look", fail), instead_of("heard", lambda real, on: []):
            lookout("default")._look_at_all()
            lookout("default")._thread.wake()
            lease.release()
            waiter.result(5)


def test_a_look_that_fails_once_disturbs_nobody() -> None:
    def fail(real: Any, *arguments: Any) -> Any:
        raise OperationalError("no answer")

    with held("x"):
        waiter = Waiter("x")
        settle("x")
        with instead_of("look", fail) as looks, calls_of("grant") as tries:
            lookout("default")._look_at_all()
            lookout("default")._thread.wake()
            assert eventually(lambda: len(looks) > 2)
        assert tries == []
    waiter.result()


@told
def test_a_locked_table_ends_a_wait_as_late_as_the_waiters_own_lock_timeout() -> None:
    """The last try runs on the caller's own connection, which has the limits that he gave it."""

    def wait() -> float:
        with connection.cursor() as cursor:
            cursor.execute("SET lock_timeout = '500ms'")
        started = time.monotonic()
        with pytest.raises((LockBusy, OperationalError)):
            lock("x").acquire(wait=1)
        return time.monotonic() - started

    with held("x"), other_session() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("LOCK TABLE distlock_distributedlock IN EXCLUSIVE MODE")
        waited = in_thread(wait)
        cursor.execute("ROLLBACK")
    assert waited < 1 + 3 * 0.5 + 0.5


NO_THREAD = """
import threading, time, django
django.setup()
from distlock import lock
real = threading.Thread.start
def start(self):
    if "lookout" in self.name:
        raise RuntimeError("can't start new thread")
    real(self)
threading.Thread.start = start
tries = []
from distlock.places import Place
grant = Place.grant
def counted(self, claim, waited):
    tries.append(waited)
    return grant(self, claim, waited)
Place.grant = counted
lease = lock("x", wait=20).acquire()
print(2 <= len(tries) <= 6, max(b - a for a, b in zip(tries, tries[1:])) < 1.3, flush=True)
lease.release()
"""


def test_where_no_thread_can_start_each_tries_once_a_second() -> None:
    with held("x") as (lease,), running(NO_THREAD) as process:
        time.sleep(4)
        lease.release()
        assert ended(process) == "True True\n"


# -- holders that die ----------------------------------------------------------------------------


def test_a_dead_holders_lock_is_granted_when_the_last_lease_ends() -> None:
    """It was renewed for several ttl meanwhile, and nobody was told."""
    process = run_script("1.5", "sleep")
    waiter = Waiter("x")
    time.sleep(4)
    assert not waiter.granted
    os.kill(process.pid, signal.SIGKILL)
    died = time.monotonic()
    process.wait(10)
    process.stdout.close()  # type: ignore[union-attr]
    assert 0.3 < waiter.result() - died <= 1.5 + 1


@servers
def test_a_dead_holder_with_a_shorter_ttl_than_the_one_before() -> None:
    """The waiter saw a long lease, and whoever came next was faster, and died."""
    backend = backend_for(connection)
    lease = lock("x", ttl=300).acquire()
    waiter = Waiter("x")
    settle("x")
    with other_session() as cursor:
        cursor.execute("BEGIN")
        backend.release(cursor.db, lease._term, alone=False)
        claim = Claim(name="x", slot=0, owner="dead", ttl=1_000_000)
        assert backend.grant(cursor.db, claim, 0)
        cursor.execute("COMMIT")
    granted = time.monotonic()
    assert 0.5 < waiter.result() - granted <= 1 + 1
    lease._term.abandon()
    lease._context.forget(lease._term)
    lease._released = True


# -- interrupts and forks ------------------------------------------------------------------------


def interrupted_at(line: int) -> Callable[..., Any]:
    """A tracer that raises at the so-manyth line of the engine that a thread runs.

    Not at a `with`: there it could raise between a mutex and its release, where no handler runs.
    """
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(("distlock/waiting.py", "distlock/lookout.py")):
            return None
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not text.startswith("with "):
            count += 1
        if count == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.slow
def test_an_interrupt_at_any_line_costs_the_next_one_nothing() -> None:
    line, interrupted = 0, True
    slow: list[tuple[int, float]] = []
    while interrupted:
        line += 1
        lease = lock("x", ttl=300).acquire()
        ended: list[BaseException | None] = []

        def work(tracer: Any = interrupted_at(line), ended: Any = ended) -> None:  # noqa: B008
            sys.settrace(tracer)
            try:
                with lock("x", wait=20).acquire():
                    sys.settrace(None)
                ended.append(None)
            except KeyboardInterrupt as error:
                ended.append(error)
            finally:
                sys.settrace(None)
                connections.close_all()

        first = threading.Thread(target=work)
        first.start()
        assert eventually(lambda: ended or in_line("x"))  # noqa: B023
        second = Waiter("x")
        assert eventually(lambda: in_line("x") == 2 - len(ended) or ended)  # noqa: B023
        time.sleep(0.1)
        released = time.monotonic()
        lease.release()
        if (took := second.result() - released) > SOON + 0.3:
            slow.append((line, took))
        first.join(20)
        interrupted = ended[0] is not None
        with lookout("default")._mutex:
            lookout("default")._queues.clear()
    assert line > 15
    assert all(took < 1.0 + SOON + 0.5 for _, took in slow), slow
    assert len(slow) <= 6, slow


def test_an_interrupt_as_one_joins_the_line_leaves_nobody_in_it(monkeypatch: Any) -> None:
    real = Lookout.join

    def join(self: Lookout, key: Any, waiter: Any) -> None:
        real(self, key, waiter)
        raise KeyboardInterrupt

    with held("x"):
        monkeypatch.setattr(Lookout, "join", join)
        with pytest.raises(KeyboardInterrupt):
            in_thread(lambda: lock("x").acquire())
        assert in_line("x") == 0


def test_a_forked_child_waits_for_itself() -> None:
    with held("y") as (other,):
        waiter = Waiter("y")
        if backend_for(connection).notifies:
            assert listens()
        settle("y")
        before = own_sessions() if connection.vendor == "postgresql" else []
        holder = Waiter("x", hold=1.5)
        assert eventually(lambda: holder.granted)

        def child() -> None:
            for one in connections.all(initialized_only=True):
                one.connection = None
            assert not lookout("default")._queues
            started = time.monotonic()
            lock("x", wait=10).acquire()._released = True
            assert 0.5 < time.monotonic() - started < 1.5 + SOON + 0.5
            if backend_for(connection).notifies:
                assert lookout("default")._ears.open

        in_fork(child)
        assert in_line("y") == 1
        if connection.vendor == "postgresql":
            assert set(before) <= set(own_sessions())
        released = time.monotonic()
        other.release()
        assert waiter.result() - released < SOON
        assert not backend_for(connection).notifies or lookout("default")._ears.open
