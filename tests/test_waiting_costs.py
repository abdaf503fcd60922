"""What waiting costs: statements, connections, and threads; at rest, and under many waiters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection

from distlock import lock
from distlock.backends.tickets import TICKETS
from distlock.connections import private
from distlock.lookout import IDLE, Lookout, lookout
from tests.support import eventually, in_thread, other_session, sessions
from tests.waiters import (
    LIMIT,
    Waiter,
    ended,
    held,
    last_words,
    line_up,
    listens,
    own_sessions,
    running,
    settle,
    statements,
)

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")
told = pytest.mark.vendor("postgresql")
polled = pytest.mark.vendor("mysql", "sqlite", "pgbouncer")

NAMES = [f"x{n}" for n in range(16)]


@pytest.fixture
def listening() -> Callable[[], bool]:
    """Whether the lookout has begun to listen: it needs a session of its own."""
    return listens


def finish(waiters: list[Waiter]) -> None:
    for waiter in waiters:
        waiter.result()


# -- statements ----------------------------------------------------------------------------------


@told
@pytest.mark.parametrize("waiters", [1, 32])
def test_who_waits_sends_no_statement(waiters: int, listening: Any) -> None:
    with held("x"):
        lined_up = line_up("x", waiters)
        assert listening()
        settle("x")
        before = last_words()
        with statements() as said:
            time.sleep(4)
        assert said == []
        assert last_words() == before
    finish(lined_up)


@told
def test_nor_do_many_who_wait_for_many_names(listening: Any) -> None:
    with held(*NAMES):
        lined_up = [waiter for name in NAMES for waiter in line_up(name, 2)]
        assert listening()
        settle(*NAMES)
        before = last_words()
        with statements() as said:
            time.sleep(4)
        assert said == []
        assert last_words() == before
    finish(lined_up)


def questions() -> int:
    """How many statements the server has been asked (MariaDB)."""
    with other_session() as cursor:
        cursor.execute("SHOW GLOBAL STATUS LIKE 'Questions'")
        return int(cursor.fetchone()[1])


@polled
def test_elsewhere_a_process_looks_at_most_four_times_a_second(monkeypatch: Any) -> None:
    monkeypatch.setattr("distlock.lookout.DEAF", 60)  # nor does it try to listen meanwhile
    with held(*NAMES):
        lined_up = [waiter for name in NAMES for waiter in line_up(name, 2)]
        time.sleep(1)
        asked = questions() if connection.vendor == "mysql" else 0
        with statements() as said:
            time.sleep(5)
        assert 5 <= len(said) <= 4 * 5
        if connection.vendor == "mysql":
            opened = 8  # what the sessions that count have asked themselves
            assert questions() - asked <= 4 * 5 + opened
    finish(lined_up)


@servers
def test_fair_costs_a_process_less_than_a_statement_a_second(listening: Any) -> None:
    """A sign of life for all together. Each is one round trip, which reads the clock, too."""
    with held(*NAMES):
        lined_up = [waiter for name in NAMES for waiter in line_up(name, 2, fair=True)]
        assert listening()
        settle(*NAMES)
        asked = questions() if connection.vendor == "mysql" else 0
        with statements() as said:
            time.sleep(6)
        signs = [sql for sql in said if TICKETS in sql]
        assert 2 <= len(signs) <= 5
        if connection.vendor == "mysql":
            assert len(said) <= 4 * 6
            opened = 8
            assert questions() - asked <= 4 * 6 + opened
        else:
            assert said == signs
    finish(lined_up)


@told
def test_a_lease_that_is_renewed_is_looked_at_again_at_its_first_end(listening: Any) -> None:
    """And then no sooner than at the next: that is the one statement that waiting costs."""
    with held("x", ttl=3):
        lined_up = line_up("x", 4)
        assert listening()
        time.sleep(0.5)
        with statements() as said:
            time.sleep(4)
        looks = [sql for sql in said if "awaited" in sql]
        assert 1 <= len(looks) <= 3
    finish(lined_up)


# -- connections ---------------------------------------------------------------------------------


@servers
def test_a_process_has_at_most_two_connections_more(listening: Any) -> None:
    with held(*NAMES):
        before = sessions()
        lined_up = [waiter for name in NAMES for waiter in line_up(name, 2)]
        settle(*NAMES)
        in_thread(lambda: lock("y").acquire().release())
        more = len(sessions() - before) - sum(waiter.is_connected for waiter in lined_up)
        assert more <= 2
        if connection.vendor == "postgresql":
            assert 1 <= len(own_sessions()) <= 2
    finish(lined_up)


FIRST_ACT = """
import sys, time, django
django.setup()
from distlock import lock
try:
    lock("x", wait=4).acquire()
except TimeoutError:
    print("busy")
"""


@servers
def test_a_process_that_does_nothing_but_wait_has_no_more_either(listening: Any) -> None:
    with held("x"):
        before = sessions()
        with running(FIRST_ACT) as process:
            most = 0
            while process.poll() is None:
                most = max(most, len(sessions() - before))
                time.sleep(0.05)
            assert ended(process) == "busy\n"
    assert most == 1 + 1, "its own, and one that listens or polls"


@told
def test_the_connection_that_listens_is_closed_when_nobody_waits(
    monkeypatch: Any, listening: Any
) -> None:
    monkeypatch.setattr("distlock.lookout.IDLE", 0.5)
    with held("x") as (lease,):
        waiter = Waiter("x")
        assert listening()
        one = private("default", to_listen=True)
        time.sleep(1.5)
        assert one.wire is not None, "somebody waits"
        lease.release()
        waiter.result()
    assert eventually(lambda: one.wire is None, 3)
    assert eventually(lambda: not lookout("default")._ears.open)
    with held("x") as (lease,):
        waiter = Waiter("x")
        assert listening()
        settle("x")
        released = time.monotonic()
        lease.release()
        assert waiter.result() - released < 0.2


@told
def test_it_makes_way_where_a_database_is_made_or_dropped(listening: Any) -> None:
    with held("x") as (lease,):
        waiter = Waiter("x")
        assert listening()
        lease.release()
        waiter.result()
    ears = lookout("default")._ears
    assert ears.open
    assert own_sessions()
    opened: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        opener = private("default", to_listen=True)._opener
        patch.setattr(opener, "open", lambda limit: opened.append("again"))
        with connection._nodb_cursor():
            assert not own_sessions()
            lookout("default")._thread.wake()
            assert eventually(lambda: not ears.open)
    assert opened == []


def test_a_lookout_for_nobody_sleeps() -> None:
    """Also if it does not listen: there is no need to."""
    one = Lookout("default")
    for _ in range(2):
        assert one._step() == pytest.approx(IDLE, rel=0.1)
    assert not one._ears.open
    one.forget()


# -- threads -------------------------------------------------------------------------------------


def test_one_thread_looks_out_for_all() -> None:
    with held(*NAMES):
        lined_up = [waiter for name in NAMES for waiter in line_up(name, 2)]
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("distlock-lookout-default") == 1
    finish(lined_up)


def test_threads_that_are_the_first_to_wait_make_one_lookout() -> None:
    """The one that was made in vain is closed."""
    import distlock.lookout as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_lookouts", {})
        barrier = threading.Barrier(8)
        made: list[module.Lookout] = []

        class Slow(module.Lookout):
            def __init__(self, alias: str) -> None:
                super().__init__(alias)
                made.append(self)
                barrier.wait(LIMIT)

        patch.setattr(module, "Lookout", Slow)
        found: list[module.Lookout] = []
        threads = [
            threading.Thread(target=lambda: found.append(lookout("default"))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert len(made) == 8
        assert len({id(one) for one in found}) == 1
        closed = [one._ears._bell.fileno() == -1 for one in made]
        assert closed.count(False) == 1
        found[0].forget()
