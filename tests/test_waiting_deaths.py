"""Waiting where somebody dies, is interrupted in the line, or forks."""

from __future__ import annotations

import linecache
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection, connections

from distlock import lock
from distlock.backends import backend_for
from distlock.backends.base import Claim
from distlock.lookout import Lookout, lookout
from tests.support import eventually, in_thread, other_session
from tests.test_keeper import run_script
from tests.test_leases import in_fork
from tests.waiters import Waiter, calls_of, held, in_line, listens, own_sessions, settle

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")

WATCHED = tuple(f"distlock/{name}.py" for name in ("waiting", "lookout", "queues"))
SOON = 0.2 if os.environ["DISTLOCK_TEST_URL"].startswith("postgresql") else 0.8

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
        claim = Claim(name="x", slot=0, owner="dead", ttl=500_000)
        assert backend.grant(cursor.db, claim, 0)
        with calls_of("grant") as tries:
            cursor.execute("COMMIT")
            granted = time.monotonic()
            assert 0.3 < waiter.result() - granted < 0.5 + 0.4
    assert len(tries) <= 4, "it was woken, tried in vain, and went to sleep again"
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
        if not frame.f_code.co_filename.endswith(WATCHED):
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
@pytest.mark.vendor("postgresql")  # no statement has a part in it, and a second passes at each line
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
    inherited: list[Any] = []
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
                inherited.append(one.connection)  # dropped, it would say goodbye for the parent
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
