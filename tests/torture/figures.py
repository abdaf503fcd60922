"""The figures of a torture run, as the tables of docs/promises.md have them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tests.torture.history import History

HEAD = (
    "nemesis",
    "harms",
    "committed",
    "refused",
    "unknown",
    "told of a loss",
    "cut off",
    "leases ended by others",
    "next grant after a kill, at most",
    "lost updates",
    "seconds",
)


@dataclass(frozen=True)
class Figures:
    """One run."""

    nemesis: str
    harms: Counter[str]
    committed: int
    refused: int
    unknown: int
    told: int
    cut_off: int
    losses: int
    next_grant: float | None
    lost_updates: int
    seconds: float
    fenced: bool = True
    """Without a fence, updates are to be lost: such a run is a control, and not part of the sum."""

    @classmethod
    def of(
        cls,
        nemesis: str,
        harms: Counter[str],
        history: History,
        *,
        losses: int,
        lost_updates: int,
        seconds: float,
        measured: bool = True,
        fenced: bool = True,
    ) -> Figures:
        """Count what the processes noted. `measured`: nothing but the dead kept the lock busy."""
        waits = [wait for wait, _ in history.waits_after_kills()] if measured else []
        return cls(
            nemesis,
            harms,
            committed=len(history.with_outcome("ok")),
            refused=len(history.with_outcome("failed")),
            unknown=len(history.with_outcome("unknown")),
            told=len(history.lost),
            cut_off=len(history.cut_off),
            losses=losses,
            next_grant=max(waits, default=None),
            lost_updates=lost_updates,
            seconds=seconds,
            fenced=fenced,
        )

    def row(self) -> tuple[str, ...]:
        """The cells of its line."""
        numbers = (self.committed, self.refused, self.unknown, self.told, self.cut_off, self.losses)
        return (
            self.nemesis,
            shown(self.harms),
            *(f"{number:,}" for number in numbers),
            "" if self.next_grant is None else f"{self.next_grant:.2f} s",
            f"{self.lost_updates:,}",
            f"{self.seconds:.0f}",
        )


RUNS: list[Figures] = []
"""The runs of this process; conftest.py prints them at the end."""


def shown(harms: Counter[str]) -> str:
    """Say what was done how often."""
    return ", ".join(f"{count:,} {harm}" for harm, count in sorted(harms.items()))


def table(runs: list[Figures]) -> str:
    """Markdown: a line for each run, the sum, and the control."""
    fenced = [run for run in runs if run.fenced]
    lines = [HEAD, tuple("---" for _ in HEAD), *(run.row() for run in fenced)]
    if len(fenced) > 1:
        lines.append(total(fenced).row())
    lines += [run.row() for run in runs if not run.fenced]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def total(runs: list[Figures]) -> Figures:
    """All runs together."""
    waits = [run.next_grant for run in runs if run.next_grant is not None]
    return Figures(
        "**all**",
        sum((run.harms for run in runs), Counter()),
        committed=sum(run.committed for run in runs),
        refused=sum(run.refused for run in runs),
        unknown=sum(run.unknown for run in runs),
        told=sum(run.told for run in runs),
        cut_off=sum(run.cut_off for run in runs),
        losses=sum(run.losses for run in runs),
        next_grant=max(waits, default=None),
        lost_updates=sum(run.lost_updates for run in runs),
        seconds=sum(run.seconds for run in runs),
    )
