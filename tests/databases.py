"""A database named by a URL: its Django settings, one statement on it, and its version."""

from __future__ import annotations

import contextlib
import importlib
import re
import sqlite3
from typing import Any
from urllib.parse import unquote, urlsplit

ENGINES = {
    "sqlite": "sqlite3",
    "postgresql": "postgresql",
    "pgbouncer": "postgresql",  # in transaction mode
    "mysql": "mysql",
    "mariadb": "mysql",
}
CONNECT_LIMIT = 5


class Unavailable(Exception):
    """A database cannot be used here; the message says why."""


def settings_for(url: str) -> dict[str, Any]:
    """Django's settings for ``scheme://user:password@host:port/name`` or ``sqlite:///path``."""
    parts = urlsplit(url)
    if parts.scheme not in ENGINES:
        raise ValueError(
            f"a database URL starts with one of {', '.join(ENGINES)}, not with {parts.scheme!r}"
        )
    more = {"DISABLE_SERVER_SIDE_CURSORS": True} if parts.scheme == "pgbouncer" else {}
    return more | {
        "ENGINE": f"django.db.backends.{ENGINES[parts.scheme]}",
        "NAME": unquote(parts.path[1:]),
        "HOST": parts.hostname or "",
        "PORT": parts.port or "",
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
    }


def query(url: str, sql: str, *, name: str | None = None) -> tuple[Any, ...] | None:
    """Run one statement as ``rows`` does; return its first row."""
    return next(iter(rows(url, sql, name=name)), None)


def rows(url: str, sql: str, *, name: str | None = None) -> list[tuple[Any, ...]]:
    """Run one statement in autocommit on a connection of its own; return what it gives.

    ``name`` replaces the database of the URL. Raises ``Unavailable`` without the driver.
    """
    with contextlib.closing(connect(url, name)) as connection:
        cursor = connection.cursor()
        cursor.execute(sql)
        return list(cursor.fetchall()) if cursor.description else []


def connect(url: str, name: str | None = None) -> Any:
    """The driver's own connection, in autocommit. The caller closes it."""
    at = settings_for(url)
    postgresql = at["ENGINE"].endswith("postgresql")
    module = "psycopg" if postgresql else "MySQLdb"
    try:
        driver = importlib.import_module(module)
    except ImportError as error:
        wanted = "psycopg" if postgresql else "mysqlclient, which needs a C compiler and headers"
        raise Unavailable(f"no driver ({error}): install {wanted}") from error
    return driver.connect(
        host=at["HOST"] or "127.0.0.1",
        port=at["PORT"] or (5432 if postgresql else 3306),
        user=at["USER"],
        password=at["PASSWORD"],
        connect_timeout=CONNECT_LIMIT,
        autocommit=True,
        **{"dbname" if postgresql else "database": at["NAME"] if name is None else name},
    )


def version(url: str) -> str:
    """What answers at the URL, for people to read: ``PostgreSQL 15.14``, ``MariaDB 10.11.14``.

    Raises ``Unavailable`` if nothing does.
    """
    if url.startswith("sqlite"):
        return f"SQLite {sqlite3.sqlite_version}"
    postgresql = settings_for(url)["ENGINE"].endswith("postgresql")
    try:
        row = query(url, "SELECT version()", name="postgres" if postgresql else "")
    except Unavailable:
        raise
    except Exception as error:  # the driver's own, whichever it is
        raise Unavailable(f"no answer from the server ({error})") from error
    return version_text(str(row[0]) if row else "")


def version_text(said: str) -> str:
    """The product and the number in a server's own words about its version."""
    number = re.search(r"\d+(\.\d+)+", said)
    product = next((known for known in ("PostgreSQL", "MariaDB") if known in said), "MySQL")
    return f"{product} {number[0] if number else said}"
