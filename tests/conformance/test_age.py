"""`age`: what the fake clock of users' tests does to the rows."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection

from distlock.backends.base import Backend
from tests.conformance.rows import (
    MILLISECOND,
    MINUTE,
    SECOND,
    TABLE,
    claim,
    execute,
    now,
    pinned,
    stored,
    take,
    within,
    write,
)

MOMENTS = ["acquired_at", "expires_at", "wanted_until"]


def age(backend: Backend, microseconds: int) -> None:
    backend.age(connection, TABLE, MOMENTS, microseconds)


def moments(name: str = "n") -> Any:
    row = stored(name)
    return row.acquired_at, row.expires_at


def test_a_row_is_that_much_older_to_the_microsecond(backend: Backend, mode: str) -> None:
    take(backend)
    acquired, expires = moments()
    age(backend, 90 * SECOND + 7 * MILLISECOND)
    assert moments() == (acquired - 90_007_000, expires - 90_007_000)


def test_a_lease_that_would_have_ended_has(backend: Backend, mode: str) -> None:
    held = take(backend, ttl=MINUTE)
    age(backend, 59 * SECOND)
    assert backend.renew(connection, [held])
    age(backend, 61 * SECOND)
    assert not backend.renew(connection, [held])
    assert take(backend, "you").token > held.token


def test_every_row_gets_older_and_a_moment_that_is_none_stays_none(
    backend: Backend, mode: str
) -> None:
    take(backend)
    take(backend, name="m")
    write("new", expires_at=0)
    execute(f"UPDATE {TABLE} SET acquired_at = NULL WHERE name = 'new'")
    before = moments("m"), moments("new")[1]
    age(backend, SECOND)
    assert moments("m") == tuple(moment - SECOND for moment in before[0])
    assert moments("new") == (None, before[1] - SECOND)


@pytest.mark.vendor("postgresql", "mysql")
def test_a_row_that_a_transaction_has_locked_is_passed_over(backend: Backend) -> None:
    take(backend)
    take(backend, name="m")
    before, other = moments(), moments("m")
    with pinned(), within(0.5):
        age(backend, SECOND)
    assert moments() == before
    assert moments("m") != other


def test_the_clock_itself_is_not_moved(backend: Backend, mode: str) -> None:
    take(backend)
    age(backend, 60 * MINUTE)
    again = backend.grant(connection, claim("you"), 0)
    assert again is not None
    assert abs(again.acquired_us - now()) < 10 * SECOND
