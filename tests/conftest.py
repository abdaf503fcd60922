from __future__ import annotations

import os

import pytest
from django.db import connection

from tests.databases import version


def pytest_report_header() -> str:
    zone = "with" if os.environ.get("DISTLOCK_USE_TZ", "1") != "0" else "without"
    return f"database: {version(os.environ['DISTLOCK_TEST_URL'])}, {zone} USE_TZ"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is marked for other databases: a skip would say that something is missing."""
    if dropped := [item for item in items if not is_meant_for(item, connection.vendor)]:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if is_meant_for(item, connection.vendor)]


def is_meant_for(item: pytest.Item, vendor: str) -> bool:
    """Whether every ``vendor`` mark on the test, its class and its module names this one."""
    marks = [set(mark.args) for mark in item.iter_markers("vendor")]
    if unknown := set().union(*marks) - {"sqlite", "postgresql", "mysql"}:
        raise pytest.UsageError(f"{item.nodeid}: unknown names in a vendor mark: {unknown}")
    return all(vendor in mark for mark in marks)


@pytest.fixture
def vendor() -> str:
    """The database under test: sqlite, postgresql or mysql (which MariaDB is, too)."""
    return connection.vendor
