"""The queue of a lock with `fair=True`: first come, first served, across processes.

Whoever waits has a row here, and tries only when no older one is left. That orders the tries and
nothing else: who gets the lock is decided by the lock's own row. So a ticket needs no expiry, and
nobody's ticket holds anything up for long: who is not there to use its turn is passed by
(`turns.py`), and its ticket removed. The statements are the same on every database.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

TICKETS = "distlock_ticket"


def draw(connection: BaseDatabaseWrapper, name: str, slot: int, owner: str) -> None:
    """Stand in line behind all others. A second call leaves two tickets, and both go at the end."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {TICKETS} (name, slot, owner) VALUES (%s, %s, %s)", [name, slot, owner]
        )


def ahead(
    connection: BaseDatabaseWrapper, name: str, slot: int, owner: str
) -> tuple[list[int], int | None]:
    """Return the tickets before that of `owner`, and its own; if it has none, all tickets."""
    before: list[int] = []
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT id, owner FROM {TICKETS} WHERE name = %s AND slot = %s ORDER BY id",
            [name, slot],
        )
        for ticket, of in cursor.fetchall():
            if of == owner:
                return before, ticket
            before.append(ticket)
    return before, None


def tear(connection: BaseDatabaseWrapper, name: str, slot: int, owner: str) -> None:
    """Stand in line no more."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"DELETE FROM {TICKETS} WHERE name = %s AND slot = %s AND owner = %s",
            [name, slot, owner],
        )


def tear_passed(connection: BaseDatabaseWrapper, passed: Sequence[int]) -> None:
    """Remove the tickets of those who did not use their turn."""
    with connection.cursor() as cursor:
        among = ", ".join(["%s"] * len(passed))
        cursor.execute(f"DELETE FROM {TICKETS} WHERE id IN ({among})", list(passed))
