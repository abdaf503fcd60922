"""Where the time goes: layer by layer, step by step, and between two holders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..contenders.base import Contender
from ..figures import Turn, handed_over, medians, ratio, violations
from ..spans import Span
from .base import Bench, Table
from .contended import CROWDS, JUDGED, contend


def layers(bench: Bench) -> Table:
    """The layers of an acquire and release; see ``benchmarks/layers.py``."""
    return _cycle_by_cycle(bench, "layers")


def steps(bench: Bench) -> Table:
    """What an acquire and release consists of, and a transaction with and without a lock."""
    return _cycle_by_cycle(bench, "steps")


def _cycle_by_cycle(bench: Bench, workload: str) -> Table:
    return bench.rounds(
        bench.chosen(workload),
        bench.either(1, 3),
        lambda contender, number: bench.run(
            contender, workload, name=f"{workload}:{number}", cycles=bench.either(300, 1000)
        ),
    )


def gaps(bench: Bench) -> Table:
    """What lies between the begin of a release and the return of the next acquire."""
    table: Table = {}
    for crowd in JUDGED:
        found = bench.rounds(
            bench.chosen("gaps"),
            bench.either(1, 2),
            lambda contender, _, crowd=crowd: _gaps(bench, contender, *CROWDS[crowd]),
        )
        for key, figures in found.items():
            table.setdefault(key, {}).update({f"{k}@{crowd}": v for k, v in figures.items()})
    return table


def _gaps(
    bench: Bench, contender: type[Contender], size: int, processes: int
) -> Mapping[str, float | None]:
    contest = contend(bench, contender, size, processes, "contend_in_spans")
    turns = [Turn(*turn) for result in contest.results for turn in result["turns"]]
    bench.judge(contender, violations(turns), f"with {size} workers, for the profile")
    spans = [[Span(*span) for span in result["spans"]] for result in contest.results]
    counted = [turn for turn in turns if contest.start <= turn.granted <= contest.end]
    found = [parts_of(*pair, spans) for pair in handed_over(counted)]
    known = [parts for parts in found if parts is not None]
    return {**medians(known), "known": ratio(len(known), len(found))}


def parts_of(before: Turn, turn: Turn, spans: list[list[Span]]) -> dict[str, float | None] | None:
    """The seconds of one gap; None if whoever came next was not woken by the release."""

    def within(them: Iterable[Span]) -> list[Span]:
        return [span for span in them if before.released < span.end <= turn.granted]

    process = int(turn.worker.removeprefix("p").partition("t")[0])
    own = within(spans[process])
    mine = [span for span in own if span.thread == turn.worker and span.came]
    heard = [span.end for span in own if span.what == "heard" and span.came]
    slept = [span.end for span in mine if span.what == "slept"]
    grant = [span for span in mine if span.what == "grant"]
    if not (heard and slept and grant and heard[0] < slept[-1] < grant[-1].begin):
        return None
    whole, seconds = turn.granted - before.released, grant[-1].end - grant[-1].begin
    parts = {
        "heard": heard[0] - before.released,
        "awake": slept[-1] - heard[0],
        "grant": seconds,
    }
    tries = sum(span.what == "grant" for each in spans for span in within(each))
    return {"gap": whole, **parts, "rest": whole - sum(parts.values()), "tries": tries}
