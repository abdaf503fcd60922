"""Waiting where something breaks: sessions, the server, threads, forks, holders, the lookout."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import OperationalError, connection

from distlock import LockBusy, lock
from distlock.ears import Ears
from distlock.lookout import lookout
from tests.support import eventually, in_thread, other_session
from tests.waiters import (
    Deaf,
    Waiter,
    calls_of,
    ended,
    held,
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
        started = time.monotonic()
        ears.wait(0.01)
        assert time.monotonic() - started < 1
    ears.forget()


# -- the lookout ---------------------------------------------------------------------------------


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

    def hang(real: Any, on: Any, *arguments: Any, **more: Any) -> Any:
        end.wait(20)
        return real(on, *arguments, **more)

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
    def fail(real: Any, *arguments: Any, **more: Any) -> Any:
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
    def fail(real: Any, *arguments: Any, **more: Any) -> Any:
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
