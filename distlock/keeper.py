"""The keeper: one thread per process that renews every lease, and finishes interrupted releases.

Each lease is renewed every third of its ttl; all leases of a database that are due, or soon will
be, go in one statement on the private connection (`connections.py`). What Note [Trust window] in
`terms.py` calls unknown is tried again within a tenth of the ttl. A statement may take a third of
the shortest trust left; then its connection is given up for a new one.

A release whose transaction broke off is finished here too: compare-and-set, again and again while
the server still has the row pinned, never past a session whose COMMIT may be on the wire.

The keeper sends no signal and calls nothing of the user's.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable

from django.db import Error, connections

from .backends import backend_for
from .backends.base import Unlock
from .background import Background, after_fork
from .connections import LIMIT, close_private, private
from .deadlines import clock
from .terms import State, Term

logger = logging.getLogger("distlock")

BATCH = 500
"""Leases in one statement."""
AGAIN = 0.05
"""Seconds between two looks at a row that a broken transaction still pins."""
IDLE = 60.0


class Keeper:
    """Everything that this process must keep doing for its leases."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._terms: set[Term] = set()
        self._broken: dict[Term, Callable[[Unlock], None]] = {}
        self._planned = 0.0
        self._thread = Background("distlock-keeper", self._step, close_private)

    def keep(self, term: Term) -> None:
        """Renew a term until it is dropped, and notice when it is lost."""
        with self._mutex:
            self._terms.add(term)
            sooner = _next(term) < self._planned
        self._thread.ensure_started()
        if sooner:
            self._thread.wake()

    def replan(self, term: Term) -> None:
        """Look again when a kept term is due, which may be sooner than it was."""
        with self._mutex:
            sooner = term in self._terms and _next(term) < self._planned
        if sooner:
            self._thread.wake()

    def drop(self, term: Term) -> None:
        """Leave a term alone from now on."""
        with self._mutex:
            self._terms.discard(term)

    def finish(self, term: Term, done: Callable[[Unlock], None]) -> None:
        """Free a row whose transaction did not commit, as soon as the server has ended it.

        `done` is called in the keeper's thread, and must hand what is the user's to `soon`.
        """
        with self._mutex:
            self._broken[term] = done
        self._thread.ensure_started()
        self._thread.wake()

    def stop(self) -> None:
        """Stop renewing; called at exit."""
        self._thread.stop()

    # -- the thread ------------------------------------------------------------------------------

    def _step(self) -> float:
        with self._mutex:
            self._terms = {term for term in self._terms if not (term.over or term.abandoned)}
            terms = list(self._terms)
            broken = list(self._broken.items())
        for alias, due in self._due(terms).items():
            for start in range(0, len(due), BATCH):
                self._renew(alias, due[start : start + BATCH])
        for term, done in broken:
            self._finish(term, done)
        return self._delay()

    def _due(self, terms: list[Term]) -> dict[str, list[Term]]:
        """Return, by alias, what to renew: a lease that is due takes along those that soon are."""
        now = clock()
        due: dict[str, list[Term]] = defaultdict(list)
        for term in terms:
            if term.pins or term.lost:
                continue
            if now >= term.next_renewal - term.ttl / 10:
                due[term.alias].append(term)
        return {
            alias: group
            for alias, group in due.items()
            if any(term.next_renewal <= now for term in group)
        }

    def _renew(self, alias: str, terms: list[Term]) -> None:
        requested = clock()
        limit = min(LIMIT, max(0.05, min(term.remaining for term in terms) / 3))
        try:
            with private(alias).use(limit, keeper=True) as connection:
                renewed = backend_for(connection).renew(connection, terms)
        except Error as error:
            logger.warning("lock_renewal_failed alias=%r leases=%d: %s", alias, len(terms), error)
            for term in terms:
                term.unknown()
            return
        for term in terms:
            if term.owner not in renewed:
                if term.state is State.HELD and not term.pins:  # else it is being released
                    term.lose("the lease expired, or its row has another owner")
            elif (expires := renewed[term.owner]) is None:
                term.unknown()
            else:
                term.confirm(requested, expires)

    def _finish(self, term: Term, done: Callable[[Unlock], None]) -> None:
        """Try once to free the row. Once its expiry has passed, there is nothing left to free."""
        found = Unlock.GONE
        if clock() < term.trusted_until + 2.0:
            try:
                with private(term.alias).use(keeper=True) as connection:
                    found = backend_for(connection).free(connection, term)
            except Error as error:
                logger.info("lock_release_delayed name=%r: %s", term.name, error)
                return
        if found is Unlock.PINNED:
            return
        with self._mutex:
            self._broken.pop(term, None)
        done(found)

    def _delay(self) -> float:
        now = clock()
        with self._mutex:
            again = now + AGAIN if self._broken else math.inf
            self._planned = min([now + IDLE, again, *map(_next, self._terms)])
        return max(0.0, self._planned - now)


def _next(term: Term) -> float:
    """Return when the keeper must look at a term again."""
    if term.pins:
        return clock() + term.ttl / 3
    return math.inf if term.over else min(term.next_renewal, term.trusted_until)


keeper = Keeper()


def can_keep(alias: str) -> bool:
    """Whether the keeper's connection would see the same database."""
    connection = connections[alias]
    return not backend_for(connection).in_memory(connection)


def _forget() -> None:
    keeper.__init__()  # type: ignore[misc]


after_fork(_forget)
