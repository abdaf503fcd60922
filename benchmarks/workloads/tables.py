"""The table over time: churn, a million rows, and a purge while others work."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ..contenders.base import Contender
from ..figures import percentile, ratio
from ..processes import Process, run
from ..servers import Database, PostgreSQLStand
from .base import Bench, Table

NAMES = 100


def churn(bench: Bench) -> Table:
    """Cycles on 100 names, after a tenth and in the end; then renewals, where there are any."""
    return bench.rounds(bench.chosen("churn"), 1, lambda contender, _: _churn(bench, contender))


def _churn(bench: Bench, contender: type[Contender]) -> Mapping[str, float | None]:
    cycles, seconds = bench.either((4_000, 5.0), (100_000, 120.0 if contender.ours else 25.0))
    stand, table = bench.stand(contender), contender.table
    assert isinstance(stand, Database)
    bench.empty(contender)
    names = [f"churn:{number}" for number in range(NAMES)]
    arguments = {"names": names, "limit": 3 * seconds + 60}
    begun = _updates(stand, table)
    first = bench.run(contender, "churn", cycles=cycles // 10, seconds=seconds / 10, **arguments)
    early = stand.size(table)
    rest = bench.run(contender, "churn", cycles=cycles * 9 // 10, seconds=seconds, **arguments)
    late, ended = stand.size(table), _updates(stand, table)
    figures: dict[str, float | None] = {
        "cycles": first["cycles"] + rest["cycles"],
        **late,
        "table_growth": ratio(late["table"], early["table"]),
        "indexes_growth": ratio(late["indexes"], early["indexes"]),
        "hot": _hot(begun, ended),
        "slower": ratio(rest["last"], first["first"]),
    }
    if contender.ours:
        figures["hot_renewals"] = _renewals(bench, contender, names)
    return figures


def _renewals(bench: Bench, contender: type[Contender], names: list[str]) -> float | None:
    """The HOT share of renewals alone, of leases that are all held at once."""
    stand, times = bench.stand(contender), bench.either(10, 50)
    assert isinstance(stand, Database)
    arguments = {"names": names, "times": times}
    with Process(contender.key, stand.url, "renew", **arguments) as renewing:
        renewing.wait_ready()
        before = _updates(stand, contender.table)
        renewing.go()
        renewing.result()
    return _hot(before, _updates(stand, contender.table))


def _updates(stand: Database, table: str) -> tuple[int, int] | None:
    return stand.updates(table) if isinstance(stand, PostgreSQLStand) else None


def _hot(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    if before is None or after is None:
        return None
    return ratio(after[1] - before[1], after[0] - before[0])


def million(bench: Bench) -> Table:
    """Latency in an empty table, and in turn in another database, with a million other leases."""
    rows, cycles, seconds = bench.either((100_000, 400, 3.0), (1_000_000, 1000, 4.0))

    def measure(contender: type[Contender], each_round: int) -> Mapping[str, float | None]:
        stand = bench.stand(contender)
        assert isinstance(stand, Database)
        names = [f"million:{each_round}:{number}" for number in range(20)]
        arguments = {"names": names, "cycles": cycles, "seconds": seconds}
        empty, full = (
            run(contender.key, url, "latency", **arguments)["p50"]
            for url in (stand.url, stand.other)
        )
        return {"rows": rows, "empty": empty, "full": full, "ratio": ratio(full, empty)}

    filled = []
    for contender in bench.chosen("million"):
        with bench.tolerance(contender):
            bench.empty(contender)
            bench.fill_other(contender, rows)
            filled.append(contender)
    return bench.rounds(filled, 3, measure)


def purge(bench: Bench) -> Table:
    """``purge_locks`` with a million ended rows, while another client acquires and releases."""
    return bench.rounds(bench.chosen("purge"), 1, lambda contender, _: _purge(bench, contender))


def _purge(bench: Bench, contender: type[Contender]) -> Mapping[str, float | None]:
    rows = bench.either(100_000, 1_000_000)
    url, names = bench.url(contender), [f"purge:{number}" for number in range(20)]
    bench.empty(contender)
    bench.fill(contender, rows)
    with (
        Process(contender.key, url, "purge", limit=400.0) as purging,
        Process(contender.key, url, "beside", limit=400.0, names=names) as other,
    ):
        purging.wait_ready()
        other.wait_ready()
        other.go()
        time.sleep(bench.either(2.0, 6.0))
        start = time.monotonic()
        purging.go()
        seconds = purging.result()
        end = time.monotonic()
        other.go()  # here: stop
        cycles = other.result()
    bench.empty(contender)
    calm = [spent for begun, spent in cycles if begun + spent < start]
    busy = [spent for begun, spent in cycles if begun + spent >= start and begun <= end]
    return {
        "rows": rows,
        "seconds": seconds,
        "calm_p50": percentile(calm, 0.5),
        "calm_p99": percentile(calm, 0.99),
        "p50": percentile(busy, 0.5),
        "p99": percentile(busy, 0.99),
        "worst": max(busy),
        "ratio": ratio(percentile(busy, 0.99), percentile(calm, 0.99)),
    }
