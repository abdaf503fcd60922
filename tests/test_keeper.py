"""Renewals, trust, loss, and what the keeper does when the database does not answer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from django.db import OperationalError, connection, connections, transaction

from distlock import LockLost, lock
from distlock.backends import backend_for
from distlock.background import Background
from distlock.connections import private
from distlock.keeper import keeper
from distlock.signals import lock_lost
from distlock.terms import margin
from tests.support import in_thread, is_free, other_session, steal
from tests.torture.conftest import ROOT, environment

pytestmark = pytest.mark.django_db(transaction=True)
servers = pytest.mark.vendor("postgresql", "mysql")


def eventually(check: Any, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.02)
    return bool(check())


@contextmanager
def renewals_that(answer: Any) -> Iterator[list[int]]:
    """Replace the keeper's statement; yields how many leases each call had."""
    calls: list[int] = []
    backend = backend_for(connection)
    real = backend.renew

    def renew(on: Any, held: Any, ttl: Any = None, *, pinned: bool = False) -> Any:
        calls.append(len(held))
        return answer(real, on, held)

    backend.__dict__["renew"] = renew
    try:
        yield calls
    finally:
        del backend.__dict__["renew"]


# -- renewing ----------------------------------------------------------------------------


def test_a_lease_outlives_its_ttl_while_it_is_renewed() -> None:
    with lock("x", ttl=0.6) as lease:
        first = lease.expires_at
        time.sleep(1.5)
        lease.check()
        assert lease.expires_at > first
        assert not is_free("x")


def test_many_leases_are_renewed_in_one_statement() -> None:
    leases = [lock(f"many {n}", ttl=30).acquire() for n in range(50)]
    with renewals_that(lambda real, on, held: real(on, held)) as calls:
        with keeper._mutex:
            for lease in leases:
                lease._term.next_renewal = 0.0
        keeper._thread.wake()
        assert eventually(lambda: calls)
        time.sleep(0.3)
    assert calls == [50]
    for lease in leases:
        lease.check()
        lease.release()


def test_leases_with_different_ttl_go_together() -> None:
    with lock("a", ttl=0.9) as short, lock("b", ttl=1.0) as long:
        time.sleep(1.3)
        short.check()
        long.check()


def test_a_released_lease_is_left_alone() -> None:
    lock("x", ttl=0.3).acquire().release()
    with renewals_that(lambda real, on, held: real(on, held)) as calls:
        time.sleep(0.5)
    assert calls == []


def test_trust_ends_before_the_database_does() -> None:
    with lock("x", ttl=10, renew=False) as lease:
        assert lease.remaining <= 10 - margin(10)


# -- losing ------------------------------------------------------------------------------


@servers
def test_a_stolen_lock_is_told_by_the_next_renewal() -> None:
    told = threading.Event()
    lock_lost.connect(receiver := lambda **kwargs: told.set())
    try:
        with pytest.raises(LockLost), lock("x", ttl=0.9) as lease:
            steal("x")
            assert told.wait(2)
            assert lease.lost
            with pytest.raises(LockLost):
                lease.check()
    finally:
        lock_lost.disconnect(receiver)


def test_errors_are_unknown_and_not_lost_until_trust_runs_out() -> None:
    def fail(real: Any, on: Any, held: Any) -> Any:
        raise OperationalError("no answer")

    lease = lock("x", ttl=1.2).acquire()
    with renewals_that(fail) as calls:
        time.sleep(0.7)
        assert calls, "no renewal was tried, so this proves nothing"
        assert not lease.lost
        assert eventually(lambda: lease.lost, 2)
    with pytest.raises(LockLost):
        lease.release()


def test_an_outage_shorter_than_the_lease_loses_nothing() -> None:
    """L4."""

    def fail(real: Any, on: Any, held: Any) -> Any:
        raise OperationalError("no answer")

    with lock("x", ttl=1.5) as lease:
        with renewals_that(fail) as calls:
            time.sleep(0.9)
        assert calls
        time.sleep(1.5)
        lease.check()


@servers
def test_a_row_locked_by_another_transaction_is_unknown() -> None:
    with lock("x", ttl=1.5) as lease:
        with other_session() as cursor:
            cursor.execute("BEGIN")
            cursor.execute("SELECT 1 FROM distlock_distributedlock WHERE name = 'x' FOR UPDATE")
            time.sleep(0.9)
            assert not lease.lost
            cursor.execute("ROLLBACK")
        time.sleep(1.2)
        lease.check()


@servers
def test_a_pinned_row_does_not_keep_the_other_leases_from_renewal() -> None:
    with lock("x", ttl=1.2), lock("y", ttl=1.2) as other:
        with other_session() as cursor:
            cursor.execute("BEGIN")
            cursor.execute("SELECT 1 FROM distlock_distributedlock WHERE name = 'x' FOR UPDATE")
            first = other.expires_at
            assert eventually(lambda: other.expires_at > first, 1)
            cursor.execute("ROLLBACK")


@servers
def test_a_lease_released_in_an_open_transaction_counts_as_held() -> None:
    with transaction.atomic():
        lease = lock("x", ttl=0.4).acquire()
        lease.release()
        time.sleep(0.8)
        assert not lease.lost
    assert is_free("x")


# -- the database does not answer ---------------------------------------------------------


@servers
def test_a_hung_statement_costs_no_healthy_lease() -> None:
    """The table is locked away for a while: the connection is given up, the leases live on."""
    with lock("x", ttl=3) as lease:
        with other_session() as cursor:
            if connection.vendor == "postgresql":
                cursor.execute("BEGIN")
                cursor.execute("LOCK TABLE distlock_distributedlock IN ACCESS EXCLUSIVE MODE")
            else:
                cursor.execute("LOCK TABLES distlock_distributedlock WRITE")
            time.sleep(1.8)
            assert not lease.lost
            cursor.execute("ROLLBACK" if connection.vendor == "postgresql" else "UNLOCK TABLES")
        time.sleep(2)
        lease.check()


class BlackHole:
    """A TCP proxy that can stop passing anything on, without closing."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.swallows = threading.Event()
        self.closed = False
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self.closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._sockets += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if not self.swallows.is_set():
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self.closed = True
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # close() alone waits for who is in recv()
            one.close()


@pytest.fixture
def black_hole() -> Iterator[BlackHole]:
    """Private connections go through a proxy."""
    connection.ensure_connection()  # the caller's own goes past it
    settings = connections["default"].settings_dict
    hole = BlackHole(settings["HOST"], int(settings["PORT"]))
    real = settings["PORT"]
    private("default").close()
    settings["PORT"] = str(hole.port)
    yield hole
    settings["PORT"] = real
    private("default").close()
    hole.close()


@servers
def test_a_network_that_swallows_packets_costs_no_healthy_lease(black_hole: BlackHole) -> None:
    with lock("x", ttl=4) as lease:
        first = lease.expires_at
        assert eventually(lambda: lease.expires_at > first, 3), "the keeper has a connection"
        black_hole.swallows.set()
        second = lease.expires_at
        time.sleep(2.4)
        black_hole.swallows.clear()
        assert eventually(lambda: lease.expires_at > second, 3)
        lease.check()


# -- the thread ----------------------------------------------------------------------------


def test_a_step_that_raises_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    steps: list[int] = []

    def step() -> float:
        steps.append(1)
        if len(steps) == 1:
            raise ZeroDivisionError
        return 0.01

    thread = Background("test", step, lambda: None)
    thread.ensure_started()
    thread.wake()
    assert eventually(lambda: len(steps) > 2, 3)
    thread.stop()
    count = len(steps)
    time.sleep(0.1)
    assert len(steps) == count
    assert "goes on after an error" in caplog.text
    thread.stop()


def test_stopping_what_never_started_is_harmless() -> None:
    Background("test", lambda: 1.0, lambda: None).stop()


def test_one_thread_however_many_leases() -> None:
    leases = [lock(f"n{n}").acquire() for n in range(5)]
    keepers = [thread for thread in threading.enumerate() if thread.name == "distlock-keeper"]
    assert len(keepers) == 1
    for lease in leases:
        lease.release()


@servers
def test_at_most_one_private_connection_for_many_threads() -> None:
    barrier = threading.Barrier(8)

    def work() -> None:
        for n in range(5):
            with transaction.atomic(), lock(f"p{threading.get_ident()} {n}", ttl=0.6):
                barrier.wait(20)
        connections.close_all()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    for thread in threads:
        thread.join(30)
    if connection.vendor == "postgresql":
        with other_session() as cursor:
            cursor.execute(
                "SELECT state, client_port, backend_start, query FROM pg_stat_activity "
                "WHERE application_name = 'distlock' AND datname = current_database()"
            )
            assert len(cursor.fetchall()) <= 1


SCRIPT = """
import sys, time, django
django.setup()
from distlock import lock
lease = lock("x", ttl=float(sys.argv[1])).acquire()
print("held", flush=True)
if sys.argv[2] == "exit":
    lease.release()
    lock("y", ttl=0.5).acquire().release()
    sys.exit(0)
time.sleep(60)
"""


def run_script(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_process_with_a_keeper_ends_promptly() -> None:
    process = run_script("5", "exit")
    start = time.monotonic()
    assert process.wait(10) == 0
    assert time.monotonic() - start < 3
    process.stdout.close()  # type: ignore[union-attr]


def test_a_killed_holders_lock_is_granted_after_its_ttl() -> None:
    """L2."""
    process = run_script("1.5", "sleep")
    time.sleep(2.5)
    assert not is_free("x"), "renewed while it lives"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    process.stdout.close()  # type: ignore[union-attr]
    start = time.monotonic()

    def take() -> None:
        with lock("x", wait=5):
            pass

    in_thread(take)
    assert time.monotonic() - start <= 1.5 + 1


def test_the_keeper_forgets_what_is_over() -> None:
    lease = lock("x", ttl=0.3, renew=False).acquire()
    assert lease._term in keeper._terms
    time.sleep(0.4)
    keeper._thread.wake()
    assert eventually(lambda: lease._term not in keeper._terms, 2)
    with pytest.raises(LockLost):
        lease.release()
