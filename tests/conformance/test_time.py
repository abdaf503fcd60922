"""Time is the database's own, read once per statement, and never the start of a transaction."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from django.db import connection
from django.db import transaction as django_transaction
from django.utils import timezone

from distlock.backends.base import Backend
from tests.conformance.rows import (
    EPOCH,
    MILLISECOND,
    MINUTE,
    SECOND,
    claim,
    execute,
    expire,
    microseconds,
    now,
    purge,
    stored,
    take,
    write,
)

pytestmark = pytest.mark.usetz

HOUR = 60 * MINUTE
YEAR = 365 * 24 * HOUR


def test_the_clock_is_that_of_the_database(backend: Backend, mode: str) -> None:
    before = now()
    assert before <= backend.clock(connection) <= now()


def test_statements_read_the_same_clock(backend: Backend) -> None:
    """Where there is SQL for it, and where there is not."""
    before = backend.clock(connection)
    for sql in (backend.clock_us(connection), Backend.clock_us(backend, connection)):
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT {sql} + %s", [0])
            assert before <= cursor.fetchone()[0] <= backend.clock(connection)


def test_the_clock_counts_microseconds_since_1970(backend: Backend) -> None:
    """Not in the session's or the server's time zone: those are hours away."""
    assert abs(backend.clock(connection) - time.time() * 1e6) < 10 * MINUTE


def test_a_grants_moments_and_token_are_one_reading_of_the_clock(
    backend: Backend, mode: str
) -> None:
    for number in range(5):
        ttl = 1_234_567 + number * 111_111
        if connection.vendor == "sqlite":
            ttl -= ttl % MILLISECOND
        grant = backend.grant(connection, claim(name=f"new {number}", ttl=ttl), 0)
        assert grant is not None
        assert grant.expires_us - grant.acquired_us == ttl
        assert grant.token == grant.acquired_us
        write(f"new {number}", fencing_token=1, expires_at=-SECOND)
        grant = backend.grant(connection, claim("you", name=f"new {number}", ttl=ttl), 0)
        assert grant is not None
        assert grant.expires_us - grant.acquired_us == ttl
        assert grant.token == grant.acquired_us


def test_moments_have_the_resolution_of_the_clock(backend: Backend) -> None:
    """A millisecond on SQLite, else a microsecond: none of twenty readings is a coincidence."""
    unit = MILLISECOND if connection.vendor == "sqlite" else 1
    readings = []
    for number in range(20):
        held = take(backend, "me", f"n{number}")
        readings += [held.token, backend.clock(connection)]
        time.sleep(0.0013)
    assert any(reading % (10 * unit) for reading in readings)
    assert all(reading % unit == 0 for reading in readings)


def test_the_clock_of_the_client_has_no_effect(
    backend: Backend, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = take(backend, min_hold=MINUTE)
    shifted = time.time() + 10 * 365 * 24 * 3600
    monkeypatch.setattr(time, "time", lambda: shifted)
    monkeypatch.setattr(time, "time_ns", lambda: int(shifted * 1e9))
    monkeypatch.setattr(timezone, "now", lambda: EPOCH)
    before = now()
    assert before <= backend.clock(connection) <= now()
    assert backend.grant(connection, claim("you"), 0) is None
    assert backend.holder(connection, "n", 0) is not None
    assert purge(backend) == 0
    renewed = backend.renew(connection, [held])["me"]
    assert renewed is not None
    assert before + MINUTE <= renewed <= now() + MINUTE
    assert backend.release(connection, held, alone=mode == "autocommit")
    expire()
    again = take(backend, "you")
    assert before <= again.token <= now() + MILLISECOND
    assert before + MINUTE <= again.expires_us <= now() + MINUTE


@pytest.mark.vendor("postgresql", "mysql")
@pytest.mark.backends("PostgreSQL", "MariaDB", "MySQLOnMariaDB", "PortableOnMariaDB")
@pytest.mark.parametrize("zone", ["-11:00", "+13:00"])
def test_the_time_zone_of_the_session_has_no_effect(backend: Backend, zone: str) -> None:
    verb = "TIME ZONE INTERVAL '{}' HOUR TO MINUTE" if is_postgresql() else "time_zone = '{}'"
    before = now()
    execute(f"SET {verb.format(zone)}")
    try:
        assert before <= backend.clock(connection)
        held = take(backend, min_hold=SECOND)
        assert stored().acquired_at - before < MINUTE
        assert held.token - before < MINUTE
        renewed = backend.renew(connection, [held])["me"]
        assert renewed is not None
        assert 0 <= renewed - before - MINUTE < MINUTE
        holder = backend.holder(connection, "n", 0)
        assert holder is not None
        assert 0 <= microseconds(holder.acquired_at) - before < MINUTE
        assert backend.release(connection, held, alone=True)
        assert stored().expires_at - before < MINUTE
        assert stored().total_hold < MINUTE
        assert backend.grant(connection, claim("you"), 0) is None or stored().owner == "you"
    finally:
        connection.close()  # Django sets a time zone of its own for each session
    assert stored().acquired_at - before < MINUTE


def test_a_lease_may_last_for_years(backend: Backend, mode: str) -> None:
    held = take(backend, ttl=10 * YEAR)
    assert held.expires_us == stored().acquired_at + 10 * YEAR
    assert backend.renew(connection, [held], 9 * YEAR)["me"] >= now() + 9 * YEAR - SECOND
    assert purge(backend, 9 * YEAR) == 0


# -- inside a transaction that has been open for a while -----------------------------------------

A_WHILE = 200 * MILLISECOND


@pytest.fixture
def late(backend: Backend) -> Iterator[int]:
    """The time in a transaction that began a while ago, with a lease that ended in between."""
    take(backend, "ended", "ended", min_hold=0)
    take(backend, "live", "live")
    write("ended", expires_at=A_WHILE // 2)
    with django_transaction.atomic():
        now()
        time.sleep(A_WHILE / SECOND)
        yield now()


def test_late_in_a_transaction_a_grant_begins_now(backend: Backend, late: int) -> None:
    grant = backend.grant(connection, claim(name="new"), 0)
    assert grant is not None
    assert late <= grant.acquired_us == grant.token
    assert grant.expires_us == grant.acquired_us + MINUTE
    assert late <= stored("new").acquired_at
    grant = backend.grant(connection, claim(name="ended"), 0)
    assert grant is not None
    assert late <= grant.acquired_us == grant.token
    assert grant.expires_us == grant.acquired_us + MINUTE


def test_late_in_a_transaction_a_renewal_counts_from_now(backend: Backend, late: int) -> None:
    live = take(backend, "live", "live")  # its own grant, found again
    ended = take(backend, "you", "m")
    ended.name, ended.owner = "ended", "ended"
    renewed = backend.renew(connection, [live, ended])
    assert renewed.keys() == {"live"}
    assert renewed["live"] >= late + MINUTE


def test_late_in_a_transaction_a_release_ends_now(backend: Backend, late: int) -> None:
    held = take(backend, "me", "new")
    assert backend.release(connection, held, alone=False)
    assert stored("new").expires_at >= late
    held = take(backend, "me", "new")
    assert backend.free(connection, held)
    assert stored("new").expires_at >= late


def test_late_in_a_transaction_the_holder_is_whose_lease_lasts(backend: Backend, late: int) -> None:
    assert backend.holder(connection, "ended", 0) is None
    assert backend.holder(connection, "live", 0) is not None


def test_late_in_a_transaction_force_works_on_whom_it_finds(backend: Backend, late: int) -> None:
    token = stored("ended").fencing_token
    assert backend.force_release(connection, "ended", 0, token) is None
    raised = backend.force_release(connection, "live", 0, stored("live").fencing_token)
    assert raised is not None
    assert raised >= late
    assert stored("live").expires_at >= late


def test_late_in_a_transaction_a_purge_counts_back_from_now(backend: Backend, late: int) -> None:
    assert purge(backend) == 1
    assert stored("ended") is None


def test_late_in_a_transaction_the_clock_has_gone_on(backend: Backend, late: int) -> None:
    assert late <= backend.clock(connection) <= now()


def is_postgresql() -> bool:
    return connection.vendor == "postgresql"
