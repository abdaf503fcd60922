"""The queue of a lock with `fair=True`: first come, first served, across processes.

Whoever waits has a row here, and tries when no older one is left. That orders the tries and nothing
else: who gets the lock is decided by the lock's own row. The process of each waiter gives signs of
life for it, so that a dead one holds nobody up for long: its ticket counts for nothing, and whoever
comes next removes it. The statements are the same on every database; moments are microseconds on
the database's clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

TICKETS = "distlock_ticket"


@dataclass(frozen=True)
class Ticket:
    """A place in the queue."""

    id: int
    owner: str
    alive_until: int


def draw(
    connection: BaseDatabaseWrapper, name: str, slot: int, owner: str, alive_until: int
) -> None:
    """Stand in line behind all others."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {TICKETS} (name, slot, owner, alive_until) VALUES (%s, %s, %s, %s)",
            [name, slot, owner, alive_until],
        )


def drawn(connection: BaseDatabaseWrapper, name: str, slot: int) -> list[Ticket]:
    """Return all tickets for a lock, in their order."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT id, owner, alive_until FROM {TICKETS} WHERE name = %s AND slot = %s "
            "ORDER BY id",
            [name, slot],
        )
        return [Ticket(*row) for row in cursor.fetchall()]


def keep(connection: BaseDatabaseWrapper, ids: Sequence[int], alive_until: int) -> None:
    """Give a sign of life for some tickets."""
    among = ", ".join(["%s"] * len(ids))
    with connection.cursor() as cursor:
        cursor.execute(
            f"UPDATE {TICKETS} SET alive_until = %s WHERE id IN ({among})", [alive_until, *ids]
        )


def tear(connection: BaseDatabaseWrapper, name: str, slot: int, owner: str) -> None:
    """Stand in line no more."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"DELETE FROM {TICKETS} WHERE name = %s AND slot = %s AND owner = %s",
            [name, slot, owner],
        )


def tear_dead(connection: BaseDatabaseWrapper, ids: Sequence[int], now: int) -> None:
    """Remove those of some tickets that are still without a sign of life."""
    among = ", ".join(["%s"] * len(ids))
    with connection.cursor() as cursor:
        cursor.execute(
            f"DELETE FROM {TICKETS} WHERE alive_until <= %s AND id IN ({among})", [now, *ids]
        )
