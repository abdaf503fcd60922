"""distlock, as a user calls it, and what its transactions are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar
from zlib import crc32

from tests.databases import Unavailable

from .base import ALONE, CONTENDED, PATIENCE, TTL, Contender, DjangoContender

if TYPE_CHECKING:
    from distlock import Lease

APPS = ("distlock", "benchmarks")
PROFILED = ("layers", "steps")
ROWS = 4096  # so many that two names seldom share one


class Distlock(DjangoContender):
    apps = APPS
    ours = True
    workloads = (*ALONE, *CONTENDED, "churn", "million", "purge", "renewals")
    table = "distlock_distributedlock"
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, url: str) -> None:
        super().__init__(url)
        from distlock import lock

        self.lock = lock

    def prepare(self) -> None:
        if unknown := self.options.keys() - inspect.signature(self.lock).parameters.keys():
            raise Unavailable(f"this version of distlock has no {', '.join(sorted(unknown))}")
        super().prepare()

    def acquire(self, name: str) -> Lease:
        return self.lock(name, ttl=TTL, wait=PATIENCE, **self.options).acquire()

    def release(self, name: str, held: Lease) -> None:
        held.release()


class PostgreSQLDistlock(Distlock):
    key = "pg-distlock"
    server = "postgresql"
    title = "**distlock**"
    workloads = (*Distlock.workloads, *PROFILED, "gaps")
    fill = (
        "INSERT INTO distlock_distributedlock (name, owner, fencing_token, acquired_at, "
        "expires_at, ttl) SELECT 'filler:' || i, 'filler', i, clock_timestamp(), {end}, 60000000 "
        "FROM generate_series(1, {rows}) i"
    )


class NotCrashSafe(PostgreSQLDistlock):
    key = "pg-distlock-fast"
    title = "**distlock**, `crash_safe=False`"
    workloads = (*ALONE, *CONTENDED, *PROFILED, "gaps")
    options = {"crash_safe": False}


class Fair(PostgreSQLDistlock):
    key = "pg-distlock-fair"
    title = "**distlock**, `fair=True`"
    workloads = (*ALONE, *CONTENDED)
    options = {"fair": True}


class Deaf(PostgreSQLDistlock):
    """As behind a pooler: messages do not come through."""

    key = "pg-distlock-deaf"
    title = "**distlock**, which cannot LISTEN"
    workloads = ("waiting",)

    def __init__(self, url: str) -> None:
        super().__init__(url)
        from distlock.backends.postgresql import PostgreSQL

        PostgreSQL.listen = lambda _self, _connection: False  # type: ignore[method-assign]


class MariaDBDistlock(Distlock):
    key = "mariadb-distlock"
    server = "mariadb"
    title = "**distlock**"
    workloads = (*Distlock.workloads, *PROFILED)
    fill = (
        "INSERT INTO distlock_distributedlock (name, owner, fencing_token, acquired_at, "
        "expires_at, ttl) SELECT CONCAT('filler:', seq), 'filler', seq, UTC_TIMESTAMP(6), {end}, "
        "60000000 FROM seq_1_to_{rows}"
    )


class Work(DjangoContender):
    """A transaction that changes one row through the ORM; here without any lock."""

    apps = APPS
    workloads = (*ALONE, "steps")

    def prepare(self) -> None:
        super().prepare()
        from ..models import Stock

        Stock.objects.bulk_create(
            [Stock(pk=pk) for pk in range(1, ROWS + 1)], ignore_conflicts=True
        )

    def transaction(self, name: str) -> AbstractContextManager[Any]:
        from django.db.transaction import atomic

        return atomic()

    def cycle(self, name: str) -> None:
        from django.db.models import F

        from ..models import Stock

        with self.transaction(name):
            Stock.objects.filter(pk=1 + crc32(name.encode()) % ROWS).update(
                quantity=F("quantity") + 1
            )

    def acquire(self, name: str) -> None:
        raise NotImplementedError

    def release(self, name: str, held: None) -> None:
        raise NotImplementedError


class AtomicWork(Work):
    """The same under a lock."""

    ours = True

    def transaction(self, name: str) -> AbstractContextManager[Any]:
        from distlock import lock

        return lock(name, atomic=True, ttl=TTL)


class PostgreSQLWork(Work):
    key = "pg-transaction"
    server = "postgresql"
    title = "one UPDATE in a transaction, no lock"


class PostgreSQLAtomicWork(AtomicWork):
    key = "pg-distlock-atomic"
    server = "postgresql"
    title = "the same in **distlock**, `atomic=True`"


class MariaDBWork(Work):
    key = "mariadb-transaction"
    server = "mariadb"
    title = "one UPDATE in a transaction, no lock"


class MariaDBAtomicWork(AtomicWork):
    key = "mariadb-distlock-atomic"
    server = "mariadb"
    title = "the same in **distlock**, `atomic=True`"


CONTENDERS: list[type[Contender]] = [
    PostgreSQLDistlock,
    NotCrashSafe,
    Fair,
    Deaf,
    PostgreSQLWork,
    PostgreSQLAtomicWork,
    MariaDBDistlock,
    MariaDBWork,
    MariaDBAtomicWork,
]
