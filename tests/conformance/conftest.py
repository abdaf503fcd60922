"""Each test here runs on every backend that can speak to the database under test.

A test that takes `mode` runs in autocommit and inside a transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from distlock import backends
from distlock.backends.base import Backend
from distlock.backends.generic import Generic
from distlock.backends.mysql import MariaDB, MySQL
from distlock.backends.postgresql import PostgreSQL
from distlock.backends.sqlite import SQLite
from distlock.connections import private
from tests.conformance import rows


class PortableOnPostgreSQL(Generic):
    """The portable path, on PostgreSQL."""

    exact_collation = PostgreSQL.exact_collation
    now_sql = {"": "clock_timestamp()"}
    clock_sql = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
    moment_to_db = PostgreSQL.moment_to_db
    moment_from_db = PostgreSQL.moment_from_db

    def _us(self, value: Any) -> int:
        return super()._us(value.astimezone() if value.tzinfo is None else value)


class PortableOnMariaDB(Generic):
    """The portable path, on MariaDB."""

    exact_collation = MariaDB.exact_collation
    now_sql = MySQL.now_sql
    clock_sql = MySQL.clock_sql
    contention = MySQL.contention


class MySQLOnMariaDB(MySQL):
    """The statements for MySQL 8, which cannot be run here, on MariaDB."""

    exact_collation = MariaDB.exact_collation
    _is_mariadb = True


CANDIDATES: dict[str, list[type[Backend]]] = {
    "sqlite": [SQLite],
    "postgresql": [PostgreSQL, PortableOnPostgreSQL],
    "mysql": [MariaDB, MySQLOnMariaDB, PortableOnMariaDB],
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backends(*names): run only on these backend classes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test here a database whose transactions are real, with one table to clear."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.django_db(transaction=True, available_apps=["distlock"]))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("backends")
        classes = [
            candidate
            for candidate in CANDIDATES[connection.vendor]
            if only is None or candidate.__name__ in only.args
        ]
        metafunc.parametrize("backend", classes, indirect=True, ids=lambda cls: cls.__name__)


@pytest.fixture
def _django_db_helper(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """Take the place of pytest-django's own, which spends 25 ms a test on flushing the project.

    Should it ever be called otherwise, the tests are slower and nothing else.
    """
    with django_db_blocker.unblock():
        rows.clear()
        yield
        rows.clear()


@pytest.fixture
def table(transactional_db: None) -> Iterator[None]:
    """The lock table, empty, and statements that do not wait for long."""
    rows.bounded(connection)
    yield
    rows.unbounded(connection)


@pytest.fixture
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, table: None
) -> Backend:
    chosen: Backend = request.param()
    private("default")  # has its settings, for all tests, from the backend that it is made with
    monkeypatch.setattr(backends, "_backend", lambda vendor, is_mariadb: chosen)
    return chosen


@pytest.fixture(params=["autocommit", "transaction"])
def mode(request: pytest.FixtureRequest, backend: Backend) -> Iterator[str]:
    """Whether the test runs in autocommit or inside one transaction, as under `TestCase`."""
    if request.param == "autocommit":
        yield request.param
    else:
        with transaction.atomic():
            yield request.param


@pytest.fixture
def other(table: None) -> Iterator[BaseDatabaseWrapper]:
    """Another session on the same database."""
    with rows.session() as opened:
        yield opened
