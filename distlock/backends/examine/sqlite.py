"""SQLite: where the file is, and whether it may be written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from django.conf import settings

from ...findings import Code, Finding
from . import version

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

VERSION = (3, 35)


def examine_settings(in_memory: bool) -> Iterator[Finding]:
    """Yield what the settings of an alias say, without a connection."""
    if not settings.DEBUG and not in_memory:
        yield Finding(
            Code.ONE_HOST,
            "Locks are kept in SQLite, and DEBUG is off. A lock in a file reaches no further than "
            "the file: a second host has another one, and both are granted the same name.",
            "Let DISTLOCK['USING'] name a PostgreSQL or MariaDB database. If all that takes locks "
            "runs on one host, silence this with SILENCED_SYSTEM_CHECKS.",
        )


def examine(connection: BaseDatabaseWrapper) -> Iterator[Finding]:
    """Yield what is wrong with this connection."""
    yield from version(connection, VERSION)
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA query_only")
        query_only = cursor.fetchone()[0]
        cursor.execute("PRAGMA synchronous")
        synchronous = cursor.fetchone()[0]
    if query_only:
        yield Finding(
            Code.READ_ONLY,
            "The connection takes no writes (PRAGMA query_only).",
            "Let DISTLOCK['USING'] name an alias that writes, or drop that pragma.",
        )
    if not synchronous:
        yield Finding(
            Code.CORRUPTIBLE,
            "PRAGMA synchronous is OFF: a crash of the machine may corrupt the whole database.",
            "Set it to NORMAL or FULL.",
        )
