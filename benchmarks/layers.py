"""Where the time of distlock's acquire and release goes on PostgreSQL.

The two statements are caught as they are sent, each by its plan, and replayed below: by Django's
cursor alone, by the bare driver, without a plan, and without the wait for the disk. Between two
layers stands what the upper one adds. All are timed cycle by cycle in turn, in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

from django.db import connection

from distlock.backends.plans import THRESHOLD
from distlock.backends.postgresql import GRANT, GRANT_ASYNC, RELEASE_ASYNC
from tests.databases import connect, query

from .contenders.base import Contender
from .contenders.raw import RawLease
from .figures import percentile
from .servers import COUNTING
from .tasks import timed
from .watching import Watch

Pair = list[tuple[str, Any]]
TABLE = "distlock_distributedlock"
ACCOUNTED = 200
PLANNED = {each.execute: each for each in (GRANT, GRANT_ASYNC, RELEASE_ASYNC)}


def measure(contender: Contender, name: str, cycles: int) -> dict[str, float]:
    """Seconds of the median cycle of each layer, and the server's own account of the statements.

    Raises `RuntimeError` if acquire and release are not two statements that can be replayed.
    """
    timed(contender.cycle, [name], 10 * THRESHOLD)
    with Watch() as watch:
        contender.cycle(name)
    pair = [(statement.sql, statement.parameters) for statement in watch.seen]
    if len(pair) != 2 or not all(sql in PLANNED for sql, _ in pair):
        raise RuntimeError(f"acquire and release are not two planned statements: {pair}")
    whole = [(PLANNED[sql].sql, parameters) for sql, parameters in pair]
    with ExitStack() as stack:
        raw, hasty = (_session(stack, contender.url, pair) for _ in range(2))
        hasty.execute("SET synchronous_commit = off")
        lease = RawLease(contender.url)
        lease.prepare()
        ways: dict[str, Callable[[str], None]] = {
            "distlock": contender.cycle,
            "Django's cursor": lambda _: _by_django(pair),
            "psycopg": lambda _: _by_psycopg(raw, pair),
            "psycopg, not planned before": lambda _: _by_psycopg(raw, whole),
            "psycopg, no fsync": lambda _: _by_psycopg(hasty, pair),
            "raw lease": lease.cycle,
            "two SELECT 1, psycopg, prepared": lambda _: _nothing(raw),
        }
        spent: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(cycles):
            for way, cycle in ways.items():
                spent[way] += timed(cycle, [name], 1)
        lease.local.connection.close()
        account = _by_the_server(contender.url, raw, pair, whole)
    return {way: percentile(times, 0.5) for way, times in spent.items()} | account


def _session(stack: ExitStack, url: str, pair: Pair) -> Any:
    """A session of the bare driver that binds values as Django does, and has the plans."""
    from psycopg import ClientCursor

    session: Any = stack.enter_context(closing(connect(url)))
    session.cursor_factory = ClientCursor
    for sql, _ in pair:
        session.execute(PLANNED[sql].prepare)
    return session


def _by_django(pair: Pair) -> None:
    for sql, parameters in pair:
        with connection.cursor() as cursor:
            cursor.execute(sql, parameters)
            _check(cursor)


def _by_psycopg(session: Any, pair: Pair) -> None:
    for sql, parameters in pair:
        _check(session.execute(sql, parameters))


def _check(cursor: Any) -> None:
    if cursor.rowcount != 1:
        raise RuntimeError("a replayed statement did not do what it did at first")


def _nothing(session: Any) -> None:
    for _ in range(2):
        session.execute("SELECT 1", prepare=True).fetchone()


def _by_the_server(url: str, session: Any, pair: Pair, whole: Pair) -> dict[str, float]:
    """Seconds of planning and of executing one pair, as the server has it; without the commits.

    Apart from what is timed: to count plans slows each statement that is planned.
    """
    query(url, "SELECT pg_stat_statements_reset()", name=COUNTING)
    session.execute("SET pg_stat_statements.track_planning = on")
    for _ in range(ACCOUNTED):
        _by_psycopg(session, pair)
        _by_psycopg(session, whole)
    row = query(
        url,
        "SELECT sum(total_plan_time) / sum(plans), sum(total_exec_time) / sum(calls) "
        f"FROM pg_stat_statements WHERE query LIKE '%{TABLE}%' AND query LIKE '%UPDATE%'",
        name=COUNTING,
    )
    assert row is not None
    planned, executed = (2 * float(milliseconds) / 1000 for milliseconds in row)
    return {"planning on the server": planned, "execution on the server": executed}
