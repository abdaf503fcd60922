"""The tables: what was measured, as markdown, which a terminal shows well enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .contenders import CONTENDERS, REFERENCES
from .figures import ratio
from .targets import TARGETS, Results
from .workloads import WORKLOADS
from .workloads.base import Table
from .workloads.contended import CROWDS, JUDGED

BEGIN = "<!-- measured: made by benchmarks, not by hand -->"
END = "<!-- /measured -->"


class Column(NamedTuple):
    title: str
    field: str
    show: Callable[[float], str]
    relative: bool = False
    """Whether it is shown as a multiple of the raw lease's."""
    inverse: bool = False


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _us(value: float) -> str:
    return f"{value * 1e6:,.0f}"


def _ms(value: float) -> str:
    return _number(value * 1e3)


def _share(value: float) -> str:
    return f"{value * 100:.2f}"


def _nothing(_table: Table) -> str:
    return ""


class Section(NamedTuple):
    """A table of one workload. `note` says in a sentence what it comes to."""

    workload: str
    title: str
    columns: list[Column]
    note: Callable[[Table], str] = _nothing


def _hand_over(size: str) -> list[Column]:
    return [
        Column("gap p50 ms", f"p50@{size}", _ms),
        Column("gap p99 ms", f"p99@{size}", _ms),
        Column("statements each", f"statements@{size}", _number),
        Column("Jain", f"jain@{size}", _two),
        Column("fewest turns", f"fewest@{size}", _number),
        Column("longest wait ms", f"longest@{size}", _ms),
        Column("longest / mean", f"spread@{size}", _number),
        Column("per second", f"rate@{size}", _number),
        Column("violations", f"violations@{size}", _number),
    ]


def _gaps(size: str) -> list[Column]:
    return [
        Column("gap p50 us", f"gap@{size}", _us),
        Column("until it is heard", f"heard@{size}", _us),
        Column("until its thread has woken", f"awake@{size}", _us),
        Column("grant", f"grant@{size}", _us),
        Column("the rest", f"rest@{size}", _us),
        Column("tries of all", f"tries@{size}", _number),
        Column("% that were heard of", f"known@{size}", _share),
    ]


def _apart(table: Table) -> str:
    """How long anybody waits for distlock where each waiter is a process of its own."""
    said = [
        f"{_name(key)} {_ms(longest)} ms ({_number(figures['spread@8 apart'])} times the mean)"
        for key, figures in table.items()
        if CONTENDERS[key].ours and (longest := figures.get("longest@8 apart")) is not None
    ]
    return f"The longest wait of anybody over 8 processes: {'; '.join(said)}." if said else ""


SECTIONS = [
    Section(
        "latency",
        "Acquire and release, nobody competes",
        [
            Column("x raw lease", "p50", _two, relative=True),
            Column("p50 us", "p50", _us),
            Column("p99 us", "p99", _us),
            Column("client CPU us", "cpu", _us),
            Column("statements", "statements", _number),
        ],
    ),
    Section(
        "throughput",
        "Cycles per second, names of one's own (x: how many times slower than the raw lease)",
        [
            Column("x, 8 threads", "threads", _two, relative=True, inverse=True),
            Column("8 threads of a process", "threads", _number),
            Column("x, 4 processes", "processes", _two, relative=True, inverse=True),
            Column("4 processes", "processes", _number),
        ],
    ),
    *[
        Section(
            "hand-over",
            f"Hand-over, {size} workers in {processes} processes, 2 ms held",
            _hand_over(crowd),
            _apart if crowd == "8 apart" else _nothing,
        )
        for crowd, (size, processes) in CROWDS.items()
    ],
    Section(
        "waiting",
        "32 wait in 4 processes for a lock that is held",
        [
            Column("statements / s", "statements", _number),
            Column("messages / s", "messages", _number),
            Column("connections", "sessions", _number),
            Column("client cores", "cpu", _two),
        ],
    ),
    Section(
        "churn",
        "Churn on 100 names",
        [
            Column("cycles", "cycles", _number),
            Column("table bytes", "table", _number),
            Column("index bytes", "indexes", _number),
            Column("table, end / first tenth", "table_growth", _two),
            Column("indexes, end / first tenth", "indexes_growth", _two),
            Column("HOT %", "hot", _share),
            Column("HOT % of renewals", "hot_renewals", _share),
            Column("latency, end / begin", "slower", _two),
        ],
    ),
    Section(
        "million",
        "Many rows of others in the table",
        [
            Column("rows", "rows", _number),
            Column("empty: p50 us", "empty", _us),
            Column("full: p50 us", "full", _us),
            Column("full / empty", "ratio", _two),
        ],
    ),
    Section(
        "purge",
        "`purge_locks` while another client acquires and releases",
        [
            Column("rows", "rows", _number),
            Column("seconds", "seconds", _number),
            Column("client before: p99 us", "calm_p99", _us),
            Column("client meanwhile: p50 us", "p50", _us),
            Column("p99 us", "p99", _us),
            Column("worst ms", "worst", _ms),
            Column("p99 / before", "ratio", _two),
        ],
    ),
    Section(
        "renewals",
        "Renewals by the keeper of one process, per round (every third of the ttl)",
        [
            Column("leases", "leases", _number),
            Column("lost", "lost", _number),
            Column("messages", "statements", _number),
            Column("statements, as the server counts", "on_server", _number),
            Column("seconds in the database", "busy", _number),
            Column("CPU seconds here", "cpu", _number),
        ],
    ),
    Section(
        "steps",
        "What an acquire and release, or a transaction, consists of: p50, us",
        [
            Column("whole", "whole", _us),
            Column("grant", "grant", _us),
            Column("other statements", "statements", _us),
            Column("release", "release", _us),
            Column("COMMIT", "commit", _us),
            Column("autocommit off and on", "autocommit", _us),
            Column("the rest", "rest", _us),
        ],
    ),
    *[
        Section(
            "gaps",
            f"What a hand-over consists of, {CROWDS[crowd][0]} workers in {CROWDS[crowd][1]} "
            "processes: p50, us",
            _gaps(crowd),
        )
        for crowd in JUDGED
    ],
]


def markdown(results: Results) -> str:
    """Everything that was measured."""
    parts = [_about(results), _targets(results)]
    parts += [_section(results, section) for section in SECTIONS]
    parts.append(_layers(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(results: Results) -> str:
    lines = [f"- {key}: {text}" for key, text in results["about"].items()]
    lines += [f"- not run: {what}: {why}" for what, why in _missing(results)]
    lines += [f"- failed: {failure}" for failure in results["failures"]]
    return "\n".join(lines)


def _missing(results: Results) -> list[tuple[str, str]]:
    """What has no figures at all, and why."""
    skipped, missing, measured = results["skipped"], results["missing"], results["workloads"]
    workloads = [
        (name, skipped.get(name, "no contender")) for name in WORKLOADS if not measured.get(name)
    ]
    with_figures = {key for table in measured.values() for key in table}
    contenders = [
        (f"{_name(key)} ({key})", missing.get(key, "failed, or has no part in what was run"))
        for key in CONTENDERS
        if key not in with_figures
    ]
    return workloads + contenders


def _failed(results: Results, workload: str) -> str:
    """Whoever takes part and runs, and still has no figures."""
    table = results["workloads"][workload]
    names = [
        _name(key)
        for key, contender in CONTENDERS.items()
        if workload in contender.workloads and not {key} & {*results["missing"], *table}
    ]
    return f"No figures, as it failed: {', '.join(names)}." if names else ""


def _targets(results: Results) -> str:
    rows = []
    for target in TARGETS:
        value = target.measured(results["workloads"])
        if value is None:
            shown, verdict = "-", "not measured"
        else:
            shown = f"{value:.4g}"
            verdict = "reached" if target.reached(value) else "**not reached**"
            if target.exempt:
                verdict = target.exempt
            elif target.large and results["about"].get("run") == "quick":
                verdict = "a quick run is too small to tell"
        rows.append([target.text, f"{target.sign} {target.limit:g}", shown, verdict])
    return "### Targets\n\n" + _grid(["target", "limit", "measured", ""], rows)


def _section(results: Results, section: Section) -> str:
    table = results["workloads"].get(section.workload)
    if not table:
        return ""
    shown = [
        column
        for column in section.columns
        if any(row.get(column.field) is not None for row in table.values())
    ]
    rows = [
        [CONTENDERS[key].title, _where(key), *(_cell(table, key, column) for column in shown)]
        for key in CONTENDERS
        if key in table
    ]
    grid = _grid(["", "on", *(column.title for column in shown)], rows)
    parts = [f"### {section.title}", grid, section.note(table), _failed(results, section.workload)]
    return "\n\n".join(part for part in parts if part)


def _name(key: str) -> str:
    return f"{CONTENDERS[key].title} on {_where(key)}"


def _where(key: str) -> str:
    names = {
        "postgresql": "PostgreSQL",
        "mariadb": "MariaDB",
        "redis": "Redis",
        "redis-always": "Redis, fsync always",
    }
    return names[CONTENDERS[key].server]


def _cell(table: Mapping[str, Mapping[str, Any]], key: str, column: Column) -> str:
    value = table[key].get(column.field)
    if column.relative:
        reference = table.get(REFERENCES[CONTENDERS[key].server], {}).get(column.field)
        value = ratio(reference, value) if column.inverse else ratio(value, reference)
    return "-" if value is None else column.show(value)


def _layers(results: Results) -> str:
    table = results["workloads"].get("layers")
    if not table:
        return ""
    ways = dict.fromkeys(way for figures in table.values() for way in figures)
    rows = [
        [way, *(_us(f[way]) if f.get(way) is not None else "-" for f in table.values())]
        for way in ways
    ]
    heads = [f"{_name(key)}, us" for key in table]
    text = "The same two statements by each layer, p50, and the server's own account of them."
    parts = ["### Where acquire and release spend their time", text, _grid(["", *heads], rows)]
    return "\n\n".join(filter(None, [*parts, _failed(results, "layers")]))


def _grid(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write(text: str, path: Path) -> None:
    """Put the text between the marks of the file, or make the file of it."""
    if path.exists() and BEGIN in (old := path.read_text()):
        before, _, rest = old.partition(BEGIN)
        text = f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}"
    path.write_text(text)
