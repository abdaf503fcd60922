"""Many want one name: how it is handed over, and what waiting costs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..contenders.base import Contender
from ..figures import Turn, hand_overs, percentile, ratio
from ..processes import Process, crew, sleep_until
from ..progress import progress_of
from .base import Bench, Table

HOLD = 0.002
PROCESSES = 4
WAITERS = 32
CROWDS = {"2": (2, 2), "8": (8, 4), "32": (32, 4), "8 apart": (8, 8)}
"""Workers, and the processes that they are threads of."""
JUDGED = ("8", "32")
"""The crowds that there are targets for: more rounds."""
WARM_UP = 10
"""Turns of each worker before it counts: by then each connection has what it keeps for later."""
TURNS = 20
"""Turns of each worker that count, where nobody starves."""
_run = itertools.count()


def hand_over(bench: Bench) -> Table:
    """Workers in several processes take one name again and again, and hold it for 2 ms."""
    contenders = bench.chosen("hand-over")
    table: Table = {}
    for crowd, (size, processes) in CROWDS.items():
        found = bench.rounds(
            contenders,
            bench.either(1, 2 if crowd in JUDGED else 1),
            lambda contender, _, size=size, processes=processes: _hand_over(
                bench, contender, size, processes
            ),
        )
        for key, figures in found.items():
            table.setdefault(key, {}).update({f"{k}@{crowd}": v for k, v in figures.items()})
    return table


def _hand_over(
    bench: Bench, contender: type[Contender], size: int, processes: int
) -> Mapping[str, float | None]:
    contest = contend(bench, contender, size, processes)
    turns = [Turn(*turn) for result in contest.results for turn in result]
    names = [f"p{p}t{t}" for p in range(processes) for t in range(size // processes)]
    found = hand_overs(turns, contest.start, contest.end, names)
    bench.judge(contender, found.violations, f"with {size} workers")
    return {
        "p50": percentile(found.gaps, 0.5) if found.gaps else None,
        "p99": percentile(found.gaps, 0.99) if found.gaps else None,
        "statements": ratio(contest.statements, found.turns),
        "jain": found.jain,
        "fewest": found.fewest,
        "longest": found.longest_wait,
        "spread": ratio(found.longest_wait, found.mean_wait),
        "rate": found.turns / (contest.end - contest.start),
        "violations": found.violations,
    }


class Contest(NamedTuple):
    """What the processes of a contest have brought, and from when to when it counts."""

    results: list[Any]
    start: float
    end: float
    statements: float | None


def contend(
    bench: Bench,
    contender: type[Contender],
    size: int,
    processes: int,
    task: str = "contend",
) -> Contest:
    """Let so many workers in so many processes take one name again and again."""
    patience, least, most = bench.either((3.0, 0.5, 4.0), (4.0, 2.0, 6.0))
    stand = bench.stand(contender)
    with (
        progress_of(size) as (path, progress),
        crew(
            processes,
            contender.key,
            stand.url,
            task,
            limit=60.0,
            name=f"hand-over:{next(_run)}",
            threads=size // processes,
            hold=HOLD,
            progress=path,
        ) as workers,
    ):
        for worker in workers:
            worker.go()
        progress.wait(WARM_UP, patience)
        before, start = stand.statements(), time.monotonic()
        progress.wait(TURNS, most)
        sleep_until(start + least)
        after, end = stand.statements(), time.monotonic()
        progress.stop()
        results = [worker.result() for worker in workers]
    counted = None if before is None or after is None else after - before
    return Contest(results, start, end, counted)


def waiting(bench: Bench) -> Table:
    """32 wait in four processes for a name that a fifth process holds."""
    return bench.rounds(bench.chosen("waiting"), 1, lambda contender, _: _waiting(bench, contender))


def _waiting(bench: Bench, contender: type[Contender]) -> Mapping[str, float | None]:
    stand, name = bench.stand(contender), f"waiting:{next(_run)}"
    seconds = bench.either(2.0, 5.0)
    stand.wait_empty()
    with Process(contender.key, stand.url, "hold", name=name) as holder:
        holder.wait_ready()
        threads = WAITERS // PROCESSES
        with crew(
            PROCESSES, contender.key, stand.url, "wait", name=name, threads=threads
        ) as waiters:
            time.sleep(1.0)
            before, start = stand.statements(), time.monotonic()
            sleep_until(start + seconds)
            after, span = stand.statements(), time.monotonic() - start
            sessions = stand.sessions()
            for waiter in waiters:
                waiter.go()
            results = [waiter.result() for waiter in waiters]
    bench.judge(contender, sum(result["granted"] for result in results), "while it was held")
    rate = None if before is None or after is None else (after - before) / span
    messages = sum(result["messages"] for result in results) if contender.ours else None
    cpu = sum(result["cpu"] for result in results)
    return {"statements": rate, "messages": messages, "sessions": sessions, "cpu": cpu}
