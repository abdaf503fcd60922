"""What every workload shares: the contenders that run, the rounds, and the failures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..contenders import CONTENDERS
from ..contenders.base import Contender
from ..figures import medians
from ..processes import Failed, run
from ..servers import COUNTING, MEASURED, Database, Stand

Figures = dict[str, float | None]
Table = dict[str, Figures]


@dataclass
class Bench:
    """One run: what runs where, how long it may take, and what went wrong."""

    stands: Mapping[str, Stand]
    keys: list[str]
    quick: bool
    failures: list[str] = field(default_factory=list)
    bad: bool = False
    """Whether two held one lock, or distlock failed."""

    def chosen(self, workload: str) -> list[type[Contender]]:
        """The contenders that take part and run, in the order of the tables."""
        return [CONTENDERS[key] for key in self.keys if workload in CONTENDERS[key].workloads]

    def url(self, contender: type[Contender]) -> str:
        return self.stands[contender.server].url

    def stand(self, contender: type[Contender]) -> Stand:
        return self.stands[contender.server]

    def run(self, contender: type[Contender], task: str, **arguments: Any) -> Any:
        return run(contender.key, self.url(contender), task, **arguments)

    def either(self, quick: Any, full: Any) -> Any:
        return quick if self.quick else full

    @contextmanager
    def tolerance(self, contender: type[Contender]) -> Iterator[None]:
        """Go on after a contender has failed: it is told at the end."""
        try:
            yield
        except Failed as failure:
            self.fail(str(failure), ours=contender.ours)
        except Exception as error:  # the server's or its driver's, too
            self.fail(f"{contender.key}: {type(error).__name__}: {error}", ours=contender.ours)

    def fail(self, text: str, *, ours: bool) -> None:
        """Note a failure; one of distlock fails the run."""
        self.bad |= ours
        text = " ".join(text.split())[:400]
        self.failures.append(text)
        say(f"  failed: {text}")

    def judge(self, contender: type[Contender], violations: int, where: str) -> None:
        """Note how often two held one lock: then the run has failed, whoever it was."""
        if violations:
            self.fail(f"VIOLATION: {contender.key}, {violations} times {where}", ours=True)

    def rounds(
        self,
        contenders: list[type[Contender]],
        number: int,
        measure: Callable[[type[Contender], int], Mapping[str, float | None]],
    ) -> Table:
        """The medians of interleaved rounds: A B C, A B C. Whoever always fails has none."""
        found: dict[str, list[Mapping[str, float | None]]] = {each.key: [] for each in contenders}
        for each_round in range(number):
            for contender in contenders:
                with self.tolerance(contender):
                    found[contender.key].append(measure(contender, each_round))
        return {key: medians(figures) for key, figures in found.items() if figures}

    def empty(self, contender: type[Contender]) -> None:
        stand = self.stand(contender)
        assert isinstance(stand, Database)
        stand.run(f"TRUNCATE TABLE {contender.table}")

    def fill(self, contender: type[Contender], rows: int) -> None:
        """Add rows whose leases ended long ago."""
        self._fill(contender, rows, "- INTERVAL '60' DAY", MEASURED)

    def fill_other(self, contender: type[Contender], rows: int) -> None:
        """Make its table in the other database, with rows whose leases go on."""
        stand = self.stand(contender)
        assert isinstance(stand, Database)
        run(contender.key, stand.other, "prepare")
        self._fill(contender, rows, "+ INTERVAL '1' DAY", COUNTING)

    def _fill(self, contender: type[Contender], rows: int, span: str, database: str) -> None:
        stand = self.stand(contender)
        assert isinstance(stand, Database)
        now = "clock_timestamp()" if contender.server == "postgresql" else "UTC_TIMESTAMP(6)"
        stand.run(contender.fill.format(rows=rows, end=f"{now} {span}"), database)
        stand.settle(contender.table, database)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
