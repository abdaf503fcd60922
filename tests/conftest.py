from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from django.core.management.commands import flush
from django.db import connection

from distlock.keeper import keeper
from distlock.signals import lock_lost
from distlock.terms import State
from tests.databases import version
from tests.proxy import Proxy

URL = os.environ["DISTLOCK_TEST_URL"]
POOLED = URL.startswith("pgbouncer")
THROUGH_PGBOUNCER = (
    "conformance",
    "test_leases.py",
    "test_life.py",
    "test_pgbouncer.py",
    "test_transactions.py",
    "test_waiting.py",
    "test_waiting_costs.py",
)
NEED_A_SESSION = {
    "repeatable_read": "sets the level of a session, which PgBouncer would hand to somebody else",
    "level": "the same",
    "planned": "PREPARE is for a session",
    "listening": "LISTEN is for a session, too",
    "test_a_dead_connection_is_replaced_and_the_grant_found_again": (
        "kills its session; outside a transaction it has none of its own behind PgBouncer"
    ),
}
"""Tests, or the fixtures of tests, that cannot run through PgBouncer, and why."""


def pytest_report_header() -> str:
    zone = "with" if os.environ.get("DISTLOCK_USE_TZ", "1") != "0" else "without"
    through = " through PgBouncer" if POOLED else ""
    return f"database: {version(URL)}{through}, {zone} USE_TZ"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is marked for other databases: a skip would say that something is missing."""
    if dropped := [item for item in items if not is_meant_for(item, connection.vendor)]:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if is_meant_for(item, connection.vendor)]


def is_meant_for(item: pytest.Item, vendor: str) -> bool:
    """Whether every ``vendor`` mark on the test, its class and its module names this one."""
    if POOLED and not is_meant_for_pgbouncer(item):
        return False
    marks = [set(mark.args) for mark in item.iter_markers("vendor")]
    if unknown := set().union(*marks) - {"sqlite", "postgresql", "pgbouncer", "mysql"}:
        raise pytest.UsageError(f"{item.nodeid}: unknown names in a vendor mark: {unknown}")
    names = {vendor, "pgbouncer"} if POOLED else {vendor}
    return not any(names.isdisjoint(mark) for mark in marks)


def is_meant_for_pgbouncer(item: pytest.Item) -> bool:
    """Whether a test is about statements, and needs no session from transaction to transaction."""
    part = item.path.relative_to(Path(__file__).parent).parts[0]
    names = {getattr(item, "originalname", item.name), *getattr(item, "fixturenames", ())}
    return part in THROUGH_PGBOUNCER and names.isdisjoint(NEED_A_SESSION)


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """End the leases that a test left behind: their losses and warnings would be the next one's."""
    yield
    for rounds in list(keeper._rounds.values()):
        for term in rounds._kept():
            term.move(State.RELEASED)


KEPT = {"django_content_type", "auth_permission"}
"""What migrate fills: a flush may leave it, and then nobody has to fill it again."""
FEW = 2_000_000
"""Bytes of tables that PostgreSQL empties sooner with DELETE than with TRUNCATE."""


@pytest.fixture(scope="session", autouse=True)
def only_full_tables_are_emptied() -> Iterator[None]:
    """Let a flush, which is most of what a short test costs, leave alone what has not changed."""
    operations: Any = type(connection.ops)
    original = operations.sql_flush

    def sql_flush(self: Any, style: Any, tables: Sequence[str], **how: Any) -> list[str]:
        looks = [
            f"SELECT '{table}' WHERE EXISTS (SELECT 1 FROM {self.quote_name(table)})"
            for table in tables
            if table not in KEPT
        ]
        with self.connection.cursor() as cursor:
            cursor.execute(" UNION ALL ".join(looks))
            full = [table for (table,) in cursor.fetchall()]
            if self.connection.vendor == "postgresql":
                size = "SELECT sum(pg_relation_size(name)) FROM unnest(%s::text[]) AS name"
                cursor.execute(size, [full])
                if (cursor.fetchone()[0] or 0) < FEW:
                    return [f"DELETE FROM {self.quote_name(table)}" for table in full]
                how["allow_cascade"] = True
        return original(self, style, full, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "sql_flush", sql_flush)
        patch.setattr(flush, "emit_post_migrate_signal", lambda *args, **how: None)
        yield


@pytest.fixture
def vendor() -> str:
    """The database under test: sqlite, postgresql or mysql (which MariaDB is, too)."""
    return connection.vendor


# -- what the tests of lost answers share (tests/cuts.py) ---------------------------------------


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy that the alias "other" goes through."""
    from tests.cuts import proxied  # it asks which database is tested

    with proxied() as opened:
        yield opened


@pytest.fixture
def lost() -> Iterator[list[str]]:
    """The names of that alias's locks that were told to be lost."""
    from tests.cuts import told

    with told(lock_lost) as names:
        yield names


@pytest.fixture
def nothing_is_lost(monkeypatch: pytest.MonkeyPatch, lost: list[str]) -> Iterator[None]:
    """Unknown is not lost. It is given up sooner than it usually is, to save time."""
    monkeypatch.setattr("distlock.hooks.PATIENCE", 1.5)
    yield
    assert lost == []
