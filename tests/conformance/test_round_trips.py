"""Without contention: one statement to acquire, one to release, on the caller's own connection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection, transaction

from distlock import lock
from distlock.backends.base import Backend
from tests.conformance.rows import TABLE, claim, execute, expire, query, take

pytestmark = [
    pytest.mark.vendor("postgresql", "mysql"),
    pytest.mark.backends("PostgreSQL", "MariaDB"),
]


@pytest.fixture
def statements(backend: Backend) -> Iterator[list[str]]:
    sent: list[str] = []

    def note(run: Any, sql: str, *rest: Any) -> Any:
        sent.append(sql)
        return run(sql, *rest)

    connection.ensure_connection()
    with connection.execute_wrapper(note):
        yield sent


@pytest.mark.parametrize("found", ["new", "expired", "held"])
def test_a_grant_is_one_statement(backend: Backend, statements: list[str], found: str) -> None:
    if found != "new":
        take(backend, "before")
        if found == "expired":
            expire()
    statements.clear()
    granted = backend.grant(connection, claim(), 0)
    assert (granted is None) == (found == "held")
    assert len(statements) == 1


def test_a_release_is_one_statement(backend: Backend, statements: list[str]) -> None:
    held = take(backend)
    statements.clear()
    assert backend.release(connection, held, alone=True)
    assert len(statements) == 1


@pytest.mark.parametrize("found", ["new", "released"])
def test_a_block_in_autocommit_is_two_statements(
    backend: Backend, statements: list[str], found: str
) -> None:
    if found == "released":
        with lock("n"):
            pass
        statements.clear()
    with lock("n"):
        assert len(statements) == 1
    assert len(statements) == 2


@pytest.mark.vendor("postgresql")
def test_every_verb_is_one_statement(backend: Backend, statements: list[str]) -> None:
    held = take(backend)
    backend.renew(connection, [held, held])
    backend.guard(connection, held)
    backend.holder(connection, "n", 0)
    backend.stats(connection, "n", 0)
    backend.free(connection, held)
    backend.force_release(connection, "n", 0, held.token)
    backend.purge(connection, 0, 0, 10)
    assert len(statements) == 8


@pytest.mark.vendor("postgresql")
def test_what_is_counted_changes_no_index(backend: Backend) -> None:
    """Every update is a heap-only tuple: no column that the statements write has an index."""

    def updates() -> list[int]:
        """All, and the hot ones, with those of earlier tests that were not reported yet."""
        return list(
            query(
                f"SELECT pg_stat_get_xact_tuples_updated('{TABLE}'::regclass), "
                f"pg_stat_get_xact_tuples_hot_updated('{TABLE}'::regclass)"
            )[0]
        )

    with transaction.atomic():
        execute(f"TRUNCATE {TABLE}")
        before = updates()
        take(backend, "dead")
        for number in range(4):
            expire()
            assert backend.grant(connection, claim(f"owner {number}"), 1.5)
        expire()
        held = take(backend)
        assert backend.renew(connection, [held])
        assert backend.force_release(connection, "n", 0, held.token)
        held = take(backend)
        expire()
        assert backend.release(connection, held, alone=True)
        updated, hot = (now - then for now, then in zip(updates(), before, strict=True))
    assert updated == hot >= 14
