"""What others do to a lock, and what a test may ask of it.

Another holder is a row like any other, granted by the same statement to an owner that is no lease
of this process. Where that statement runs is decided as ever (`places.py`): in the transaction of
a `TestCase`, else committed at once.
"""

from __future__ import annotations

import secrets
from typing import Any

from asgiref.sync import sync_to_async
from django.utils.asyncio import async_unsafe

from .. import places
from ..backends.base import Claim, Holder, Pinned
from ..deadlines import LONGEST, Seconds, seconds
from ..leases import Lease
from ..locks import Lock, lock
from ..places import Bare, Place, place
from . import seen
from .blocks import Block

HOST, PID = "another-host", 1
"""Where another holder runs, as its row says."""
NAMES = 5
"""How many locks a message names."""


class _Another(Claim):
    """What somebody else asks for, who is no thread of this process."""

    def parameters(self, waited: float) -> dict[str, Any]:
        return {**super().parameters(waited), "host": HOST, "pid": PID}


def held_by_another(
    name: str, *, ttl: Seconds | None = None, note: str = "", using: str | None = None
) -> HeldByAnother:
    """Return a block in which somebody else holds the lock; `as` names the `Holder`.

    ttl: seconds after which the lease of the other ends, as that of a holder that has died. By
        default it is held for as long as the block lasts: the other lives, and renews it.

    Raises `AssertionError` if the lock is held already.
    """
    span = LONGEST if ttl is None else seconds(ttl, "ttl", positive=True)
    return HeldByAnother(lock(name, ttl=span, note=note, using=using))


class HeldByAnother(Block[Holder]):
    """See `held_by_another`."""

    def __init__(self, described: Lock) -> None:
        self._lock = described
        self._row: Bare | None = None

    def _enter(self) -> Holder:
        self._row = _take(self._lock)
        holder = self._lock.holder()
        if self._row is None or holder is None:
            raise AssertionError(
                f"The lock {self._lock.literal_name!r} is held already, by {holder or 'somebody'}. "
                "lose(lease) takes one away from its holder."
            )
        return holder

    def _leave(self) -> None:
        row, where = self._row, place(self._lock.alias)
        if row is not None:
            alone = not where.own
            where.run(lambda connection: where.backend.release(connection, row, alone=alone))


def lose(lease: Lease, *, known: bool = True) -> None:
    """Let a lease be lost as in reality: a later owner holds the lock, with a higher token.

    known: whether this process has noticed, as the keeper does at the next renewal: then
        `lease.lost` is true and `check()` raises. Otherwise they cannot tell yet; `guard()`,
        `release()` and the end of the block can.

    Raises `AssertionError` if it is lost or released already, and `RuntimeError` where that could
    not happen in reality: a transaction has the lock's row locked, with `guard()` or a release,
    and nobody can be granted it before that ends.
    """
    term = lease._term
    where = _real_place(term.alias)
    if term.over:
        raise AssertionError(f"There is nothing to lose: {lease!r}.")
    if where.own and where.transaction is not None:
        raise _impossible(term.name)
    _force(where, term.name, term.slot, term.token)
    _take(lock(term.name, ttl=LONGEST, using=term.alias))
    if known:
        term.lose("the lease expired, or its row has another owner")


def expire(name: str, *, using: str | None = None) -> None:
    """Let the lease of whoever holds the lock end now, as if nobody had renewed it.

    If that is a lease of this process, it is lost, and knows it. A lock that is only kept by
    `min_hold` is free.

    Raises `AssertionError` if nobody holds the lock, and `RuntimeError` if a transaction has its
    row locked.
    """
    described = lock(name, using=using)
    where = _real_place(described.alias)
    holder = assert_locked(name, using=using)
    row = Bare(name, described.slot, holder.owner, holder.token, expires_us=0, min_hold_us=0)
    ended = where.run(lambda connection: where.backend.renew(connection, [row], 1))
    if ended.get(row.owner, 0) is None:
        raise _impossible(name)
    for term in seen.terms():
        if (term.alias, term.owner) == (described.alias, row.owner):
            term.lose("the lease was not renewed in time")


def assert_locked(name: str, *, using: str | None = None) -> Holder:
    """Return who holds the lock. Raises `AssertionError` if nobody does."""
    described = lock(name, using=using)
    holder = described.holder()
    if holder is None:
        raise AssertionError(f"Nobody holds the lock {name!r}. {_held_now(described.alias)}")
    return holder


def assert_not_locked(name: str, *, using: str | None = None) -> None:
    """Raise `AssertionError`, with who holds it and since when, if the lock is held."""
    holder = lock(name, using=using).holder()
    if holder is not None:
        raise AssertionError(
            f"The lock {name!r} is held by {holder}: token {holder.token}, since "
            f"{holder.acquired_at}, until {holder.expires_at} unless it is renewed."
        )


alose = sync_to_async(lose)
aexpire = sync_to_async(expire)
aassert_locked = sync_to_async(assert_locked)
aassert_not_locked = sync_to_async(assert_not_locked)


# -- on the rows ---------------------------------------------------------------------------------


@async_unsafe("A coroutine must use `async with`, or await the function that begins with an a.")
def _real_place(alias: str) -> Place:
    if places.instead is not None:
        raise RuntimeError("Locks are disabled here: nobody else can hold, or take, one.")
    return place(alias)


def _take(described: Lock) -> Bare | None:
    """Grant a lock to somebody else, if it is free."""
    name, where = described.literal_name, _real_place(described.alias)
    assert described.ttl is not None
    owner, ttl = secrets.token_hex(16), int(described.ttl * 1_000_000)
    claim = _Another(name, described.slot, owner, ttl, note=described.note, thread="another holder")
    grant = where.grant(claim, 0.0)
    if grant is None:
        return None
    return Bare(name, described.slot, owner, grant.token, grant.expires_us, min_hold_us=0)


def _force(where: Place, name: str, slot: int, token: int) -> None:
    """Take the owner off a row, unless it has ended already."""
    force = where.backend.force_release
    try:
        where.run(lambda connection: force(connection, name, slot, token))
    except Pinned as error:
        raise _impossible(name) from error


def _impossible(name: str) -> RuntimeError:
    return RuntimeError(
        f"Nobody can take the lock {name!r} now: a running transaction has its row locked, with "
        "guard() or a release. Lose it before that, or after the end of the transaction."
    )


def _held_now(alias: str) -> str:
    if places.instead is not None:
        return "Locks are disabled here."
    from ..models import NAMED, DistributedLock
    from ..states import LockState, state_at

    where = place(alias)
    now = where.run(where.backend.clock)
    rows = DistributedLock.objects.using(alias).filter(NAMED).annotate(state=state_at(now))
    names = rows.filter(state=LockState.HELD).order_by("name").values_list("name", flat=True)
    listed = ", ".join(repr(name) for name in names[:NAMES])
    return f"These are held: {listed}." if listed else "No lock is held."
