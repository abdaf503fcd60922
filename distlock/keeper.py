"""The keeper: a thread per database that renews every lease, and finishes interrupted releases.

Each lease is renewed every third of its ttl; all leases of a database that are due, or soon will
be, go in one statement on the private connection (`connections.py`). What Note [Trust window] in
`terms.py` calls unknown is tried again within a tenth of the ttl. A statement may take a third of
the shortest trust left; then its connection is given up for a new one. A database that does not
answer keeps no other waiting: each has a thread of its own.

A release whose transaction broke off is finished here too: compare-and-set, again and again while
the server still has the row pinned, never past a session whose COMMIT may be on the wire, and
never while a renewal is due.

The keeper sends no signal and calls nothing of the user's: what there is to tell is told by `soon`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from functools import partial

from django.db import Error
from django.db.backends.base.base import BaseDatabaseWrapper

from . import signals
from .backends import backend_for
from .backends.base import Unlock
from .background import Background, after_fork, soon
from .connections import LIMIT, private
from .deadlines import clock
from .events import log
from .terms import State, Term

Done = Callable[[Unlock | None], None]
"""Called with what was found, or `None` if the database has not answered until the expiry."""

SMALLEST = 100
"""Leases in one renewal, at least: fewer after one that had no answer."""
AGAIN = 0.05
"""Seconds between two looks at a row that a broken transaction still pins."""
IDLE = 60.0
"""Seconds after which a private connection that nobody uses is closed."""


class Keeper:
    """What this process must keep doing for its leases, database by database."""

    def __init__(self) -> None:
        self._mutex = threading.RLock()  # see Note [Collected]
        self._rounds: dict[str, Rounds] = {}

    def keep(self, term: Term, *, may_free: bool = True) -> None:
        """Renew a term until it is dropped, and notice when it is lost.

        `may_free`: no transaction has to do with it, so that it may be left to the keeper.
        """
        term.kept = may_free
        term.renewed_here = True
        self.rounds(term.alias).keep(term)

    def replan(self, term: Term) -> None:
        """Look again when a kept term is due, which may be sooner than it was."""
        if rounds := self._rounds.get(term.alias):
            rounds.replan(term)

    def keeps(self, term: Term) -> bool:
        """Whether a term is renewed here."""
        rounds = self._rounds.get(term.alias)
        return rounds is not None and term in rounds._terms

    def drop(self, term: Term) -> None:
        """Leave a term alone from now on."""
        if rounds := self._rounds.get(term.alias):
            rounds.drop(term)

    def finish(self, term: Term, done: Done) -> None:
        """Free a row whose transaction did not commit, as soon as the server has ended it.

        `done` is called in the keeper's thread, and must hand what is the user's to `soon`.
        """
        self.rounds(term.alias).finish(term, done)

    def rounds(self, alias: str) -> Rounds:
        """Return the rounds that the keeper makes in one database."""
        found = self._rounds.get(alias)
        if found is None:
            made = Rounds(alias)
            with self._mutex:
                found = self._rounds.setdefault(alias, made)
        return found


class Rounds:
    """The keeper's thread for one database."""

    def __init__(self, alias: str) -> None:
        self._mutex = threading.RLock()  # see Note [Collected]
        self._alias = alias
        self._private = private(alias)
        self._terms: set[Term] = set()
        self._broken: dict[Term, Done] = {}
        self._planned = 0.0
        """When the thread looks again, by the clock that it sleeps by. Like the thread, that stands
        still while the machine does: leases go on, and `clock` with them."""
        self._batch = self._private.backend.batch
        self._thread = Background(
            f"distlock-keeper-{alias}", self._step, self._private.close_if_unused
        )

    def keep(self, term: Term) -> None:
        """See `Keeper.keep`."""
        with self._mutex:
            self._terms.add(term)
            left = _next(term) - clock()
            if not self._looks_within(left):
                self._thread.wake()  # first: an interrupt here must leave no plan that nobody has
                self._planned = time.monotonic() + left
        self._private.patience = min(self._private.patience, _patience(term))
        self._thread.ensure_started()

    def replan(self, term: Term) -> None:
        """See `Keeper.replan`."""
        with self._mutex:
            sooner = term in self._terms and not self._looks_within(_next(term) - clock())
        if sooner:
            self._thread.wake()

    def _looks_within(self, seconds: float) -> bool:
        """Whether the thread will look in that time. A plan that has passed is none."""
        return 0 <= self._planned - time.monotonic() <= seconds

    def drop(self, term: Term) -> None:
        """See `Keeper.drop`."""
        with self._mutex:
            self._terms.discard(term)
            if not self._terms:
                self._private.patience = LIMIT

    def finish(self, term: Term, done: Done) -> None:
        """See `Keeper.finish`."""
        with self._mutex:
            self._broken[term] = done
        self._thread.ensure_started()
        self._thread.wake()

    # -- the thread ------------------------------------------------------------------------------

    def _step(self) -> float:
        try:
            self._look()
            return self._delay()
        except BaseException:
            self._planned = 0.0  # the thread sleeps, and does not look when it was to
            raise

    def _look(self) -> None:
        terms = self._kept()
        self._private.patience = min([LIMIT, *map(_patience, terms)])
        due = self._due(terms)
        while due and self._renew(due[: self._batch], _limit(terms)):
            due = due[self._batch :]
            self._batch = min(self._private.backend.batch, self._batch * 2)
        if due:  # the rest is due at once, but first see who is lost meanwhile
            self._batch = max(SMALLEST, self._batch // 2)
        self._finish_until(min(map(_next, terms), default=math.inf), _limit(terms))
        self._private.close_if_unused(IDLE)

    def _kept(self) -> list[Term]:
        with self._mutex:
            dropped = [term for term in self._terms if term.abandoned]
            self._terms = {term for term in self._terms if not (term.over or term.abandoned)}
            kept = list(self._terms)
        if dropped:
            soon(partial(_drop, dropped))
        return kept

    def _due(self, terms: list[Term]) -> list[Term]:
        """Return what to renew: a lease that is due takes along those that soon are."""
        now = clock()
        wanted = [term for term in terms if not (term.pins or term.lost)]
        if all(term.next_renewal > now for term in wanted):
            return []
        soon = [term for term in wanted if now >= term.next_renewal - term.ttl / 10]
        return sorted(soon, key=lambda term: term.trusted_until)

    def _renew(self, terms: list[Term], limit: float) -> bool:
        """Renew them in one go; return `False` if there was no answer."""
        requested = clock()
        try:
            with self._private.use(limit, keeper=True) as connection:
                renewed = backend_for(connection).renew(connection, terms)
        except Error as error:
            text = "lock_renewal_failed alias=%r leases=%d: %s"
            log(logging.WARNING, text, alias=self._alias, leases=len(terms), error=error)
            self._tell(failed=len(terms))
            for term in terms:
                term.unknown()
            return False
        confirmed = locked = 0
        for term in terms:
            if term.owner not in renewed:
                if term.state is State.HELD and not term.pins:  # else it is being released
                    term.lose("the lease expired, or its row has another owner")
            elif (expires := renewed[term.owner]) is None:
                term.unknown()
                locked += 1
            else:
                term.confirm(requested, expires)
                confirmed += 1
        self._tell(renewed=confirmed, locked=locked)
        return True

    def _tell(self, renewed: int = 0, failed: int = 0, locked: int = 0) -> None:
        if signals.leases_renewed.receivers:
            told = {"renewed": renewed, "failed": failed, "locked": locked}
            send = signals.leases_renewed.send_robust
            soon(partial(send, sender=Rounds, alias=self._alias, **told))

    def _finish_until(self, due: float, limit: float) -> None:
        """Try once to free each row, until a renewal is due or one try has had no answer.

        Who had none comes last the next time.
        """
        with self._mutex:
            broken = list(self._broken.items())
        for term, done in broken:
            if clock() >= due:
                return
            found: Unlock | None = None  # once its expiry has passed there is nothing left to free
            if clock() < term.trusted_until + 2.0:
                try:
                    with self._private.use(limit, keeper=True) as connection:
                        found = backend_for(connection).free(connection, term)
                except Error as error:
                    text = "lock_release_delayed name=%r: %s"
                    log(logging.INFO, text, lock=term.name, error=error)
                    with self._mutex:
                        self._broken[term] = self._broken.pop(term)
                    return
            if found is not Unlock.PINNED:
                with self._mutex:
                    self._broken.pop(term, None)
                done(found)

    def _delay(self) -> float:
        now = clock()
        with self._mutex:
            again = now + AGAIN if self._broken else math.inf
            delay = max(0.0, min([now + IDLE, again, *map(_next, self._terms)]) - now)
            # A look that was planned for a lease that is gone stays, for the next one's sake: where
            # many are short, each would wake this thread.
            if (planned := self._planned - time.monotonic()) > 0:
                delay = min(delay, planned)
            self._planned = time.monotonic() + delay
        return delay


def _drop(terms: list[Term]) -> None:
    for term in terms:
        term.drop()


def _next(term: Term) -> float:
    """Return when the keeper must look at a term again."""
    if term.pins:
        return clock() + term.ttl / 3
    return math.inf if term.over else min(term.next_renewal, term.trusted_until)


def _limit(terms: list[Term]) -> float:
    """Return how long a statement may take: a third of the shortest trust that is to be renewed.

    Whichever lease it is for: while it hangs, none is renewed.
    """
    trust = [term.remaining for term in terms if term.next_renewal < math.inf and not term.over]
    return min([LIMIT, *(max(0.05, seconds / 3) for seconds in trust)])


def _patience(term: Term) -> float:
    """Return how long a user's statement may keep the connection from renewing this lease."""
    return max(0.25, term.ttl / 6) if term.renews else LIMIT


keeper = Keeper()


def can_keep(connection: BaseDatabaseWrapper) -> bool:
    """Whether the keeper's connection would see the same database."""
    return not backend_for(connection).in_memory(connection)


def _forget() -> None:
    keeper.__init__()  # type: ignore[misc]


after_fork(_forget)
