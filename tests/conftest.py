from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.db import connection

from distlock.keeper import keeper
from distlock.terms import State
from tests.databases import version

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


@pytest.fixture
def vendor() -> str:
    """The database under test: sqlite, postgresql or mysql (which MariaDB is, too)."""
    return connection.vendor
