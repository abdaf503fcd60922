"""What one process pays for the leases that it holds."""

from __future__ import annotations

from collections.abc import Mapping

from ..contenders.base import Contender
from ..figures import ratio
from ..processes import Process
from .base import Bench, Table

THREADS = 8


def renewals(bench: Bench) -> Table:
    """10,000 leases in one process, renewed for two rounds: a round is a third of the ttl."""
    return bench.rounds(
        bench.chosen("renewals"), 1, lambda contender, _: _renewals(bench, contender)
    )


def _renewals(bench: Bench, contender: type[Contender]) -> Mapping[str, float | None]:
    count, ttl = bench.either((1_000, 15.0), (10_000, 60.0))
    stand, rounds = bench.stand(contender), 2
    bench.empty(contender)
    with Process(
        contender.key,
        stand.url,
        "keep",
        limit=300.0,
        count=count,
        threads=THREADS,
        ttl=ttl,
        seconds=rounds * ttl / 3,
    ) as keeping:
        keeping.wait_ready()
        before = stand.statements()
        keeping.go()
        found = keeping.result()
        after = stand.statements()
    bench.empty(contender)
    on_server = None if before is None or after is None else after - before
    return {
        "leases": found["leases"],
        "lost": found["lost"],
        "statements": found["statements"] / rounds,
        "on_server": ratio(on_server, rounds),
        "seconds": (found["busy"] + found["cpu"]) / rounds,
        "busy": found["busy"] / rounds,
        "cpu": found["cpu"] / rounds,
    }
