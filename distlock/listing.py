"""Locks as a list that people look at, short enough to be read and cheap to get.

# Note [A million rows]
The rows are read in the order of the unique key (name, slot), and never counted: with a limit that
takes as long for a million as for a hundred. To find those that are held there is no index, which
each grant would have to pay for. So the key is walked in strides, in each of which the database
picks them, until there are enough, the table is at its end, or time is up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from django.db import connections
from django.db.models import Q

from .backends import backend_for
from .backends.stats import COUNTED, LockStats, stats_from
from .deadlines import Deadline
from .models import NAMED, DistributedLock
from .states import LockState, microseconds, state_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.db.models import QuerySet

STRIDE = 10_000
LAST = 0x10FFFF
SURROGATES = range(0xD800, 0xE000)
HOLDER = ("thread", "pid", "host", "note")
TAKEN = (LockState.HELD, LockState.KEPT)


@dataclass
class Listing:
    """Rows, each with its `state`, at the moment `now` of the database's clock."""

    now: int
    rows: list[Any] = field(default_factory=list)
    cut_off: str = ""
    """Why there may be more; empty if these are all."""
    knows_waiters: bool = False
    """Whether a row of this database says that somebody waits."""


def listing(alias: str, *, held: bool, prefix: str, limit: int, patience: float) -> Listing:
    """Return the first locks by name; see Note [A million rows]. `patience` is in seconds."""
    backend = backend_for(connections[alias])
    now = backend.clock(connections[alias])
    rows = DistributedLock.objects.using(alias).filter(NAMED, with_prefix(prefix))
    rows = rows.order_by("name", "slot").annotate(state=state_at(now))
    found = Listing(now, knows_waiters=backend.notifies)
    for some, last in _strides(rows, patience) if held else [(rows, "")]:
        if held:
            some = some.filter(state__in=TAKEN)
        found.rows += some[: limit + 1 - len(found.rows)]
        if len(found.rows) > limit:
            del found.rows[limit:]
            found.cut_off = f"There are more than {limit}."
            break
        found.cut_off = last
    return found


def with_prefix(prefix: str, field: str = "name") -> Q:
    """Return the condition that a name begins so, as a range of the key.

    LIKE would ignore the case on SQLite, and the key on MySQL.
    """
    within = Q((f"{field}__gte", prefix)) if prefix else Q()
    head = prefix.rstrip(chr(LAST))
    if not head:
        return within
    after = ord(head[-1]) + 1
    if after in SURROGATES:
        after = SURROGATES.stop
    return within & Q((f"{field}__lt", head[:-1] + chr(after)))


def _strides(rows: QuerySet[Any], patience: float) -> Iterator[tuple[QuerySet[Any], str]]:
    """Yield the rows in parts by the key, each with why it may be the last that is looked at."""
    deadline, left = Deadline(patience), rows
    while True:
        edge = left.values_list("name", "slot")[STRIDE : STRIDE + 1].first()
        if edge is None:
            yield left, ""
            return
        name, slot = edge
        over = deadline.left <= 0
        yield (
            left.filter(name__lte=name).exclude(name=name, slot__gte=slot),  # an OR is no range
            f"Time was up after the names before {name!r}." if over else "",
        )
        if over:
            return
        left = rows.filter(name__gte=name).exclude(name=name, slot__lt=slot)


def stats_in(row: Any) -> LockStats:
    """Return what a row has counted."""
    counters = [getattr(row, column) for column in COUNTED]
    return stats_from(row.name, [*counters, row.owner != ""], row.lost_at)


def as_json(row: Any, among: Listing) -> dict[str, Any]:
    """Return what a row says, for programs. Durations are seconds."""
    held, taken = row.state == LockState.HELD, row.state in TAKEN
    left = max(0, microseconds(row.expires_at) - among.now) if taken else 0
    wanted = taken and microseconds(row.wanted_until) > among.now
    since = among.now - microseconds(row.acquired_at) if held and row.acquired_at else None
    return {
        "name": row.name,
        "slot": row.slot,
        "state": str(row.state),
        "token": row.fencing_token,
        "holder": {key: getattr(row, key) for key in HOLDER} if held else None,
        "held_for": None if since is None else since / 1_000_000,
        "time_left": left / 1_000_000,
        "wanted": wanted if among.knows_waiters else None,
        "stats": _stats_as_json(stats_in(row)),
    }


def _stats_as_json(stats: LockStats) -> dict[str, Any]:
    lost_at = stats.last_lost_at
    return {
        "acquisitions": stats.acquisitions,
        "waits": stats.waits,
        "share_waited": stats.share_waited,
        "total_waited": stats.total_waited,
        "mean_waited": stats.mean_waited,
        "longest_waited": stats.longest_waited,
        "releases": stats.releases,
        "total_held": stats.total_held,
        "mean_held": stats.mean_held,
        "longest_held": stats.longest_held,
        "losses": stats.losses,
        "last_lost_at": None if lost_at is None else microseconds(lost_at) / 1_000_000,
    }
