"""The private servers that are measured, durable as installed, and how their work is counted."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from tests.databases import Unavailable, connect, rows
from tests.private_server import DATABASES
from tests.servers import MariaDB, PostgreSQL

MEASURED, COUNTING = DATABASES  # counting from another database does not count itself
PRELOADED = "pg_stat_statements"


class CountingPostgreSQL(PostgreSQL):
    """PostgreSQL with pg_stat_statements, which counts every statement."""

    def command(self) -> list[str]:
        return [*super().command(), "-c", f"shared_preload_libraries={PRELOADED}"]


class Stand(ABC):
    """One running server: where it is, and what it can say about itself."""

    key: ClassVar[str]
    title: str
    url: str

    def __init__(self, stack: contextlib.ExitStack) -> None:
        """Start the server; the stack stops it. Raises ``Unavailable``."""
        self.stack = stack
        self.start()

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def statements(self) -> float | None:
        """How many statements the server has run so far; None if it does not count."""

    @abstractmethod
    def sessions(self) -> int:
        """How many clients are connected to the measured database."""

    def wait_empty(self) -> None:
        """Return when the clients of an earlier measurement have left. Raises TimeoutError."""
        deadline = time.monotonic() + 20
        while left := self.sessions():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{left} sessions of an earlier measurement do not end")
            time.sleep(0.05)


class Database(Stand):
    @property
    def other(self) -> str:
        """A second database on the server, whose statements and sessions are not counted."""
        return self.url.removesuffix(MEASURED) + COUNTING

    def run(self, sql: str, database: str = MEASURED) -> list[tuple[Any, ...]]:
        """Run a statement in the measured database, or in the other."""
        return rows(self.url, sql, name=database)

    @abstractmethod
    def size(self, table: str) -> dict[str, float | None]:
        """Bytes of a table and its indexes."""

    @abstractmethod
    def settle(self, table: str, database: str) -> None:
        """Let the server do now what it would do for a table that was filled, later."""


class PostgreSQLStand(Database):
    key = "postgresql"

    def start(self) -> None:
        try:
            server = self.stack.enter_context(CountingPostgreSQL(durable=True))
            self.counts = True
        except Unavailable:  # without the contrib modules it does not start so
            server = self.stack.enter_context(PostgreSQL(durable=True))
            self.counts = False
        self.url, self.title = server.url, server.version
        self.counter = self.stack.enter_context(contextlib.closing(connect(self.url, COUNTING)))
        if self.counts:
            self.counter.execute(f"CREATE EXTENSION {PRELOADED}")
        else:
            self.title += " without pg_stat_statements: statements are not counted"

    def _counter(self, sql: str) -> Any:
        return self.counter.execute(sql).fetchone()[0]

    def statements(self) -> float | None:
        if not self.counts:
            return None
        of = f"(SELECT oid FROM pg_database WHERE datname = '{MEASURED}')"
        return float(self._counter(f"SELECT sum(calls) FROM {PRELOADED} WHERE dbid = {of}") or 0)

    def sessions(self) -> int:
        return int(
            self._counter(f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{MEASURED}'")
        )

    def size(self, table: str) -> dict[str, float | None]:
        sql = f"SELECT pg_relation_size('{table}'), pg_indexes_size('{table}')"
        heap, indexes = self.run(sql)[0]
        return {"table": heap, "indexes": indexes}

    def updates(self, table: str) -> tuple[int, int]:
        """Updates so far, and how many of them were HOT. Ended sessions have reported theirs."""
        time.sleep(1.2)  # a session that has just ended
        sql = f"SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = '{table}'"
        updates, hot = self.run(sql)[0]
        return int(updates), int(hot)

    def settle(self, table: str, database: str) -> None:
        self.run(f"VACUUM ANALYZE {table}", database)
        self.run("CHECKPOINT", database)


class MariaDBStand(Database):
    key = "mariadb"

    def start(self) -> None:
        server = self.stack.enter_context(MariaDB(durable=True))
        self.url, self.title = server.url, server.version
        self.counter = self.stack.enter_context(contextlib.closing(connect(self.url, COUNTING)))

    def _counter(self, sql: str) -> list[Any]:
        with contextlib.closing(self.counter.cursor()) as cursor:
            cursor.execute(sql)
            return list(cursor.fetchone())

    def statements(self) -> float:
        own = self._counter("SHOW SESSION STATUS LIKE 'Questions'")[1]
        return float(self._counter("SHOW GLOBAL STATUS LIKE 'Questions'")[1]) - float(own) - 1

    def sessions(self) -> int:
        return int(
            self._counter(
                f"SELECT count(*) FROM information_schema.processlist WHERE db = '{MEASURED}'"
            )[0]
        )

    def size(self, table: str) -> dict[str, float | None]:
        self.run(f"ANALYZE TABLE {table}")
        sql = (
            "SELECT data_length, index_length FROM information_schema.tables "
            f"WHERE table_schema = '{MEASURED}' AND table_name = '{table}'"
        )
        data, indexes = self.run(sql)[0]
        return {"table": data, "indexes": indexes}

    def settle(self, table: str, database: str) -> None:
        self.run(f"ANALYZE TABLE {table}", database)


class RedisStand(Stand):
    """Redis as Debian ships it: it writes a snapshot now and then, and no log."""

    key = "redis"
    note = "snapshots, no AOF"
    settings: ClassVar[dict[str, str]] = {"save": "3600 1 300 100 60 10000", "appendonly": "no"}

    def start(self) -> None:
        try:
            import redis

            from tests.contrib.redis_server import Redis
        except ImportError as error:
            raise Unavailable(f"no driver ({error}): install redis") from error
        server = self.stack.enter_context(Redis())
        self.url = server.url
        self.client = redis.Redis.from_url(self.url)
        self.stack.callback(self.client.close)
        for name, value in self.settings.items():
            self.client.config_set(name, value)
        self._check()
        self.title = f"Redis {self._info('server')['redis_version']} ({self.note})"

    def _info(self, section: str) -> dict[str, Any]:
        return dict(self.client.info(section))

    def _check(self) -> None:
        """Wait until the log is as it was asked for."""
        wanted = int(self.settings["appendonly"] == "yes")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            now = self._info("persistence")
            if now["aof_enabled"] == wanted and not now["aof_rewrite_in_progress"]:
                return
            time.sleep(0.05)
        raise Unavailable("Redis does not take the setting of its log")

    def statements(self) -> float:
        """Commands, those inside of scripts included."""
        calls = self._info("commandstats")
        return float(sum(each["calls"] for name, each in calls.items() if name != "cmdstat_info"))

    def sessions(self) -> int:
        return int(self._info("clients")["connected_clients"]) - 1


class DurableRedisStand(RedisStand):
    """Redis that has a command on disk before it answers, as a database has its commits."""

    key = "redis-always"
    note = "appendfsync always"
    settings: ClassVar[dict[str, str]] = {
        "save": "3600 1 300 100 60 10000",
        "appendfsync": "always",
        "appendonly": "yes",
    }


STANDS: dict[str, type[Stand]] = {
    stand.key: stand for stand in (PostgreSQLStand, MariaDBStand, RedisStand, DurableRedisStand)
}


@contextlib.contextmanager
def started(keys: list[str]) -> Iterator[tuple[dict[str, Stand], dict[str, str]]]:
    """The servers that run, and for each that does not the reason."""
    running: dict[str, Stand] = {}
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for key in keys:
            try:
                running[key] = STANDS[key](stack)
            except Unavailable as reason:  # noqa: PERF203
                missing[key] = " ".join(str(reason).split())
        yield running, missing
