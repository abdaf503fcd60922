"""What a database says about itself, held against what locks need. Each file knows one vendor.

All of it reads, and nothing waits; what tries out writes is `refused`, and it matches no row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from django.db import DatabaseError

from ...conf import settings
from ...deadlines import seconds
from ...findings import Code, Finding
from ..generic import transaction

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

LONG = 600
"""Seconds that the session of a client which is gone may last, at most."""

STATEMENTS: Mapping[str, str] = {
    "SELECT": "SELECT {columns} FROM {table} WHERE id = -1",
    "INSERT": "INSERT INTO {table} ({columns}) SELECT {columns} FROM {table} WHERE id = -1",
    "UPDATE": "UPDATE {table} SET {set} WHERE id = -1",
    "DELETE": "DELETE FROM {table} WHERE id = -1",
}
"""Each matches no row."""


def refused(
    connection: BaseDatabaseWrapper, table: str, columns: Sequence[str]
) -> Iterator[tuple[str, DatabaseError]]:
    """Yield the kinds of statements that may not be run on a table, and why."""
    quote = connection.ops.quote_name
    names = [quote(column) for column in columns]
    parts = {
        "table": quote(table),
        "columns": ", ".join(names),
        "set": ", ".join(f"{name} = {name}" for name in names),
    }
    for kind, sql in STATEMENTS.items():
        if error := _error_of(connection, sql.format(**parts)):
            yield kind, error


def _error_of(connection: BaseDatabaseWrapper, sql: str) -> DatabaseError | None:
    try:
        with transaction(connection), connection.cursor() as cursor:
            cursor.execute(sql)
    except DatabaseError as error:
        return error
    return None


def version(connection: BaseDatabaseWrapper, needed: tuple[int, ...]) -> Iterator[Finding]:
    """Yield a finding about a server that is too old."""
    found = connection.get_database_version()
    if found[: len(needed)] < needed:
        product, wanted = connection.display_name, _dotted(needed)
        yield Finding(
            Code.OLD_VERSION,
            f"This is {product} {_dotted(found)}; locks need {wanted} or later.",
            f"Upgrade the server to {product} {wanted} or later.",
        )


def _dotted(number: tuple[int, ...]) -> str:
    """Return a version as people write it."""
    return ".".join(map(str, number))


def dead_sessions(setting: str, value: float, remedy: str) -> Iterator[Finding]:
    """Yield a finding about transactions of dead clients; 0 means for ever."""
    if not 0 < value <= LONG:
        lasts = f"for {value:.15g} s" if value else "for ever"
        yield Finding(
            Code.DEAD_SESSIONS,
            f"{setting} lets a transaction whose client hangs or is gone stay open {lasts}, and "
            "with it the locks that it was about to release.",
            remedy,
        )


def short_sessions(setting: str, value: float) -> Iterator[Finding]:
    """Yield a finding about sessions that end between two renewals; 0 means never."""
    between = seconds(settings().TTL, "TTL") / 3
    if 0 < value <= between:
        yield Finding(
            Code.SHORT_SESSIONS,
            f"{setting} ends idle sessions after {value:.15g} s. A lease with the ttl of the "
            f"settings is renewed every {between:.15g} s, so each renewal needs a new connection.",
            f"Set {setting} to more than that, such as 60 s, for the user of the application.",
        )
