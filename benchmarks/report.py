"""The tables: what was measured, as markdown, which a terminal shows well enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .contenders import CONTENDERS, REFERENCES
from .figures import ratio
from .targets import TARGETS, Results
from .workloads.contended import CROWDS

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


def _hand_over(size: str) -> list[Column]:
    return [
        Column("gap p50 ms", f"p50@{size}", _ms),
        Column("gap p99 ms", f"p99@{size}", _ms),
        Column("statements each", f"statements@{size}", _number),
        Column("Jain", f"jain@{size}", _two),
        Column("longest wait ms", f"longest@{size}", _ms),
        Column("longest / mean", f"spread@{size}", _number),
        Column("per second", f"rate@{size}", _number),
        Column("violations", f"violations@{size}", _number),
    ]


SECTIONS: list[tuple[str, str, list[Column]]] = [
    (
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
    (
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
        (
            "hand-over",
            f"Hand-over, {size} workers in {processes} processes, 2 ms held",
            _hand_over(crowd),
        )
        for crowd, (size, processes) in CROWDS.items()
    ],
    (
        "waiting",
        "32 wait in 4 processes for a lock that is held",
        [
            Column("statements / s", "statements", _number),
            Column("connections", "sessions", _number),
            Column("client cores", "cpu", _two),
        ],
    ),
    (
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
    (
        "million",
        "Many rows of others in the table",
        [
            Column("rows", "rows", _number),
            Column("empty: p50 us", "empty", _us),
            Column("full: p50 us", "full", _us),
            Column("full / empty", "ratio", _two),
        ],
    ),
    (
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
    (
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
]


def markdown(results: Results) -> str:
    """Everything that was measured."""
    parts = [_about(results), _targets(results)]
    parts += [_section(results, workload, title, columns) for workload, title, columns in SECTIONS]
    parts.append(_layers(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(results: Results) -> str:
    lines = [f"- {key}: {text}" for key, text in results["about"].items()]
    lines += [f"- not run: {CONTENDERS[k].title} ({k}): {why}" for k, why in _missing(results)]
    lines += [f"- failed: {failure}" for failure in results["failures"]]
    return "\n".join(lines)


def _missing(results: Results) -> list[tuple[str, str]]:
    return [(key, why) for key, why in results["missing"].items() if key in CONTENDERS]


def _targets(results: Results) -> str:
    rows = []
    for target in TARGETS:
        value = target.measured(results["workloads"])
        if value is None:
            shown, verdict = "-", "not measured"
        else:
            shown = f"{value:.4g}"
            verdict = "reached" if target.reached(value) else "**not reached**"
            if target.large and results["about"].get("run") == "quick":
                verdict = "a quick run is too small to tell"
        rows.append([target.text, f"{target.sign} {target.limit:g}", shown, verdict])
    return "### Targets\n\n" + _grid(["target", "limit", "measured", ""], rows)


def _section(results: Results, workload: str, title: str, columns: list[Column]) -> str:
    table = results["workloads"].get(workload)
    if not table:
        return ""
    shown = [c for c in columns if any(row.get(c.field) is not None for row in table.values())]
    rows = [
        [CONTENDERS[key].title, _where(key), *(_cell(table, key, column) for column in shown)]
        for key in CONTENDERS
        if key in table
    ]
    return f"### {title}\n\n" + _grid(["", "on", *(column.title for column in shown)], rows)


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
    heads = [f"{CONTENDERS[key].title} us" for key in table]
    text = "The same two statements by each layer, p50, and the server's own account of them."
    return f"### Where acquire and release spend their time\n\n{text}\n\n" + _grid(
        ["", *heads], rows
    )


def _grid(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write(text: str, path: Path) -> None:
    """Put the text between the marks of the file, or make the file of it."""
    if path.exists() and BEGIN in (old := path.read_text()):
        before, _, rest = old.partition(BEGIN)
        text = f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}"
    path.write_text(text)
