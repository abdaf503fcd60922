"""Where the time of distlock's acquire and release goes, layer by layer.

The two statements are caught as they are sent, and replayed below: by Django's cursor alone, by the
bare driver, and without the wait for the disk. Between two layers stands what the upper one adds.
All take turns in one process, a block of cycles each, so that each finds its session at work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from typing import Any, NamedTuple

from django.db import connection

from distlock.backends.mysql import RELEASE_ALONE, UPSERT
from distlock.backends.postgresql import GRANT, GRANT_ASYNC, RELEASE_ASYNC
from tests.databases import connect, query

from .contenders.base import Contender
from .contenders.raw import RawLease, RawMariaDBLease
from .figures import percentile
from .servers import COUNTING
from .tasks import WARM, timed
from .watching import Watch

Pair = list[tuple[str, Any]]
TABLE = "distlock_distributedlock"
ACCOUNTED = 200
BLOCK = 50
SETTLED = 5
"""Cycles of a block that do not count."""
PLANNED = {
    each.execute: each for each in (GRANT, GRANT_ASYNC, RELEASE_ASYNC, UPSERT, RELEASE_ALONE)
}


class Way(NamedTuple):
    """A way to do the same, by name, and what must be set while it is timed."""

    cycle: Callable[[str], None]
    setting: Callable[[], AbstractContextManager[None]] = nullcontext


def measure(contender: Contender, name: str, cycles: int) -> dict[str, float]:
    """Seconds of the median cycle of each layer, and the server's own account of the statements.

    Raises `RuntimeError` if acquire and release are not two planned statements.
    """
    timed(contender.cycle, [name], WARM)
    with Watch() as watch:
        contender.cycle(name)
    pair = [(statement.sql, statement.parameters) for statement in watch.seen]
    if len(pair) != 2 or not all(sql in PLANNED for sql, _ in pair):
        raise RuntimeError(f"acquire and release are not two planned statements: {pair}")
    with ExitStack() as stack:
        replay = REPLAYS[contender.server](contender.url, pair, stack)
        ways = {"distlock": Way(contender.cycle), **replay.ways()}
        spent: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(cycles // BLOCK):
            for way, (cycle, setting) in ways.items():
                with setting():
                    spent[way] += timed(cycle, [name], SETTLED + BLOCK)[SETTLED:]
        account = replay.account()
    return {way: percentile(times, 0.5) for way, times in spent.items()} | account


class Replay(ABC):
    """The two statements, and the ways to send them."""

    def __init__(self, url: str, pair: Pair, stack: ExitStack) -> None:
        self._url, self._pair, self._stack = url, pair, stack
        self._unplanned = [(PLANNED[sql].sql, parameters) for sql, parameters in pair]

    @abstractmethod
    def ways(self) -> dict[str, Way]:
        """The layers below distlock, from the top."""

    def account(self) -> dict[str, float]:
        """Seconds of the two statements as the server has them."""
        return {}

    def _session(self) -> Any:
        """A session of the bare driver."""
        return self._stack.enter_context(closing(connect(self._url)))

    def _by_django(self, _name: str) -> None:
        for sql, parameters in self._pair:
            with connection.cursor() as cursor:
                cursor.execute(sql, parameters)
                _check(cursor)


class OnPostgreSQL(Replay):
    def __init__(self, url: str, pair: Pair, stack: ExitStack) -> None:
        super().__init__(url, pair, stack)
        self._raw = self._planning_session()

    def ways(self) -> dict[str, Way]:
        hasty, lease = self._planning_session(), RawLease(self._url)
        hasty.execute("SET synchronous_commit = off")
        lease.prepare()
        self._stack.callback(lease.connection.close)
        return {
            "Django's cursor": Way(self._by_django),
            "the driver": Way(lambda _: _send(self._raw, self._pair)),
            "the driver, not planned before": Way(lambda _: _send(self._raw, self._unplanned)),
            "the driver, no wait for the disk": Way(lambda _: _send(hasty, self._pair)),
            "raw lease": Way(lease.cycle),
            "the driver, two SELECT 1": Way(lambda _: _send(self._raw, NOTHING)),
        }

    def account(self) -> dict[str, float]:
        """Planning and executing one pair, without the commits.

        Apart from what is timed: to count plans slows each statement that is planned.
        """
        query(self._url, "SELECT pg_stat_statements_reset()", name=COUNTING)
        self._raw.execute("SET pg_stat_statements.track_planning = on")
        for _ in range(ACCOUNTED):
            _send(self._raw, self._pair)
            _send(self._raw, self._unplanned)
        row = query(
            self._url,
            "SELECT sum(total_plan_time) / sum(plans), sum(total_exec_time) / sum(calls) "
            f"FROM pg_stat_statements WHERE query LIKE '%{TABLE}%' AND query LIKE '%UPDATE%'",
            name=COUNTING,
        )
        assert row is not None
        planned, executed = (2 * float(milliseconds) / 1000 for milliseconds in row)
        return {"planning, where it is not planned before": planned, "execution": executed}

    def _planning_session(self) -> Any:
        """A session that binds values as Django does, and has the plans."""
        from psycopg import ClientCursor

        session = self._session()
        session.cursor_factory = ClientCursor
        for sql, _ in self._pair:
            session.execute(PLANNED[sql].prepare)
        return session


class OnMariaDB(Replay):
    def ways(self) -> dict[str, Way]:
        cursor = self._stack.enter_context(closing(self._session().cursor()))
        for sql, _ in self._pair:
            cursor.execute(PLANNED[sql].prepare)
        lease = RawMariaDBLease(self._url)
        lease.prepare()
        self._stack.callback(lease.local.connection.close)
        return {
            "Django's cursor": Way(self._by_django),
            "the driver": Way(lambda _: _send_by(cursor, self._pair)),
            "the driver, not planned before": Way(lambda _: _send_by(cursor, self._unplanned)),
            "the driver, no wait for the disk": Way(
                lambda _: _send_by(cursor, self._pair), self._hasty
            ),
            "raw lease": Way(lease.cycle),
            "the driver, two SELECT 1": Way(lambda _: _send_by(cursor, NOTHING)),
        }

    @contextmanager
    def _hasty(self) -> Iterator[None]:
        setting = "innodb_flush_log_at_trx_commit"
        query(self._url, f"SET GLOBAL {setting} = 2")
        try:
            yield
        finally:
            query(self._url, f"SET GLOBAL {setting} = 1")


REPLAYS: dict[str, type[Replay]] = {"postgresql": OnPostgreSQL, "mariadb": OnMariaDB}
NOTHING: Pair = [("SELECT 1", None), ("SELECT 1", None)]


def _send(session: Any, pair: Pair) -> None:
    for sql, parameters in pair:
        _check(session.execute(sql, parameters))


def _send_by(cursor: Any, pair: Pair) -> None:
    for sql, parameters in pair:
        cursor.execute(sql, parameters)
        _check(cursor)


def _check(cursor: Any) -> None:
    if cursor.rowcount != 1:
        raise RuntimeError("a replayed statement has found no row, or none of ours")
