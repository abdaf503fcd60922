"""Renewals, trust, loss, and what the keeper does when the database does not answer."""

from __future__ import annotations

import math
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

from distlock import Lease, LockLost, deadlines, lock
from distlock.backends import backend_for
from distlock.backends.base import Unlock
from distlock.background import Background
from distlock.connections import private
from distlock.keeper import keeper
from distlock.signals import lock_lost
from distlock.terms import margin
from tests.support import eventually, in_thread, is_free, other_session, steal
from tests.torture.conftest import ROOT, environment

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")


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
    rounds = keeper.rounds("default")
    with renewals_that(lambda real, on, held: real(on, held)) as calls:
        with rounds._mutex:
            for lease in leases:
                lease._term.next_renewal = 0.0
        rounds._thread.wake()
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


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What has woken the keeper's thread, which has nothing to do and no plan."""
    rounds = keeper.rounds("default")
    lock("x", ttl=30).acquire().release()  # it runs
    woken: list[bool] = []
    monkeypatch.setattr(rounds._thread, "wake", lambda: woken.append(True))
    rounds._planned = math.inf  # whatever other tests have left
    return woken


def test_short_leases_do_not_wake_the_thread_one_by_one(woken: list[bool]) -> None:
    rounds = keeper.rounds("default")
    lock("x", ttl=30).acquire().release()
    assert woken.pop()
    rounds._delay()  # what a look does that finds it gone
    lock("x", ttl=30).acquire().release()
    assert not woken
    lock("x", ttl=15).acquire().release()  # it would be due before
    assert woken


def test_a_plan_that_has_passed_is_none(woken: list[bool]) -> None:
    rounds = keeper.rounds("default")
    rounds._planned = time.monotonic() - 1
    lock("x", ttl=30).acquire().release()
    assert woken
    rounds._planned = time.monotonic()  # that moment has come, and there is nothing to renew
    assert rounds._delay() > 15


def test_a_lease_is_renewed_in_time_after_the_machine_slept(woken: list[bool]) -> None:
    """The thread slept with it, and would sleep on."""
    keeper.rounds("default")._planned = time.monotonic() + 60
    deadlines.ahead += 55  # as it is never set back
    lock("x", ttl=30).acquire().release()
    assert woken


def test_after_a_look_that_failed_whoever_comes_wakes_the_thread(
    woken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = keeper.rounds("default")
    lock("x", ttl=30).acquire().release()
    woken.clear()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(rounds, "_look", lambda: 1 / 0)
        rounds._step()
    lock("x", ttl=30).acquire().release()
    assert woken


@pytest.mark.vendor("mysql")
def test_safe_updates_do_not_refuse_to_renew_many() -> None:
    """A server may have them for every session."""
    with connection.cursor() as cursor:
        cursor.execute("SET GLOBAL sql_safe_updates = 1")
    private("default").close_if_unused()
    try:
        leases = [lock(f"safe {number}", ttl=30).acquire() for number in range(10)]
        terms = [lease._term for lease in leases]
        with private("default").use() as own:
            renewed = backend_for(own).renew(own, terms)
        assert set(renewed) == {term.owner for term in terms}
        for lease in leases:
            lease.release()
    finally:
        with connection.cursor() as cursor:
            cursor.execute("SET GLOBAL sql_safe_updates = 0")
        private("default").close_if_unused()


def test_trust_ends_before_the_database_does() -> None:
    with lock("x", ttl=10, renew=False) as lease:
        assert lease.remaining <= 10 - margin(10)


# -- losing ------------------------------------------------------------------------------


@servers
def test_a_stolen_lock_is_told_by_the_next_renewal() -> None:
    told = threading.Event()
    lock_lost.connect(receiver := lambda **kwargs: told.set())
    try:
        with pytest.raises(LockLost), lock("x", ttl=60) as lease:
            steal("x")
            lease._term.next_renewal = 0.0
            keeper.rounds("default")._thread.wake()
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
def test_a_row_locked_by_another_transaction_moves_no_trust() -> None:
    with lock("x", ttl=60) as lease, other_session() as cursor:
        term = lease._term
        cursor.execute("BEGIN")
        cursor.execute("SELECT 1 FROM distlock_distributedlock WHERE name = 'x' FOR UPDATE")
        trusted = term.trusted_until
        with renewals_that(lambda real, on, held: real(on, held)) as calls:
            term.next_renewal = 0.0
            keeper.rounds("default")._thread.wake()
            assert eventually(lambda: calls and term.next_renewal)
        assert term.trusted_until == trusted
        cursor.execute("ROLLBACK")


@servers
def test_a_row_that_is_locked_here_is_not_asked_for() -> None:
    with renewals_that(lambda real, on, held: real(on, held)) as calls:
        with transaction.atomic():
            lock("x", ttl=0.6).acquire().release()
            time.sleep(0.5)
        assert calls == []


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
        for _ in range(2):
            assert is_renewed(lease, 1.5)
        lease.check()


class BlackHole:
    """A TCP relay that can stop passing anything on, without closing."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings, self._real = settings, settings["PORT"]
        self._target = (settings["HOST"], int(settings["PORT"]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        settings["PORT"] = str(self._listener.getsockname()[1])
        self._swallowed = threading.Event()
        self.swallows = False
        """Whether connections that are made now are swallowed, too."""
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow(self) -> None:
        """Pass nothing on any more of the connections that there are."""
        self._swallowed.set()
        self._swallowed = threading.Event()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._sockets += [client, server]
                swallowed = threading.Event() if self.swallows else self._swallowed
                if self.swallows:
                    swallowed.set()
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(*pair, swallowed)).start()

    def _pass(self, source: socket.socket, sink: socket.socket, swallowed: Any) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if not swallowed.is_set():
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._settings["PORT"] = self._real
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # close() alone waits for who is in recv()
            one.close()


@contextmanager
def black_hole_before(alias: str) -> Iterator[BlackHole]:
    """Private connections to an alias go through a relay; the caller's own goes past it."""
    connections[alias].ensure_connection()
    private(alias).close()
    hole = BlackHole(connections[alias].settings_dict)
    yield hole
    hole.close()
    private(alias).close()


@pytest.fixture
def black_hole() -> Iterator[BlackHole]:
    with black_hole_before("default") as hole:
        yield hole


def is_renewed(lease: Lease, within: float) -> bool:
    first = lease.expires_at
    return eventually(lambda: lease.expires_at > first, within)


@servers
def test_a_network_that_swallows_packets_costs_no_healthy_lease(black_hole: BlackHole) -> None:
    """The old connection stands still for ever; a new one would work."""
    with lock("x", ttl=3) as lease:
        assert is_renewed(lease, 2), "the keeper has a connection"
        black_hole.swallow()
        assert is_renewed(lease, 2.8)
        assert is_renewed(lease, 2)
        lease.check()


@servers
def test_a_server_that_answers_nobody_for_a_while_costs_no_healthy_lease(
    black_hole: BlackHole,
) -> None:
    """A connection that hangs as it is opened is given up in time, too."""
    with lock("x", ttl=3) as lease:
        black_hole.swallows = True
        private("default").close()
        time.sleep(1.5)  # it is due since 1.0
        black_hole.swallows = False
        assert is_renewed(lease, 1.3)
        lease.check()


@servers
def test_a_users_statement_that_hangs_costs_no_healthy_lease(black_hole: BlackHole) -> None:
    held: list[float] = []

    def work() -> None:
        with transaction.atomic(), lock("y"):
            held.append(time.monotonic())
        connections.close_all()

    with lock("x", ttl=3) as lease:
        assert is_renewed(lease, 2)
        time.sleep(0.8)  # due in 0.2 s
        black_hole.swallow()
        start = time.monotonic()
        thread = threading.Thread(target=work)
        thread.start()
        assert is_renewed(lease, 1.9)
        lease.check()
        thread.join(20)
    assert held, "the user's own acquire came through in the end"
    assert held[0] - start < 2


@servers
def test_a_long_lease_whose_renewal_hangs_costs_no_short_one(black_hole: BlackHole) -> None:
    with lock("long", ttl=600) as long, lock("x", ttl=3) as lease:
        assert is_renewed(lease, 2)
        black_hole.swallow()
        long._term.next_renewal = 0.0
        keeper.rounds("default")._thread.wake()
        assert is_renewed(lease, 2.8)
        lease.check()
        long.check()


@servers
def test_releases_that_wait_for_their_end_cost_no_healthy_lease(black_hole: BlackHole) -> None:
    others = [lock(f"other {n}", ttl=600).acquire() for n in range(5)]
    ended: list[Unlock] = []
    with lock("x", ttl=3) as lease:
        assert is_renewed(lease, 2)
        black_hole.swallow()
        for other in others:
            other._released = True
            keeper.drop(other._term)
            keeper.finish(other._term, ended.append)
        assert is_renewed(lease, 2.8)
        lease.check()
        assert eventually(lambda: ended == [Unlock.FREED] * 5)


@servers
def test_a_release_that_cannot_be_finished_keeps_no_other_waiting(monkeypatch: Any) -> None:
    leases = [lock(f"unfinished {n}", ttl=60).acquire() for n in range(4)]
    backend = backend_for(connection)
    real = backend.free
    tries: list[str] = []

    def free(on: Any, held: Any) -> Unlock:
        tries.append(held.name)
        if held.name == tries[0]:
            raise OperationalError("no answer")
        return real(on, held)

    monkeypatch.setitem(backend.__dict__, "free", free)
    ended: list[Unlock] = []
    for lease in leases:
        lease._released = True
        keeper.drop(lease._term)
        keeper.finish(lease._term, ended.append)
    assert eventually(lambda: ended == [Unlock.FREED] * 3, 2)
    monkeypatch.undo()
    assert eventually(lambda: ended == [Unlock.FREED] * 4, 2)


@servers
def test_a_database_that_hangs_costs_no_lease_of_another() -> None:
    """It accepts connections and never answers."""
    with lock("y", ttl=600, using="other") as long, black_hole_before("other") as hole:
        hole.swallows = True
        private("other").close()
        before = long.expires_at
        with lock("x", ttl=1.5) as lease:
            long._term.next_renewal = 0.0
            keeper.rounds("other")._thread.wake()
            for _ in range(6):
                assert is_renewed(lease, 1.4)
            lease.check()
        assert long.expires_at == before, "it did answer, so this proves nothing"
        hole.swallows = False


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
    thread = Background("test", lambda: 1.0, lambda: None)
    thread.stop()
    assert not thread.is_alive


def test_one_thread_however_many_leases() -> None:
    leases = [lock(f"n{n}").acquire() for n in range(5)]
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("distlock-keeper-default") == 1
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
    rounds = keeper.rounds("default")
    assert lease._term in rounds._terms
    time.sleep(0.4)
    rounds._thread.wake()
    assert eventually(lambda: lease._term not in rounds._terms, 2)
    with pytest.raises(LockLost):
        lease.release()
