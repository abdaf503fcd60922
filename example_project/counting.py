"""What the rows of `Run` say: how often each tick ran, and whether runs overlapped."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .shop.models import Run

BEATS = 2


@dataclass
class Tick:
    """What became of one tick."""

    number: int
    report: list[Run] = field(default_factory=list)
    skipped: list[Run] = field(default_factory=list)
    control: list[Run] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every message of every beat has been dealt with."""
        runs = [*self.report, *self.skipped, *self.control]
        whole = len(self.report) + len(self.skipped) >= BEATS and len(self.control) >= BEATS
        return whole and all(run.ended for run in runs)

    @property
    def good(self) -> bool:
        """Whether the report ran exactly once."""
        return len(self.report) == 1

    def __str__(self) -> str:
        workers = ", ".join(run.worker for run in self.report) or "-"
        times = {0: "DID NOT RUN", 1: "ran once"}.get(len(self.report), "RAN TWICE")
        skipped = "duplicate skipped" if self.skipped else "no duplicate came"
        return f"report {times} ({workers}), {skipped:<18} control ran {len(self.control)}x"


def ticks() -> list[Tick]:
    """Return every tick so far, in order."""
    from .shop.models import Run

    found: dict[int, Tick] = {}
    for run in Run.objects.order_by("started"):
        tick = found.setdefault(run.tick, Tick(run.tick))
        (tick.skipped if run.skipped else getattr(tick, run.job)).append(run)
    return [found[number] for number in sorted(found)]


def overlaps(ticks: list[Tick]) -> dict[str, int]:
    """Return, by job, how many runs began while another one had not ended."""
    busy_until: dict[str, float] = defaultdict(float)
    count = {"report": 0, "control": 0}
    runs = [run for tick in ticks for run in (*tick.report, *tick.control)]
    for run in sorted(runs, key=lambda run: run.started):
        count[run.job] += run.started < busy_until[run.job]
        busy_until[run.job] = max(busy_until[run.job], run.ended or math.inf)
    return count


def summary(ticks: list[Tick]) -> tuple[str, bool]:
    """Return the last words, and whether all is well."""
    overlapping = overlaps(ticks)
    runs = sum(len(tick.report) for tick in ticks)
    skipped = sum(len(tick.skipped) for tick in ticks)
    twice = sum(len(tick.report) > 1 for tick in ticks)
    lost = sum(not tick.report for tick in ticks)
    control = sum(len(tick.control) for tick in ticks)
    doubled = sum(len(tick.control) > 1 for tick in ticks)
    text = (
        f"{len(ticks)} ticks\n"
        f"  report   {runs} runs, {skipped} duplicates skipped, {overlapping['report']} overlaps, "
        f"{twice} ticks ran twice, {lost} ticks lost\n"
        f"  control  {control} runs, {overlapping['control']} overlaps, {doubled} ticks ran twice"
    )
    return text, runs > 0 and not (overlapping["report"] or twice or lost)
