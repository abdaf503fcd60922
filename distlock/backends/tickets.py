"""The queue of a lock with `fair=True`: first come, first served, across processes.

Whoever waits has a row here, and tries when no older one is left. That orders the tries and nothing
else: who gets the lock is decided by the lock's own row. The process of each waiter gives signs of
life for it, so that a dead one holds nobody up for long: its ticket counts for nothing, and whoever
comes next removes it. The statements are the same on every database but for its clock, which each
of them reads itself; moments and durations are microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import backend_for

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

TICKETS = "distlock_ticket"


@dataclass(frozen=True)
class Ticket:
    """A place in the queue."""

    id: int
    owner: str
    is_alive: bool


def draw(connection: BaseDatabaseWrapper, name: str, slot: int, owner: str, life: int) -> None:
    """Stand in line behind all others."""
    now = _now(connection)
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {TICKETS} (name, slot, owner, alive_until) "
            f"VALUES (%s, %s, %s, {now} + %s)",
            [name, slot, owner, life],
        )


def drawn(connection: BaseDatabaseWrapper, name: str, slot: int) -> list[Ticket]:
    """Return all tickets for a lock, in their order."""
    dead = f"alive_until <= {_now(connection)}"
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT id, owner, CASE WHEN {dead} THEN 0 ELSE 1 END FROM {TICKETS} "
            "WHERE name = %s AND slot = %s ORDER BY id",
            [name, slot],
        )
        return [Ticket(number, owner, bool(alive)) for number, owner, alive in cursor.fetchall()]


def keep(connection: BaseDatabaseWrapper, ids: Sequence[int], life: int) -> None:
    """Give a sign of life for some tickets."""
    now = _now(connection)
    with connection.cursor() as cursor:
        cursor.execute(
            f"UPDATE {TICKETS} SET alive_until = {now} + %s WHERE id IN ({_among(ids)})",
            [life, *ids],
        )


def tear(connection: BaseDatabaseWrapper, name: str, slot: int, owners: Sequence[str]) -> None:
    """Let some stand in line no more."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"DELETE FROM {TICKETS} WHERE name = %s AND slot = %s AND owner IN ({_among(owners)})",
            [name, slot, *owners],
        )


def tear_dead(connection: BaseDatabaseWrapper, ids: Sequence[int]) -> None:
    """Remove those of some tickets that are still without a sign of life."""
    now = _now(connection)
    with connection.cursor() as cursor:
        cursor.execute(
            f"DELETE FROM {TICKETS} WHERE alive_until <= {now} AND id IN ({_among(ids)})", list(ids)
        )


def _now(connection: BaseDatabaseWrapper) -> str:
    return backend_for(connection).clock_us(connection)


def _among(values: Sequence[object]) -> str:
    return ", ".join(["%s"] * len(values))
