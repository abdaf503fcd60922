"""Tests of code in which locks do not matter: everybody is granted everything.

What is asked instead of the database is one more backend, with no table: the leases, the errors of
wrong use and the signals are the engine's own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import places, signals
from ..backends.base import Backend, Claim, Grant, Held, Holder, Unlock, holder_of
from ..backends.stats import LockStats
from ..events import log
from ..exceptions import LockError
from ..terms import State
from . import seen
from .blocks import Block, refuse_in_production

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper


def locks_disabled() -> LocksDisabled:
    """Return a block in which every acquire succeeds at once, without any SQL, in all threads.

    Nobody is kept out of anything. Tokens still grow, leases are never lost, and what is wrong
    without a database, too, still raises: `AlreadyHeld`, bad arguments. `atomic=True` still opens a
    transaction for the body, and receipts of jobs are still rows.

    Raises `RuntimeError` outside of tests.
    """
    refuse_in_production("locks_disabled()")
    return LocksDisabled()


class LocksDisabled(Block[None]):
    """See `locks_disabled`."""

    def _enter(self) -> None:
        text = "locks_disabled: until the end of this block no lock keeps anybody out"
        log(logging.WARNING, text)
        self._before, self._all_granted = places.instead, AllGranted()
        places.instead = self._all_granted
        signals.lock_acquired.connect(self._trust)

    def _leave(self) -> None:
        places.instead = self._before
        signals.lock_acquired.disconnect(self._trust)
        for term in seen.terms():
            if term.owner in self._all_granted.held:  # nobody else can release it any more
                term.move(State.RELEASED)

    def _trust(self, sender: object, *, lease: Any, **kwargs: object) -> None:
        """See to it that a lease does not end for want of renewals."""
        if lease.owner in self._all_granted.held:
            lease._term.pin()


class AllGranted(Backend):
    """Grants every claim, and remembers who holds what."""

    def __init__(self) -> None:
        self.held: dict[str, Holder] = {}
        """By owner."""
        self._mutex = threading.Lock()
        self._token = 0

    def grant(self, connection: BaseDatabaseWrapper, claim: Claim, waited: float) -> Grant | None:
        said, now = claim.parameters(waited), _now()
        who = (said["host"], said["pid"], said["thread"], said["note"])
        with self._mutex:
            self._token = max(now, self._token + 1)
            row = (claim.name, claim.owner, self._token, now, now + said["first"], *who)
            self.held[claim.owner] = holder_of(row)
            return Grant(*row[2:5])

    def renew(
        self,
        connection: BaseDatabaseWrapper,
        held: Sequence[Held],
        ttl: int | None = None,
        *,
        pinned: bool = False,
    ) -> Mapping[str, int | None]:
        return {lease.owner: max(lease.expires_us, _now() + (ttl or 0)) for lease in held}

    def release(self, connection: BaseDatabaseWrapper, held: Held, *, alone: bool) -> bool:
        if self.held.pop(held.owner, None) is None:
            raise LockError(
                f"The lock {held.name!r} was taken before locks were disabled: release it outside "
                "of that block.",
                name=held.name,
            )
        return True

    def free(self, connection: BaseDatabaseWrapper, held: Held) -> Unlock:
        return Unlock.GONE if self.held.pop(held.owner, None) is None else Unlock.FREED

    def guard(self, connection: BaseDatabaseWrapper, held: Held) -> bool:
        return True

    def holder(self, connection: BaseDatabaseWrapper, name: str, slot: int) -> Holder | None:
        return next((one for one in list(self.held.values())[::-1] if one.name == name), None)

    def stats(self, connection: BaseDatabaseWrapper, name: str, slot: int) -> LockStats | None:
        return None


def _now() -> int:
    return time.time_ns() // 1000
