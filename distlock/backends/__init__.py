"""The store: vendor SQL stands here and nowhere else. Not a public interface yet.

`base.py` is the contract; `generic.py` the portable way to keep it; the others override what
their database does better, in the same order, so that two files can be laid side by side.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from .base import Backend
from .generic import Generic

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

__all__ = ["backend_for", "backend_unasked"]


def backend_for(connection: BaseDatabaseWrapper) -> Backend:
    """Return the backend that speaks this connection's dialect."""
    return _backend(connection.vendor, bool(getattr(connection, "mysql_is_mariadb", False)))


def backend_unasked(connection: BaseDatabaseWrapper) -> Backend:
    """Return the backend without asking the server: for MariaDB, that of MySQL."""
    return _backend(connection.vendor, False)


@cache
def _backend(vendor: str, is_mariadb: bool) -> Backend:
    if vendor == "postgresql":
        from .postgresql import PostgreSQL

        return PostgreSQL()
    if vendor == "mysql":
        from .mysql import MariaDB, MySQL

        return MariaDB() if is_mariadb else MySQL()
    if vendor == "sqlite":
        from .sqlite import SQLite

        return SQLite()
    return Generic()
