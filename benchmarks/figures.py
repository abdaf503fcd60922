"""What is computed from times: percentiles, fairness, hand-overs, violations. No I/O."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Turn(NamedTuple):
    """One time that a worker held the lock; moments in seconds on a clock that all share.

    ``released`` is when the release *began*, so ``granted`` to ``released`` lies within what was
    really held: two turns that overlap are a violation of mutual exclusion.
    """

    worker: str
    asked: float
    granted: float
    released: float


@dataclass(frozen=True)
class HandOvers:
    """What a contended run came to. Seconds."""

    turns: int
    gaps: list[float]
    violations: int
    jain: float
    fewest: int
    """The turns of the worker that had the fewest."""
    longest_wait: float
    mean_wait: float


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values do not exceed (nearest rank). Raises on no values."""
    if not values:
        raise ValueError("there are no values")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def median(values: Iterable[float | None]) -> float | None:
    """The median of what was measured; None if nothing was."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def medians(rounds: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Field by field the median over the rounds."""
    fields = dict.fromkeys(field for each in rounds for field in each)
    return {field: median(each.get(field) for each in rounds) for field in fields}


def ratio(value: float | None, reference: float | None) -> float | None:
    """How many times the reference; None where one of them was not measured or is nothing."""
    return None if value is None or not reference else value / reference


def jain(counts: Sequence[float]) -> float:
    """Jain's index of fairness: 1 if all got the same, 1/n if one got everything."""
    squares = sum(count * count for count in counts)
    return sum(counts) ** 2 / (len(counts) * squares) if squares else 0.0


def violations(turns: Sequence[Turn]) -> int:
    """How many turns began before the one that was granted earlier had ended."""
    found, end = 0, float("-inf")
    for turn in sorted(turns, key=lambda turn: turn.granted):
        found += turn.granted < end
        end = max(end, turn.released)
    return found


def handed_over(turns: Iterable[Turn]) -> list[tuple[Turn, Turn]]:
    """Each turn that another worker was waiting for when the one before it ended, after that."""
    ordered = sorted(turns, key=lambda turn: turn.granted)
    return [
        (before, turn)
        for before, turn in itertools.pairwise(ordered)
        if turn.worker != before.worker and turn.asked < before.released
    ]


def hand_overs(
    turns: Sequence[Turn], start: float, end: float, workers: Sequence[str]
) -> HandOvers:
    """Judge the turns that were granted between two moments, of all these workers.

    A gap is from the begin of a release to the return of the next acquire, and counts only where
    another worker was waiting by then. Waits count by when they began, so that one that outlasts
    the run is not forgotten. Violations are counted over all turns, warm-up and end included.
    """
    inside = [turn for turn in turns if start <= turn.granted <= end]
    gaps = [turn.granted - before.released for before, turn in handed_over(inside)]
    counts = [sum(turn.worker == worker for turn in inside) for worker in workers]
    waits = [turn.granted - turn.asked for turn in turns if start <= turn.asked <= end]
    return HandOvers(
        turns=len(inside),
        gaps=gaps,
        violations=violations(turns),
        jain=jain(counts),
        fewest=min(counts, default=0),
        longest_wait=max(waits, default=0.0),
        mean_wait=statistics.fmean(waits) if waits else 0.0,
    )
