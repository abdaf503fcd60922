"""A term: one owner's time on one slot. What the keeper renews, a release ends, and handles share.

# Note [Trust window]
A process may trust its lease until

    clock before the request was sent + ttl - margin

and never from after the reply: the database counted from somewhere in between. The margin covers
two clocks that run at slightly different speeds. Only a renewal that was confirmed moves the
moment on; an error or a locked row is *unknown*, not lost, and leaves it where it was. A row that
this process itself has pinned in an open transaction can be granted to nobody, so it counts as
held however long that takes.
"""

from __future__ import annotations

import enum
import math
import os
import threading
from collections.abc import Callable

from .deadlines import clock

Key = tuple[str, str, int]
"""Alias, name and slot."""


class State(enum.Enum):
    """Where a term is in its life."""

    HELD = "held"
    RELEASING = "releasing"  # released in a transaction that is still open
    RELEASED = "released"
    LOST = "lost"


class Term:
    """One acquisition, from its grant to its release or loss. Shared by threads."""

    def __init__(
        self,
        alias: str,
        name: str,
        slot: int,
        owner: str,
        *,
        token: int,
        ttl: float,
        acquired_us: int,
        expires_us: int,
        requested: float,
        renew: bool,
        min_hold: float,
        max_hold: float | None,
        on_lost: Callable[[Term, str], None],
        on_dropped: Callable[[Term], None] | None = None,
    ) -> None:
        self.alias = alias
        self.name = name
        self.slot = slot
        self.owner = owner
        self.token = token
        self.ttl = ttl
        self.first = max(ttl, min_hold)
        self.acquired_us = acquired_us
        self.expires_us = expires_us
        self.min_hold_us = int(min_hold * 1_000_000)
        self.started = clock()
        self.renew_until = 0.0 if not renew else requested + (max_hold or math.inf)
        self._safe_at: float | None = None  # when it was first renewed, pinned or released
        self.renewed_here = False  # whether the keeper has it, and renews it when it is due
        self.pins = 0
        self.handles: set[int] = set()
        self.state = State.HELD
        self.reason = ""
        self.next_renewal = math.inf
        self.trusted_until = 0.0
        self._on_lost = on_lost
        self._on_dropped = on_dropped
        self._pid = os.getpid()
        self.abandoned = False
        self.kept = False  # by the keeper, who may also free it
        # Reentrant: the garbage collector may drop a lease of this very term at any point.
        self._mutex = threading.RLock()
        self.confirm(requested, expires_us, first=self.first)

    def __repr__(self) -> str:
        return f"<Term {self.name!r} token {self.token} {self.state.value}>"

    @property
    def key(self) -> Key:
        """What it holds."""
        return (self.alias, self.name, self.slot)

    @property
    def over(self) -> bool:
        """Whether nothing is left to renew or release."""
        return self.state in (State.RELEASED, State.LOST)

    @property
    def renews(self) -> bool:
        """Whether the lease is to be kept alive at this moment."""
        return clock() < self.renew_until

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child, which owns nothing of its parent's."""
        return os.getpid() != self._pid

    @property
    def remaining(self) -> float:
        """Seconds that this process may still trust; see Note [Trust window]."""
        if self.over or self.inherited:
            return 0.0
        if self.pins:
            return self.ttl
        return max(0.0, self.trusted_until - clock())

    @property
    def lost(self) -> bool:
        """Whether the loss is known, or trust has run out."""
        if self.inherited:
            return True
        if not self.over and self.remaining == 0.0:
            self.lose("the lease was not renewed in time")
        return self.state is State.LOST

    @property
    def held_for(self) -> float:
        """Seconds since the grant."""
        return clock() - self.started

    @property
    def spent(self) -> float:
        """Which share of its first ttl it was held with nothing else to keep it.

        That ends when it is first renewed, pinned or released. What the keeper is to renew, be it
        late because of a `min_hold`, spends nothing.
        """
        if self.renewed_here and self.next_renewal < math.inf:
            return 0.0
        until = clock() if self._safe_at is None else self._safe_at
        return (until - self.started) / self.first

    def _is_safe(self) -> None:
        if self._safe_at is None:
            self._safe_at = clock()

    def confirm(
        self,
        requested: float,
        expires_us: int,
        *,
        ttl: float | None = None,
        first: float | None = None,
    ) -> None:
        """Extend trust after a grant or renewal whose request began at `requested`.

        `ttl`: the lease has another length from now on. `first`: this time it is that long; it is
        renewed a third of its ttl before the usual end, so that `min_hold` is never cut short.
        """
        with self._mutex:
            if first is None:
                self._is_safe()
            self.ttl = ttl or self.ttl
            self.expires_us = expires_us
            span = first or self.ttl
            self.trusted_until = requested + span - margin(span)
            self.next_renewal = requested + span - self.ttl * 2 / 3
            if self.next_renewal > self.renew_until:
                self.next_renewal = math.inf

    def unknown(self) -> None:
        """Note a renewal that met a locked row, or no answer: try again soon."""
        self.next_renewal = clock() + self.ttl / 10

    def pin(self) -> None:
        """Note that this process has the row locked in a transaction of its own."""
        with self._mutex:
            self._is_safe()
            self.pins += 1

    def unpin(self) -> None:
        """Note that such a transaction has ended: the row is as it was left, or as it was."""
        with self._mutex:
            self.pins -= 1
        if self.next_renewal != math.inf:
            self.next_renewal = clock()

    def lose(self, reason: str) -> None:
        """End the term as lost and tell, once."""
        with self._mutex:
            if self.over:
                return
            self.state = State.LOST
            self.reason = reason
        self._on_lost(self, reason)

    def share(self, handle: object) -> None:
        """Note one more handle."""
        with self._mutex:
            self.handles.add(id(handle))

    def unshare(self, handle: object) -> int:
        """Forget a handle, if it is still noted; return how many are left."""
        with self._mutex:
            self.handles.discard(id(handle))
            return len(self.handles)

    def abandon(self) -> None:
        """Note that nobody has a handle any more. Takes no lock of the keeper's: see `Lease`."""
        self.renew_until = 0.0
        self.next_renewal = math.inf
        self.abandoned = True

    def drop(self) -> None:
        """End a term that was abandoned and tell, once, though its row is held until it expires."""
        if self.move(State.RELEASED) and self._on_dropped:
            self._on_dropped(self)

    def move(self, state: State) -> bool:
        """Go to another state of a term that is not over yet; `False` if it is."""
        with self._mutex:
            if self.over:
                return False
            if state is not State.HELD:
                self._is_safe()
            self.state = state
            return True


def margin(ttl: float) -> float:
    """Return how much sooner than the database to stop trusting; see Note [Trust window]."""
    return min(1.0, ttl / 20)
