"""Lock packages for Django, called as their documentation shows."""

from __future__ import annotations

from typing import Any

from .base import ALONE, CONTENDED, PATIENCE, Contender, DjangoContender, polled

POLL = 0.05


class PgLock(DjangoContender):
    key = "pg-pglock"
    server = "postgresql"
    title = "django-pglock (advisory lock)"
    waits = "in the server's queue"
    apps = ("pgactivity", "pglock")

    def acquire(self, name: str) -> Any:
        import pglock

        lock = pglock.advisory(name)
        lock.acquire()
        return lock

    def release(self, name: str, held: Any) -> None:
        held.release()


class DbMutex(DjangoContender):
    key = "pg-db-mutex"
    server = "postgresql"
    title = "django-db-mutex"
    waits = "cannot; tried every 50 ms here"
    apps = ("db_mutex",)
    workloads = (*ALONE, *CONTENDED, "churn", "million")
    table = "db_mutex_dbmutex"
    fill = (
        "INSERT INTO db_mutex_dbmutex (lock_id, creation_time) "
        "SELECT 'filler:' || i, clock_timestamp() FROM generate_series(1, {rows}) i"
    )

    def acquire(self, name: str) -> Any:
        return polled(lambda: self._attempt(name), POLL)

    def _attempt(self, name: str) -> Any:
        from db_mutex.db_mutex import db_mutex
        from db_mutex.exceptions import DBMutexError

        mutex = db_mutex(name)
        try:
            mutex.start()
        except DBMutexError:
            return None
        return mutex

    def release(self, name: str, held: Any) -> None:
        held.stop()


class DjangoMySQL(DjangoContender):
    key = "mariadb-django-mysql"
    server = "mariadb"
    title = "django-mysql (`GET_LOCK`)"
    waits = "in the server's queue"
    apps = ("django_mysql",)

    def acquire(self, name: str) -> Any:
        from django_mysql.locks import Lock

        return Lock(name, acquire_timeout=PATIENCE).acquire()

    def release(self, name: str, held: Any) -> None:
        held.release()


CONTENDERS: list[type[Contender]] = [PgLock, DbMutex, DjangoMySQL]
