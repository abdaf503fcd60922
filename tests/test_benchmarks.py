"""The benchmarks do not rot: their arithmetic, their report, and a tiny run of distlock."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from benchmarks import tasks
from benchmarks.__main__ import measure_one, wanted
from benchmarks.contenders import CONTENDERS, REFERENCES
from benchmarks.contenders.raw import RawLease, RawMariaDBLease
from benchmarks.figures import (
    Turn,
    hand_overs,
    handed_over,
    jain,
    medians,
    percentile,
    ratio,
    violations,
)
from benchmarks.layers import REPLAYS
from benchmarks.processes import Failed, run
from benchmarks.progress import Progress, progress_of
from benchmarks.report import BEGIN, END, SECTIONS, markdown, write
from benchmarks.servers import STANDS
from benchmarks.spans import Span
from benchmarks.targets import TARGETS, Target, of
from benchmarks.watching import Watch
from benchmarks.workloads import WORKLOADS
from benchmarks.workloads.base import Bench
from benchmarks.workloads.profile import parts_of
from tests.databases import query

pure = pytest.mark.vendor("sqlite")
DROP = "DROP TABLE IF EXISTS bench_lease"


def url() -> str:
    """The database under test, as another process reaches it."""
    name = connection.settings_dict["NAME"]
    if connection.vendor == "sqlite":
        return f"sqlite:///{name}"
    return f"{os.environ['DISTLOCK_TEST_URL'].rpartition('/')[0]}/{name}"


def no_wait() -> None:
    pass


# -- arithmetic --------------------------------------------------------------------------------


@pure
def test_percentiles_are_values_that_were_measured() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert percentile([7.0], 0.99) == percentile([7.0], 0.0) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


@pure
def test_jain_says_how_evenly() -> None:
    assert jain([5, 5, 5, 5]) == 1.0
    assert jain([20, 0, 0, 0]) == 0.25
    assert jain([0, 0]) == 0.0


@pure
def test_a_ratio_to_nothing_is_not_known() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(0.0, 2.0) == 0.0
    assert ratio(3.0, 0.0) is ratio(None, 2.0) is ratio(3.0, None) is None


@pure
def test_medians_pass_over_what_was_not_measured() -> None:
    rounds = [{"a": 1.0, "b": None}, {"a": 9.0}, {"a": 2.0, "b": None}]
    assert medians(rounds) == {"a": 2.0, "b": None}


@pure
def test_an_overlap_is_a_violation() -> None:
    apart = [Turn("a", 0, 1, 2), Turn("b", 0, 2, 3), Turn("a", 2, 4, 5)]
    assert violations(apart) == 0
    assert violations([*apart, Turn("c", 0, 2.5, 2.6)]) == 1
    assert violations([Turn("a", 0, 1, 10), Turn("b", 0, 2, 3), Turn("c", 0, 4, 5)]) == 2


@pure
def test_hand_overs_count_gaps_only_to_who_was_waiting() -> None:
    turns = [
        Turn("a", 0.0, 1.0, 2.0),
        Turn("b", 0.5, 2.25, 3.0),  # waited: a gap
        Turn("b", 3.0, 3.5, 4.0),  # the same worker
        Turn("a", 4.5, 5.0, 6.0),  # came after the release
        Turn("c", 5.5, 90.0, 91.0),  # waited for long, and was granted after the end
    ]
    found = hand_overs(turns, 0.0, 10.0, ["a", "b", "c"])
    assert found.gaps == [0.25]
    assert (found.turns, found.violations) == (4, 0)
    assert found.jain == jain([2, 2, 0])
    assert found.fewest == 0
    assert found.longest_wait == 84.5


# -- what is compared --------------------------------------------------------------------------


@pure
def test_every_contender_has_a_server_and_something_to_be_compared_with() -> None:
    for key, contender in CONTENDERS.items():
        assert contender.key == key
        assert contender.server in STANDS
        assert REFERENCES[contender.server] in CONTENDERS
        assert contender.workloads
        assert set(contender.workloads) <= set(WORKLOADS)
        assert ("churn" in contender.workloads) <= bool(contender.table), key
        assert ("million" in contender.workloads) <= bool(contender.fill), key
    assert wanted(["redis-py"]) == ["pg-raw-lease", "redis-py"]


@pure
def test_every_section_and_target_is_about_a_workload() -> None:
    assert {section.workload for section in SECTIONS} | {"layers"} == set(WORKLOADS)
    for target in TARGETS:
        asked = Asked()
        assert target.measured(asked) is None
        assert asked.workloads
        assert asked.workloads <= set(WORKLOADS)


class Asked(dict[str, Any]):
    """Results in which nothing was measured, and which workloads somebody looked for."""

    def __init__(self) -> None:
        self.workloads: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.workloads.add(key)
        return default


# -- the report --------------------------------------------------------------------------------


def results() -> dict[str, Any]:
    latency = {"pg-raw-lease": {"p50": 0.001}, "pg-distlock": {"p50": 0.0008, "p99": None}}
    return {
        "about": {"run": "a test"},
        "missing": {"pg-pglock": "No module named 'pglock'"},
        "skipped": {"waiting": "not asked for"},
        "failures": ["VIOLATION: pg-tooz, 2 times with 8 workers"],
        "workloads": {"latency": latency, "layers": {"pg-distlock": {"psycopg": 0.0005}}},
    }


@pure
def test_the_report_shows_ratios_verdicts_and_what_is_missing() -> None:
    text = markdown(results())
    assert "| **distlock** | PostgreSQL | 0.80 | 800 |" in text
    assert "| acquire + release / raw lease | <= 1 | 0.8 | reached |" in text
    assert "| purge: seconds | < 60 | - | not measured |" in text
    assert "- not run: django-pglock (advisory lock) on PostgreSQL (pg-pglock): No module" in text
    assert "- not run: waiting: not asked for" in text
    assert "- not run: tooz on Redis (redis-tooz): failed, or has no part" in text
    assert "(pg-distlock):" not in text
    assert "VIOLATION: pg-tooz" in text
    assert "| psycopg | 500 |" in text


@pure
def test_a_target_that_is_missed_is_said_to_be() -> None:
    target = Target("x", "<=", 0.5, of("latency", "pg-distlock", "p50"))
    assert target.measured(results()["workloads"]) == 0.0008
    assert target.reached(0.5)
    assert not target.reached(0.51)
    assert not Target("x", "<", 1.0, target.measured).reached(1.0)
    assert not Target("x", ">=", 0.95, target.measured).reached(0.94)


@pure
def test_a_quick_run_gives_no_verdict_on_large_numbers() -> None:
    whole = results()
    whole["workloads"]["purge"] = {"pg-distlock": {"seconds": 1.0}}
    assert "| purge: seconds | < 60 | 1 | reached |" in markdown(whole)
    whole["about"]["run"] = "quick"
    assert "| purge: seconds | < 60 | 1 | a quick run is too small to tell |" in markdown(whole)


@pure
def test_whoever_runs_and_has_no_figures_of_a_workload_is_named_below_it() -> None:
    text = markdown(results())
    named = text.partition("No figures, as it failed: ")[2].partition("\n")[0]
    assert "tooz on PostgreSQL" in named
    assert "**distlock** on PostgreSQL" not in named  # it has some
    assert "django-pglock" not in named  # it does not run
    assert "LISTEN" not in named  # it has no part in this


@pure
def test_a_target_that_is_exempt_is_judged_by_nobody() -> None:
    whole = results()
    whole["workloads"]["waiting"] = {
        "pg-distlock": {"statements": 2.0},
        "pg-distlock-fair": {"statements": 24.0},
    }
    text = markdown(whole)
    assert "| statements / s while 32 wait | <= 0 | 2 | **not reached** |" in text
    assert "| `fair=True`: statements / s while 32 wait | <= 0 | 24 | exempt: " in text


@pure
def test_the_longest_wait_over_eight_processes_is_a_sentence() -> None:
    whole = results()
    crowd = {"longest@8 apart": 0.25, "spread@8 apart": 4.0}
    whole["workloads"]["hand-over"] = {
        "pg-distlock": crowd,
        "mariadb-distlock": {},
        "pg-raw-lease": crowd,
    }
    assert (
        "The longest wait of anybody over 8 processes: "
        "**distlock** on PostgreSQL 250 ms (4 times the mean).\n"
    ) in markdown(whole)


# -- what fails --------------------------------------------------------------------------------


@pure
def test_whoever_fails_is_named_and_the_others_go_on() -> None:
    bench = Bench({}, ["pg-raw-lease", "redis-py"], quick=True)

    def measure(contender: Any, _number: int) -> dict[str, float | None]:
        if contender.key == "redis-py":
            raise ConnectionError("the server\nis gone")
        return {"p50": 1.0}

    found = bench.rounds(bench.chosen("latency"), 1, measure)
    assert found == {"pg-raw-lease": {"p50": 1.0}}
    assert bench.failures == ["redis-py: ConnectionError: the server is gone"]
    assert not bench.bad


@pure
def test_a_workload_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_bench: Bench) -> Any:
        raise RuntimeError("no")

    monkeypatch.setitem(WORKLOADS, "latency", failing)
    bench = Bench({}, [], quick=True)
    found: dict[str, Any] = {"workloads": {}, "skipped": {"latency": "the run ended before"}}
    measure_one(bench, "latency", found)
    assert found == {"workloads": {}, "skipped": {"latency": "failed"}}
    assert bench.failures == ["latency: RuntimeError: no"]
    assert bench.bad


@pure
def test_only_what_stands_between_the_marks_is_written_anew(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write("new\n", page)
    assert page.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"


# -- a run -------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_two_cycles_of_distlock_are_timed() -> None:
    contender = CONTENDERS["pg-distlock"](url())
    with Watch() as watch:
        found = tasks.latency(contender, no_wait, names=["bench"], cycles=2, seconds=30.0)
    assert found["cycles"] == 22  # with those to warm up
    assert 0 < found["p50"] <= found["p99"]
    assert len(watch.seen) >= 2 * 22


@pure
def test_progress_waits_for_the_slowest_and_not_for_ever() -> None:
    with progress_of(2) as (path, mine):
        theirs, counting = Progress(path), [0]

        def count() -> None:
            while not theirs.stopped:
                for worker in counting:
                    theirs.count(worker)
                time.sleep(0.001)

        thread = threading.Thread(target=count, daemon=True)
        thread.start()
        start = time.monotonic()
        try:
            mine.wait(3, 0.2)
            assert time.monotonic() - start >= 0.2
            counting.append(1)
            mine.wait(3, 60.0)
            assert time.monotonic() - start < 60
        finally:
            mine.stop()
            thread.join(60)
        assert not thread.is_alive()


@pytest.mark.django_db(transaction=True)
def test_two_threads_hand_a_lock_over() -> None:
    contender = CONTENDERS["pg-distlock"](url())

    def stop_after(progress: Progress) -> None:
        progress.wait(2, 60.0)
        progress.stop()

    with progress_of(2) as (path, progress):
        stopping = threading.Thread(target=stop_after, args=(progress,))
        stopping.start()
        turns = tasks.contend(
            contender, no_wait, worker="p0", name="bench", threads=2, hold=0.002, progress=path
        )
        stopping.join()
    found = hand_overs(turns, 0.0, float("inf"), ["p0t0", "p0t1"])
    assert {turn.worker for turn in turns} == {"p0t0", "p0t1"}
    assert found.violations == 0
    assert found.fewest >= 2


@pytest.mark.django_db(transaction=True)
def test_the_steps_of_a_cycle_are_its_statements_and_the_rest() -> None:
    found = tasks.steps(CONTENDERS["pg-distlock"](url()), no_wait, name="bench", cycles=5)
    assert {"whole", "grant", "release", "rest"} <= set(found)
    assert "commit" not in found or connection.vendor == "sqlite"
    assert all(0 < seconds < found["whole"] for part, seconds in found.items() if part != "whole")


@pytest.mark.vendor("postgresql", "mysql")
@pytest.mark.django_db(transaction=True)
def test_the_layers_of_a_cycle_are_timed() -> None:
    key = "pg-distlock" if connection.vendor == "postgresql" else "mariadb-distlock"
    replay = REPLAYS[CONTENDERS[key].server]
    with ExitStack() as stack:
        stack.callback(query, os.environ["DISTLOCK_TEST_URL"], DROP, name=url().rpartition("/")[2])
        with Watch() as watch:
            timed = tasks.timed(CONTENDERS[key](url()).cycle, ["bench"], tasks.WARM)
        pair = [(each.sql, each.parameters) for each in watch.seen[-2:]]
        assert len(timed) == tasks.WARM
        for way, (cycle, _setting) in replay(url(), pair, stack).ways().items():
            assert min(tasks.timed(cycle, ["bench"], 2)) > 0, way


@pytest.mark.vendor("postgresql")
@pytest.mark.django_db(transaction=True)
def test_the_spans_of_a_hand_over_are_collected() -> None:
    contender = CONTENDERS["pg-distlock"](url())
    with progress_of(2) as (path, progress):
        stopping = threading.Thread(target=lambda: (progress.wait(3, 60.0), progress.stop()))
        stopping.start()
        found = tasks.contend_in_spans(
            contender,
            no_wait,
            worker="p0",
            name="bench",
            threads=2,
            hold=0.01,
            progress=path,
        )
        stopping.join()
    parts = [parts_of(*pair, [found["spans"]]) for pair in handed_over(found["turns"])]
    known = [each for each in parts if each is not None]
    assert known
    assert all(min(v for v in each.values() if v is not None) > 0 for each in known)


@pure
def test_the_parts_of_a_gap_are_its_own() -> None:
    before, turn = Turn("p1t0", 0.0, 1.0, 2.0), Turn("p0t3", 1.5, 3.0, 4.0)
    own = [
        Span("heard", "lookout", 0.9, 1.0, came=True),  # of an earlier release
        Span("heard", "lookout", 2.0, 2.1, came=False),  # nothing was said
        Span("heard", "lookout", 2.1, 2.25, came=True),
        Span("slept", "p0t3", 1.5, 2.5, came=True),
        Span("grant", "p0t3", 2.5, 2.625, came=False),  # in vain
        Span("slept", "p0t3", 2.625, 2.6875, came=True),
        Span("grant", "p0t3", 2.75, 2.875, came=True),
        Span("grant", "p0t3", 3.5, 3.75, came=True),  # later
    ]
    others = [Span("grant", "p1t1", 2.5, 2.75, came=False)]
    assert parts_of(before, turn, [own, others]) == {
        "gap": 1.0,
        "heard": 0.25,
        "awake": 0.4375,
        "grant": 0.125,
        "rest": 0.1875,
        "tries": 3,
    }
    assert parts_of(before, turn, [own[3:], others]) is None


@pytest.mark.django_db(transaction=True)
def test_a_process_of_its_own_measures_and_answers() -> None:
    found = run("pg-distlock", url(), "latency", names=["bench"], cycles=2, seconds=30.0)
    assert found["cycles"] == 22


@pure
def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(Failed, match=r"latency of pg-raw-lease: .*cycles"):
        run("pg-raw-lease", "postgresql://127.0.0.1:1/none", "latency")


def is_a_lock(contender: Any) -> None:
    contender.prepare()
    held = contender.acquire("bench")
    assert held[1] == 1
    contender.release("bench", held)
    with pytest.raises(RuntimeError, match="was not held"):
        contender.release("bench", held)
    assert contender.acquire("bench")[1] == 2


@pytest.mark.vendor("postgresql")
@pytest.mark.django_db(transaction=True)
def test_the_raw_lease_of_postgresql_is_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    contender = RawLease(url())
    try:
        is_a_lock(contender)
        monkeypatch.setattr("benchmarks.contenders.base.PATIENCE", 0.0)
        with pytest.raises(TimeoutError):
            contender.acquire("bench")
    finally:
        contender.execute(DROP)
        contender.local.connection.close()


@pytest.mark.vendor("mysql")
@pytest.mark.django_db(transaction=True)
def test_the_raw_lease_of_mariadb_is_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    if not getattr(connection, "mysql_is_mariadb", False):
        pytest.skip("MySQL has no INSERT .. RETURNING")
    contender = RawMariaDBLease(url())
    try:
        is_a_lock(contender)
        monkeypatch.setattr("benchmarks.contenders.base.PATIENCE", 0.0)
        with pytest.raises(TimeoutError):
            contender.acquire("bench")
    finally:
        contender.execute(DROP)
        contender.local.connection.close()
