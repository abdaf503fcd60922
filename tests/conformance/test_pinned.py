"""A grant never waits for a row lock: a row that somebody's transaction has locked is busy."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import OperationalError, connection
from django.db.backends.base.base import BaseDatabaseWrapper

from distlock.backends.base import Backend
from tests.conformance.rows import (
    MINUTE,
    SECOND,
    TABLE,
    claim,
    execute,
    expire,
    pinned,
    purge,
    query,
    stored,
    take,
    transaction,
    within,
    write,
)

servers = pytest.mark.vendor("postgresql", "mysql")
SHARED = {"postgresql": "FOR SHARE", "mysql": "LOCK IN SHARE MODE"}


@servers
@pytest.mark.parametrize("shared", [False, True], ids=["exclusive", "shared"])
@pytest.mark.parametrize("found", ["held", "expired", "released", "the claim's own"])
def test_a_pinned_row_is_busy_at_once(backend: Backend, found: str, shared: bool) -> None:
    held = take(backend, "before")
    if found == "released":
        backend.release(connection, held, alone=True)
    elif found == "expired":
        expire()
    before = stored()
    owner = "before" if found == "the claim's own" else "me"
    with pinned(lock=SHARED[connection.vendor] if shared else "FOR UPDATE"), within(0.5):
        assert backend.grant(connection, claim(owner), 0) is None
    assert stored() == before
    if found != "held":
        take(backend, owner)


@servers
def test_a_pinned_row_is_busy_inside_a_transaction_that_stays_usable(backend: Backend) -> None:
    take(backend, "before")
    expire()
    with pinned(), transaction(connection):
        with within(0.5):
            assert backend.grant(connection, claim(), 0) is None
        take(backend, "me", "m")
        connection.commit()
    assert stored("m").owner == "me"
    take(backend)


@servers
def test_a_row_that_is_written_but_not_committed_is_busy(
    backend: Backend, other: BaseDatabaseWrapper
) -> None:
    take(backend, "before")
    with transaction(other):
        execute(f"UPDATE {TABLE} SET owner = '', expires_at = acquired_at", on=other)
        with within(0.5):
            assert backend.grant(connection, claim(), 0) is None
        other.commit()
    take(backend)


@servers
def test_a_pinned_neighbour_is_no_hindrance(backend: Backend, other: BaseDatabaseWrapper) -> None:
    """Not even by a lock on the gap beside it."""
    for name in ("b", "d", "f"):
        write(name, expires_at=MINUTE)
    held = take(backend, "holder", "h")
    write("free", expires_at=-SECOND)
    with transaction(other):
        assert backend.guard(other, held)
        assert backend.release(other, held, alone=False)
        query(f"SELECT 1 FROM {TABLE} WHERE name = 'b' AND slot = 0 FOR UPDATE", on=other)
        for name in ("a", "aa", "bb", "c", "g", "hh", "i", "z", "free"):
            with within(0.5):
                take(backend, "me", name)
        with within(0.5):
            take(backend, "me", "h", slot=1)


@servers
def test_among_many_rows_a_pinned_neighbour_is_no_hindrance_to_any_verb(
    backend: Backend,
) -> None:
    """A statement that scans would meet the lock on its way."""
    for number in range(300):
        write(f"n{number:03}", expires_at=MINUTE, owner=f"owner {number}", ttl=MINUTE)
    with pinned("n150"):
        for number in (149, 151):
            name = f"n{number}"
            expire(name)
            with within(0.5):
                held = take(backend, "me", name)
            with within(0.5):
                assert backend.renew(connection, [held])["me"]
            with within(0.5):
                assert backend.guard(connection, held)
            with within(0.5):
                assert backend.release(connection, held, alone=True)
            with within(0.5):
                held = take(backend, "me", name)
                assert backend.free(connection, held)
            with within(0.5):
                held = take(backend, "me", name)
                assert backend.force_release(connection, name, 0, held.token)
        many = [claim(f"owner {number}", f"n{number:03}") for number in range(200)]
        with within(1.0):
            renewed = backend.renew(connection, many)  # type: ignore[arg-type]
        assert [owner for owner, expires in renewed.items() if expires is None] == ["owner 150"]


@pytest.mark.vendor("sqlite")
def test_a_held_lock_is_refused_without_the_write_lock_of_the_file(
    backend: Backend, other: BaseDatabaseWrapper
) -> None:
    take(backend)
    execute("PRAGMA busy_timeout = 2000")
    execute("BEGIN IMMEDIATE", on=other)
    try:
        with within(0.5):
            assert backend.grant(connection, claim("you"), 0) is None
            assert backend.holder(connection, "n", 0) is not None
    finally:
        execute("ROLLBACK", on=other)
        execute("PRAGMA busy_timeout = 20000")


@pytest.mark.vendor("sqlite")
def test_a_file_that_somebody_writes_is_contention(
    backend: Backend, other: BaseDatabaseWrapper
) -> None:
    execute("PRAGMA busy_timeout = 0")
    execute("BEGIN IMMEDIATE", on=other)
    try:
        with pytest.raises(Exception, match="locked") as caught:
            backend.grant(connection, claim(), 0)
        assert backend.is_contention(caught.value)
    finally:
        execute("ROLLBACK", on=other)
        execute("PRAGMA busy_timeout = 20000")


@pytest.mark.vendor("sqlite")
def test_what_looks_before_it_writes_has_the_write_lock_of_the_file_when_it_looks(
    backend: Backend, other: BaseDatabaseWrapper
) -> None:
    """Else somebody may write in between, and SQLite refuses the write that comes second."""
    execute("PRAGMA busy_timeout = 0", on=other)
    looked = []

    def interfere(run: Any, sql: str, *rest: Any) -> Any:
        result = run(sql, *rest)
        if f"FROM {TABLE}" in sql and connection.connection.in_transaction:
            looked.append(sql)
            with pytest.raises(OperationalError, match="locked"):
                execute("BEGIN IMMEDIATE", on=other)
        return result

    held = take(backend)
    with connection.execute_wrapper(interfere):
        assert backend.force_release(connection, "n", 0, held.token)
        assert len(looked) == 1
        assert purge(backend) == 1
        assert len(looked) > 1
