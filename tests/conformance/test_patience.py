"""A SELECT that takes too long is stopped, and the connection is as it was."""

from __future__ import annotations

import time
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction

from distlock.backends import backend_for
from distlock.backends.base import Overdue
from tests.conformance.rows import execute, query

SLOW = {
    "postgresql": "SELECT pg_sleep(20)",
    "mysql": "SELECT count(*) FROM seq_1_to_100000 a, seq_1_to_100000 b",
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
    "SELECT count(*) FROM n",
}


def limits() -> Any:
    """What the session says of its own limit."""
    how = {"postgresql": "SHOW statement_timeout", "mysql": "SELECT @@max_statement_time"}
    return query(how.get(connection.vendor, "SELECT 1"))


@pytest.mark.parametrize("inside", [False, True])
def test_what_takes_too_long_is_stopped(vendor: str, inside: bool) -> None:
    before = limits()

    def check() -> None:
        started = time.monotonic()
        with pytest.raises(Overdue, match=r"longer than 0\.2 s"):
            with backend_for(connection).patient(connection, 0.2):
                query(SLOW[vendor])
        assert time.monotonic() - started < 10
        assert query("SELECT 1") == [(1,)]
        assert limits() == before

    if not inside:
        check()
        return
    with transaction.atomic():
        query("SELECT 1")
        check()


@pytest.mark.vendor("postgresql", "mysql")
def test_a_stricter_limit_of_the_session_stays(vendor: str) -> None:
    name = {"postgresql": "statement_timeout", "mysql": "max_statement_time"}[vendor]
    execute(f"SET {name} = {200 if vendor == 'postgresql' else 0.2}")
    try:
        strict, started = limits(), time.monotonic()
        with pytest.raises(Overdue), backend_for(connection).patient(connection, 15):
            query(SLOW[vendor])
        assert time.monotonic() - started < 10
        assert limits() == strict
    finally:
        execute(f"SET {name} = DEFAULT")


def test_what_is_quick_is_not() -> None:
    with transaction.atomic():
        before = limits()
        with backend_for(connection).patient(connection, 5):
            assert query("SELECT 1") == [(1,)]
        assert limits() == before
    assert connection.get_autocommit()


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(DatabaseError) as caught:
        with backend_for(connection).patient(connection, 5):
            query("SELECT no_such_column FROM distlock_distributedlock")
    assert not isinstance(caught.value, Overdue)
    assert query("SELECT 1") == [(1,)]
