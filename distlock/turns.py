"""Whose turn it is at a lock with `fair=True`.

Those who wait have tickets in the database (`backends/tickets.py`), and the oldest one tries. Its
owner may be dead, or too busy to notice that the lock is free: who stands behind it, and sees no
older ticket go while the lock is free, takes its turn after a while, later the farther behind.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from django.db import DatabaseError
from django.db.backends.base.base import BaseDatabaseWrapper

from .backends import tickets
from .backends.base import Claim
from .background import soon
from .connections import on_private
from .deadlines import clock
from .places import Place

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds that whoever is first may take to notice that the lock is free."""
SPACING = 0.05
"""Seconds more for each who stands before: so that those who pass by keep their order."""
INTERRUPTED = 1.0
"""Seconds between two tries after which the lock must have been held in between."""


class Turn:
    """One waiter's place in the queue of a lock."""

    def __init__(self, where: Place, claim: Claim) -> None:
        self._where = where
        self._of = (claim.name, claim.slot, claim.owner)
        self.ticket: int | None = None
        """Its number in the queue. Lower ones come before."""
        self._has_drawn = False
        self._ahead: list[int] = []
        self._since = self._looked = clock()

    def has_come(self) -> bool:
        """Whether to try now. Whoever is not first stands in line from then on."""
        ahead, self.ticket = self._run(tickets.ahead)
        now = clock()
        if ahead != self._ahead or now - self._looked > INTERRUPTED:
            self._ahead, self._since = ahead, now
        self._looked = now
        if not ahead or now - self._since > PATIENCE + SPACING * len(ahead):
            return True
        self.stand_in_line()
        return False

    def stand_in_line(self) -> None:
        """Draw a ticket, unless there is one."""
        if self.ticket is None:
            self._has_drawn = True
            self._run(tickets.draw)
            _, self.ticket = self._run(tickets.ahead)

    def taken(self) -> None:
        """Note that the lock was granted: the tickets of those who were passed by go, too."""
        passed = self._ahead
        self.leave()
        if passed:
            with suppress(DatabaseError):
                self._where.run(lambda connection: tickets.tear_passed(connection, passed))

    def leave(self) -> None:
        """Give the ticket back. If that fails, those behind pass it by."""
        if self._has_drawn:
            self._has_drawn, self.ticket = False, None
            with suppress(DatabaseError):
                self._run(tickets.tear)

    def abandon(self) -> None:
        """Give the ticket back from where nobody can wait for the database."""
        if self._has_drawn:
            self._has_drawn, self.ticket = False, None
            alias = self._where.connection.alias
            soon(lambda: on_private(alias, lambda connection: tickets.tear(connection, *self._of)))

    def _run(self, statement: Callable[[BaseDatabaseWrapper, str, int, str], T]) -> T:
        return self._where.run(lambda connection: statement(connection, *self._of))
