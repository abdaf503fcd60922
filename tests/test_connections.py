"""The private connection: where it comes from, what it leaves alone, and when it goes."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from django.db import DatabaseError, close_old_connections, connection, connections, transaction

from distlock import lock
from distlock.connections import TooSlow, private
from distlock.keeper import keeper
from tests.app.models import Counter
from tests.support import eventually, in_thread, is_free, other_session, sessions
from tests.torture.conftest import ROOT, environment

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "other"]),
    pytest.mark.vendor("postgresql", "mysql"),
]
postgresql = pytest.mark.vendor("postgresql")

POSTGRESQL = connection.vendor == "postgresql"
MINE = "SELECT pg_backend_pid()" if POSTGRESQL else "SELECT CONNECTION_ID()"
KILL = "SELECT pg_terminate_backend(%d)" if POSTGRESQL else "KILL %d"


others: set[int] = set()


@pytest.fixture(autouse=True)
def nothing_open() -> Iterator[None]:
    """Begin and end without a session of this process, so that the sessions can be counted."""
    connections.close_all()
    private("default").close_if_unused()
    others.clear()
    others.update(sessions())
    yield
    connections.close_all()
    private("default").close_if_unused()


def ours() -> set[int]:
    """The sessions that have come since the test began."""
    return sessions() - others


def left() -> int:
    """How many there are besides this thread's own, after a moment."""
    connections.close_all()
    eventually(lambda: len(ours()) <= 1)
    return len(ours())


@contextmanager
def changed(settings: dict[str, Any], **values: Any) -> Iterator[None]:
    before = dict(settings)
    settings.update(values)
    try:
        yield
    finally:
        settings.clear()
        settings.update(before)


# -- the pool ----------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[Any]:
    """Django's pool with one connection."""
    settings = connections["default"].settings_dict
    options = {**settings["OPTIONS"], "pool": {"min_size": 1, "max_size": 1, "timeout": 2}}
    with changed(settings, OPTIONS=options, CONN_MAX_AGE=0):
        yield connection.pool
        connection.close()
        connection.close_pool()


@postgresql
@pytest.mark.parametrize("end", ["commit", "rollback", "savepoint"])
def test_a_pool_of_one_is_enough_for_a_lock_in_a_transaction(pool: Any, end: str) -> None:
    start = time.monotonic()
    with transaction.atomic():
        Counter.objects.create(name="c", value=1)
        with transaction.atomic(savepoint=end == "savepoint"), lock("x", ttl=0.6):
            time.sleep(0.8)  # it is renewed
        if end == "rollback":
            transaction.set_rollback(True)
    assert time.monotonic() - start < 1.8, "it waited for the pool"
    assert pool.get_stats()["requests_num"] == 1
    connection.close()
    assert is_free("x")
    assert Counter.objects.filter(name="c").exists() is (end != "rollback")


@postgresql
def test_the_private_connection_is_not_of_the_pool(pool: Any) -> None:
    with transaction.atomic(), lock("x"):
        mine = connection.connection.info.backend_pid
        with private("default").use() as own:
            assert own.connection.info.backend_pid != mine
            assert own.pool is None
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        pid = connection.connection.info.backend_pid
    connection.close_pool()  # as Celery's fixup does around every task
    with private("default").use() as own, own.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        assert cursor.fetchone()[0] != pid


@postgresql
def test_a_lock_around_a_transaction_takes_no_second_one_of_the_pool(pool: Any) -> None:
    with lock("x", ttl=0.6):
        with transaction.atomic():
            time.sleep(0.8)
    assert pool.get_stats()["requests_num"] == 1
    connection.close()
    assert is_free("x")


@postgresql
def test_a_use_leaves_the_session_as_it_was() -> None:
    with transaction.atomic(), lock("x"):
        pass
    with private("default").use() as own:
        physical = own.connection  # past the limits that each statement has
        shown = [
            physical.execute(f"SHOW {name}").fetchone()[0]
            for name in ("statement_timeout", "synchronous_commit", "transaction_isolation")
        ]
        assert physical.autocommit
    assert shown == ["0", "on", "read committed"]


# -- nothing leaks -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")  # Django's
def test_at_most_one_for_many_threads_which_die_without_closing() -> None:
    """Django's own session goes when the collector finds its wrapper, with locks and without."""
    together = threading.Barrier(6)

    def work() -> None:
        for n in range(2):
            with transaction.atomic(), lock(f"{threading.get_ident()} {n}", ttl=0.6):
                together.wait(20)
                time.sleep(0.5)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.8)
    assert len(ours()) <= 6 + 1
    for thread in threads:
        thread.join(30)
    threads.clear()
    gc.collect()
    assert eventually(lambda: len(ours()) == 1), ours()
    (one,) = ours()
    if POSTGRESQL:
        with other_session() as cursor:
            cursor.execute("SELECT application_name FROM pg_stat_activity WHERE pid = %s", [one])
            assert cursor.fetchone() == ("distlock",)


@pytest.mark.parametrize("age", [0, 1, None])
@pytest.mark.parametrize("checked", [False, True])
def test_whatever_the_age_of_connections_one_is_left(age: int | None, checked: bool) -> None:
    settings = connections["default"].settings_dict
    with changed(settings, CONN_MAX_AGE=age, CONN_HEALTH_CHECKS=checked):
        for n in range(3):
            close_old_connections()  # as at the beginning and the end of a request
            lease = lock(f"a{n}", ttl=0.5).acquire()
            with transaction.atomic(), lock(f"b{n}", ttl=0.5):
                time.sleep(0.3)
            close_old_connections()
            lease.check()
            time.sleep(0.4)
            lease.release()
            assert is_free(f"a{n}")
            assert is_free(f"b{n}")
        assert left() == 1


def test_closing_all_between_acquire_and_release_changes_nothing() -> None:
    lease = lock("x", ttl=0.6).acquire()
    connections.close_all()
    time.sleep(0.8)
    lease.check()
    connections.close_all()
    lease.release()
    assert is_free("x")
    assert left() == 1


def test_short_locks_in_autocommit_leave_no_second_session_for_long() -> None:
    one = private("default")
    one.identity = None  # as in a new process
    with lock("x"):
        pass
    assert one._connection is not None, "it has been asked which table it reaches"
    one.close_if_unused(60)
    assert one._connection is not None
    one._used -= 61
    keeper.rounds("default")._thread.wake()
    assert eventually(lambda: one._connection is None)
    with lock("x"):
        assert one._connection is None, "it was asked again"
    assert left() == 0


def test_the_keeper_opens_nothing_but_the_private_connection(monkeypatch: Any) -> None:
    """On MariaDB a wrapper that wants to know the vendor opens a connection, without limits."""
    by: list[str] = []
    wrapper = type(connections["default"])
    real = wrapper.get_new_connection

    def noted(self: Any, parameters: Any) -> Any:
        by.append(threading.current_thread().name)
        return real(self, parameters)

    with lock("x", ttl=0.6):
        private("default").close()
        monkeypatch.setattr(wrapper, "get_new_connection", noted)
        time.sleep(0.8)
    assert [name for name in by if name != threading.current_thread().name] == ["distlock-connect"]


# -- limits ------------------------------------------------------------------------------


def test_a_turn_that_does_not_come_is_an_error_in_time() -> None:
    with private("default").use():
        start = time.monotonic()
        with pytest.raises(TooSlow, match="another thread"):
            in_thread(lambda: private("default").use(0.3).__enter__())
        assert 0.2 < time.monotonic() - start < 1


@pytest.mark.parametrize("_", range(4))
def test_the_keeper_goes_first(_: int) -> None:
    """Without a preference it would be first by chance, now and then."""
    order: list[str] = []

    def wait(who: str) -> None:
        with private("default").use(keeper=who == "keeper"):
            order.append(who)

    threads = [threading.Thread(target=wait, args=(who,)) for who in ("a", "b", "c", "keeper")]
    with private("default").use():
        for thread in threads:
            thread.start()
            time.sleep(0.03)
    for thread in threads:
        thread.join(10)
    assert order[0] == "keeper"
    assert sorted(order) == ["a", "b", "c", "keeper"]


def test_a_statement_that_takes_too_long_is_an_error_in_time() -> None:
    sleep = "SELECT pg_sleep(3)" if POSTGRESQL else "SELECT SLEEP(3)"
    start = time.monotonic()
    with pytest.raises(TooSlow):
        with private("default").use(0.4) as own, own.cursor() as cursor:
            cursor.execute(sleep)
    assert 0.2 < time.monotonic() - start < 1
    with private("default").use() as own, own.cursor() as cursor:
        cursor.execute("SELECT 1")


@postgresql
def test_the_server_gives_up_before_its_client_does() -> None:
    shown = "SELECT setting FROM pg_settings WHERE name = 'statement_timeout'"
    with private("default").use(2.0) as own, own.cursor() as cursor:
        cursor.execute(shown)
        assert 1000 < int(cursor.fetchone()[0]) <= 1600
    with pytest.raises(TooSlow, match="statement timeout"):
        with private("default").use(1.0) as own, own.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(3)")


@pytest.mark.vendor("mysql")
def test_the_session_has_limits_of_its_own_on_the_server() -> None:
    with private("default").use() as own, own.cursor() as cursor:
        cursor.execute("SELECT @@innodb_lock_wait_timeout, @@lock_wait_timeout")
        assert cursor.fetchone() == (1, 5)
        if own.mysql_is_mariadb:  # MySQL has such a limit for SELECT only
            cursor.execute("SELECT @@max_statement_time")
            assert cursor.fetchone() == (5,)


def test_an_error_of_a_statement_is_not_for_want_of_time() -> None:
    with pytest.raises(DatabaseError) as caught:
        with private("default").use() as own, own.cursor() as cursor:
            cursor.execute("SELECT nonsense")
    assert not isinstance(caught.value, TooSlow)


@pytest.mark.parametrize("inside", [False, True])
def test_a_dead_private_connection_is_replaced(inside: bool) -> None:
    lock("x").acquire().release()
    with private("default").use() as own, own.cursor() as cursor:
        cursor.execute(MINE)
        (session,) = cursor.fetchone()
    with other_session() as cursor:
        cursor.execute(KILL % session)
    assert eventually(lambda: session not in sessions())
    with transaction.atomic() if inside else nullcontext(), lock("x"):
        pass
    assert is_free("x")


# -- forks -------------------------------------------------------------------------------

FORK = """
import gc, os, signal, sys, threading, time, django
django.setup()
import distlock.connections
from django.db import connection, connections, transaction
from distlock import lock
from distlock.connections import private
from distlock.keeper import keeper
from distlock.limits import watch

def session():
    with private("default").use() as own, own.cursor() as cursor:
        cursor.execute(sys.argv[2])
        return cursor.fetchone()[0]

def child():
    signal.alarm(30)  # nobody else would end it
    assert lease.lost
    if sys.argv[1] == "exit":  # the interpreter's end drops everything, in no order
        distlock.connections._inherited.clear()
        gc.collect()
    if sys.argv[1] == "_exit":
        os._exit(0)
    if sys.argv[1] == "closes":
        connections.close_all()
    if sys.argv[1] == "locks":
        os.close(connection.connection.fileno())  # as Celery does
        connection.connection = None
        assert lock("x").try_acquire() is None
        with lock("child", ttl=0.6) as mine, transaction.atomic(), lock("in transaction"):
            time.sleep(0.8)
            mine.check()
        assert session() != before
    sys.exit(0)

lease = lock("x", ttl=1.2).acquire()
with transaction.atomic(), lock("y"):
    pass
before = session()
busy = threading.Event()

def use():
    with private("default").use():
        with watch._mutex, keeper._mutex, keeper.rounds("default")._mutex:
            busy.set()
            time.sleep(0.2)

if sys.argv[1] == "locks":
    threading.Thread(target=use).start()
    busy.wait()
pid = os.fork()
if pid == 0:
    child()
assert os.waitpid(pid, 0)[1] == 0, "the child failed"
time.sleep(1.5)
lease.check()
assert session() == before, "the parent lost its session"
lease.release()
print("ok")
"""


@pytest.mark.parametrize("end", ["exit", "_exit", "closes", "locks"])
def test_a_child_leaves_its_parents_session_alone(end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, end, MINE],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
    assert is_free("x")
