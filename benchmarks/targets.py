"""What distlock must reach, each a ratio or a count of one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .figures import ratio
from .workloads.contended import PROCESSES

Results = Mapping[str, Any]
Workloads = Mapping[str, Mapping[str, Mapping[str, float | None]]]


@dataclass(frozen=True)
class Target:
    text: str
    sign: str
    limit: float
    measured: Callable[[Workloads], float | None]
    large: bool = False
    """Whether it is about numbers that a quick run does not have."""
    exempt: str = ""
    """Why it need not keep the limit."""

    def reached(self, value: float) -> bool:
        """Whether a measured value keeps the limit."""
        return {
            "<": value < self.limit,
            "<=": value <= self.limit,
            ">=": value >= self.limit,
        }[self.sign]


def of(workload: str, key: str, field: str) -> Callable[[Workloads], float | None]:
    """One figure of one contender."""
    return lambda workloads: workloads.get(workload, {}).get(key, {}).get(field)


def between(workload: str, key: str, other: str, field: str) -> Callable[..., float | None]:
    """One contender's figure as a multiple of another's."""
    mine, theirs = of(workload, key, field), of(workload, other, field)
    return lambda workloads: ratio(mine(workloads), theirs(workloads))


def pair(key: str, other: str) -> Callable[..., float | None]:
    return between("latency", key, other, "p50")


def per_process(key: str, field: str) -> Callable[..., float | None]:
    return lambda workloads: ratio(of("waiting", key, field)(workloads), PROCESSES)


def gap(size: int) -> Callable[..., float | None]:
    return between("hand-over", "pg-distlock", "pg-raw-advisory", f"p50@{size}")


TARGETS = [
    Target("acquire + release / raw lease", "<=", 1.0, pair("pg-distlock", "pg-raw-lease")),
    Target(
        "acquire + release / redis-py, `appendfsync always`",
        "<",
        1.0,
        pair("pg-distlock", "redis-py-always"),
    ),
    Target("`crash_safe=False` / django-pglock", "<", 1.0, pair("pg-distlock-fast", "pg-pglock")),
    Target(
        "`atomic=True` / the transaction without a lock",
        "<=",
        1.5,
        pair("pg-distlock-atomic", "pg-transaction"),
    ),
    Target(
        "MariaDB: acquire + release / raw lease",
        "<=",
        1.25,
        pair("mariadb-distlock", "mariadb-raw-lease"),
    ),
    Target("hand-written lock / distlock", ">=", 5.0, pair("pg-handwritten", "pg-distlock")),
    Target("django-db-mutex / distlock", ">=", 5.0, pair("pg-db-mutex", "pg-distlock")),
    Target("statements / s while 32 wait", "<=", 0.0, of("waiting", "pg-distlock", "statements")),
    Target(
        "`fair=True`: statements / s while 32 wait",
        "<=",
        0.0,
        of("waiting", "pg-distlock-fair", "statements"),
        exempt="exempt: each process says every second that its waiters live",
    ),
    Target(
        "PostgreSQL without LISTEN: messages / s and process while 32 wait",
        "<=",
        4.0,
        per_process("pg-distlock-deaf", "messages"),
    ),
    Target(
        "MariaDB: statements / s and process while 32 wait",
        "<=",
        4.0,
        per_process("mariadb-distlock", "statements"),
    ),
    Target("hand-over, 8 workers: gap p50 / raw advisory lock", "<=", 3.0, gap(8)),
    Target("hand-over, 32 workers: gap p50 / raw advisory lock", "<=", 5.0, gap(32)),
    Target(
        "hand-over, 32 workers: statements each",
        "<=",
        8.0,
        of("hand-over", "pg-distlock", "statements@32"),
    ),
    Target(
        "hand-over, 32 workers: Jain index",
        ">=",
        0.95,
        of("hand-over", "pg-distlock", "jain@32"),
    ),
    Target(
        "hand-over, 32 workers: longest wait / mean",
        "<=",
        3.0,
        of("hand-over", "pg-distlock", "spread@32"),
    ),
    Target(
        "churn: HOT share of all updates", ">=", 1.0, of("churn", "pg-distlock", "hot"), large=True
    ),
    Target(
        "churn: HOT share of renewals",
        ">=",
        1.0,
        of("churn", "pg-distlock", "hot_renewals"),
        large=True,
    ),
    Target(
        "churn: table bytes, end / first tenth",
        "<=",
        1.0,
        of("churn", "pg-distlock", "table_growth"),
        large=True,
    ),
    Target(
        "latency, full / empty table", "<=", 1.2, of("million", "pg-distlock", "ratio"), large=True
    ),
    Target("purge: seconds", "<", 60.0, of("purge", "pg-distlock", "seconds"), large=True),
    Target(
        "purge: p99 of concurrent acquires / before",
        "<",
        3.0,
        of("purge", "pg-distlock", "ratio"),
        large=True,
    ),
    Target(
        "renewals: statements per round, as the server counts",
        "<=",
        20.0,
        of("renewals", "pg-distlock", "on_server"),
        large=True,
    ),
    Target(
        "renewals: seconds per round",
        "<=",
        1.0,
        of("renewals", "pg-distlock", "seconds"),
        large=True,
    ),
]
