"""Each test here runs on every backend that can speak to the database under test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection

from distlock import backends
from distlock.backends.base import Backend, Claim
from distlock.backends.generic import Generic
from distlock.backends.mysql import MariaDB, MySQL
from distlock.backends.postgresql import PostgreSQL
from distlock.backends.sqlite import SQLite


class PortableOnPostgreSQL(Generic):
    """The portable path, on PostgreSQL."""

    exact_collation = PostgreSQL.exact_collation
    clock_sql = {"": "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"}
    moment_to_db = PostgreSQL.moment_to_db

    def moment_from_db(self, value: Any) -> Any:
        return super().moment_from_db(value.astimezone()) if value.tzinfo is None else value


class PortableOnMariaDB(Generic):
    """The portable path, on MariaDB."""

    exact_collation = MariaDB.exact_collation
    clock_sql = MySQL.clock_sql
    contention = MySQL.contention


class MySQLOnMariaDB(MySQL):
    """The statements for MySQL 8, which cannot be run here, on MariaDB."""

    _is_mariadb = True


CANDIDATES: dict[str, list[type[Backend]]] = {
    "sqlite": [SQLite],
    "postgresql": [PostgreSQL, PortableOnPostgreSQL],
    "mysql": [MariaDB, MySQLOnMariaDB, PortableOnMariaDB],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize(
            "backend", CANDIDATES[connection.vendor], indirect=True, ids=lambda cls: cls.__name__
        )


@pytest.fixture
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, transactional_db: None
) -> Iterator[Backend]:
    chosen: Backend = request.param()
    monkeypatch.setattr(backends, "_backend", lambda vendor, is_mariadb: chosen)
    yield chosen
