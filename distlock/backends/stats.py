"""What a lock's row has counted: kept by the statements that grant and release, for nothing.

# Note [What counts]
A grant counts once, however often it is asked for: not where it finds its own owner. A wait is
more than nothing: who tries first tries at once. Whoever takes a dead lease's owner off the row
counts the loss, and so nobody does it twice: the next grant, a forced release, or the holder's own
release if it comes after the end of its lease. Such a release counts no time held. In a transaction
it counts no loss: there the row may be locked, and an expiry that has passed says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .base import moment_of

COUNTED = (
    *("acquisitions", "waits", "losses"),
    *("total_hold", "longest_hold", "total_wait", "longest_wait"),
)
COUNTERS = f"{', '.join(COUNTED)}, CASE WHEN owner = '' THEN 0 ELSE 1 END"


@dataclass(frozen=True)
class LockStats:
    """What a lock's row has counted since it was made, or purged. Durations are seconds.

    Times held are those of leases that were released in time: one that goes on, or was lost, is in
    none of them.
    """

    name: str
    acquisitions: int
    """How often it was granted."""
    waits: int
    """How many of these grants somebody had to wait for."""
    releases: int
    """How many of these leases were released in time."""
    losses: int
    """How many of them had ended before their holder was done, or were taken by force."""
    last_lost_at: datetime | None
    """When that was seen last, on the database's clock: perhaps long after the lease had ended."""
    total_held: float
    longest_held: float
    total_waited: float
    longest_waited: float

    @property
    def mean_held(self) -> float:
        """The mean over all releases; 0 before the first."""
        return self.total_held / self.releases if self.releases else 0.0

    @property
    def mean_waited(self) -> float:
        """The mean over all grants, those included that nobody waited for."""
        return self.total_waited / self.acquisitions if self.acquisitions else 0.0

    @property
    def share_waited(self) -> float:
        """Which share of the grants somebody had to wait for, from 0 to 1."""
        return self.waits / self.acquisitions if self.acquisitions else 0.0


def stats_of(name: str, row: Sequence[Any]) -> LockStats:
    """Return a `LockStats` from the columns of a `STATS` statement."""
    *counters, lost = row
    lost_at = None if lost is None else moment_of(int(lost))
    return stats_from(name, counters, lost_at)


def stats_from(name: str, counters: Sequence[Any], lost_at: datetime | None) -> LockStats:
    """Return a `LockStats` from what is `COUNTED`, and whether somebody owns the row."""
    acquisitions, waits, losses, hold, longest_hold, wait, longest_wait, owned = map(int, counters)
    return LockStats(
        name=name,
        acquisitions=acquisitions,
        waits=waits,
        releases=max(0, acquisitions - losses - owned),
        losses=losses,
        last_lost_at=lost_at,
        total_held=hold / 1_000_000,
        longest_held=longest_hold / 1_000_000,
        total_waited=wait / 1_000_000,
        longest_waited=longest_wait / 1_000_000,
    )
