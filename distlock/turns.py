"""Whose turn it is at a lock with `fair=True`.

Those who wait have tickets in the database (`backends/tickets.py`), and the oldest one's owner
tries. The lookout gives signs of life for the tickets of its process; one that has none any more
counts for nothing. At its deadline a waiter tries whoever is before it: a free lock is not refused
for the sake of an order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from django.db import Error
from django.db.backends.base.base import BaseDatabaseWrapper

from .backends import tickets
from .backends.base import Claim
from .lookout import LIFE, lookout
from .places import Place

T = TypeVar("T")


class Turn:
    """One waiter's place in the queue of a lock. Its statements run where its grants do."""

    def __init__(self, place: Callable[[], Place], claim: Claim) -> None:
        self._place = place
        self._name, self._slot, self._owner = claim.name, claim.slot, claim.owner
        self.number: int | None = None
        """Of the ticket. Lower ones come before."""
        self._mutex = threading.RLock()  # see Note [Collected]
        self._has_drawn = self._is_over = False

    def has_come(self) -> bool:
        """Whether to try now. Whoever is not first stands in line from then on."""
        return self._run(self._has_come)

    def _has_come(self, connection: BaseDatabaseWrapper) -> bool:
        ahead = self._ahead(connection)
        if ahead:
            dead = [ticket.id for ticket in ahead if not ticket.is_alive]
            if dead:
                tickets.tear_dead(connection, dead)
            if len(dead) < len(ahead):
                self._stand_in_line(connection)
                return False
        return True

    def stand_in_line(self) -> None:
        """Draw a ticket, unless there is one."""
        self._run(self._stand_in_line)

    def _stand_in_line(self, connection: BaseDatabaseWrapper) -> None:
        if self.number is not None or not self._begin_to_draw():
            return
        tickets.draw(connection, self._name, self._slot, self._owner, int(LIFE * 1_000_000))
        self._ahead(connection)
        if self._is_given_up():  # meanwhile, by a task that could not know of the ticket
            self._tear(connection)

    def _begin_to_draw(self) -> bool:
        with self._mutex:
            self._has_drawn = not self._is_over
            return self._has_drawn

    def _is_given_up(self) -> bool:
        return self._is_over

    def _ahead(self, connection: BaseDatabaseWrapper) -> list[tickets.Ticket]:
        """Return the tickets before this one, and note its number; without one: all tickets."""
        drawn = tickets.drawn(connection, self._name, self._slot)
        mine = [index for index, ticket in enumerate(drawn) if ticket.owner == self._owner]
        self.number = drawn[mine[0]].id if mine else None
        return drawn[: mine[0]] if mine else drawn

    def leave(self) -> None:
        """Give the ticket back. If that fails, it counts for nothing soon."""
        if self._end():
            with suppress(Error):
                self._run(self._tear)

    def abandon(self) -> None:
        """Give the ticket back from where nobody can wait for the database."""
        if self._end():
            alias = self._place().connection.alias
            lookout(alias).tear((self._name, self._slot), self._owner)

    def _end(self) -> bool:
        """Whether there is a ticket to give back, and nobody has done so."""
        with self._mutex:
            had, self._has_drawn = self._has_drawn, False
            self._is_over, self.number = True, None
            return had

    def _tear(self, connection: BaseDatabaseWrapper) -> None:
        tickets.tear(connection, self._name, self._slot, [self._owner])

    def _run(self, statement: Callable[[BaseDatabaseWrapper], T]) -> T:
        return self._place().run(statement)
