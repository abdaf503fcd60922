"""Nobody else wants the lock: latency of one client, throughput of many."""

from __future__ import annotations

from collections.abc import Mapping

from ..contenders.base import Contender
from ..processes import crew
from .base import Bench, Table

PROCESSES = 4
THREADS = 8


def latency(bench: Bench) -> Table:
    """Acquire and release of one name by one client."""
    cycles, seconds = bench.either((400, 1.0), (1500, 3.0))

    def measure(contender: type[Contender], each_round: int) -> Mapping[str, float | None]:
        names = [f"latency:{each_round}"]
        before = bench.stand(contender).statements()
        found: dict[str, float | None] = bench.run(
            contender, "latency", names=names, cycles=cycles, seconds=seconds
        )
        after = bench.stand(contender).statements()
        done = found.pop("cycles")
        if before is not None and after is not None and done:
            found["statements"] = round((after - before) / done, 1)
        return found

    return bench.rounds(bench.chosen("latency"), 3, measure)


def throughput(bench: Bench) -> Table:
    """Cycles per second on names of one's own: threads of one process, and processes."""
    seconds = bench.either(1.0, 1.5)

    def measure(contender: type[Contender], each_round: int) -> Mapping[str, float | None]:
        return {
            "threads": _rate(bench, contender, 1, THREADS, seconds),
            "processes": _rate(bench, contender, PROCESSES, 1, seconds),
        }

    return bench.rounds(bench.chosen("throughput"), bench.either(1, 2), measure)


def _rate(
    bench: Bench, contender: type[Contender], processes: int, threads: int, seconds: float
) -> float:
    url = bench.url(contender)
    with crew(
        processes, contender.key, url, "throughput", limit=60.0, threads=threads, seconds=seconds
    ) as workers:
        for worker in workers:
            worker.go()
        return sum(float(worker.result()) for worker in workers)
