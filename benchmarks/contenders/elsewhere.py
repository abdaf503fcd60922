"""Locks that are no Django app: redis-py's, and tooz over each server that it has a driver for."""

from __future__ import annotations

import uuid
import warnings
from typing import Any
from urllib.parse import urlsplit

from .base import PATIENCE, TTL, Contender


class RedisPy(Contender):
    key = "redis-py"
    server = "redis"
    title = "redis-py `Lock`"
    waits = "polls every 100 ms"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        import redis

        self.client = redis.Redis.from_url(url)

    def acquire(self, name: str) -> Any:
        lock = self.client.lock(name, timeout=TTL)
        if not lock.acquire(blocking_timeout=PATIENCE):
            raise TimeoutError("the lock did not come free")
        return lock

    def release(self, name: str, held: Any) -> None:
        held.release()


class RedisPyDurable(RedisPy):
    key = "redis-py-always"
    server = "redis-always"


class Tooz(Contender):
    title = "tooz"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        # Not in several threads at once: it brings in eventlet, if that is installed, which puts
        # other modules in the place of `threading` and its like while it is imported.
        from tooz import coordination

        self.coordination = coordination

    def acquire(self, name: str) -> Any:
        lock = self._coordinator().get_lock(name.encode())
        if not lock.acquire(blocking=True):
            raise TimeoutError("the lock did not come free")
        return lock

    def release(self, name: str, held: Any) -> None:
        if not held.release():
            raise RuntimeError(f"{name} was not held")

    def prepare(self) -> None:
        self._coordinator()

    def _coordinator(self) -> Any:
        """This thread's own."""
        if not hasattr(self.local, "coordinator"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                made = self.coordination.get_coordinator(self._address(), uuid.uuid4().bytes)
            made.start()
            self.local.coordinator = made
        return self.local.coordinator

    def _address(self) -> str:
        return self.url


class ToozPostgreSQL(Tooz):
    key = "pg-tooz"
    server = "postgresql"
    waits = "in the server's queue, on a new connection"


class ToozMySQL(Tooz):
    key = "mariadb-tooz"
    server = "mariadb"
    waits = "tries again, with growing pauses"

    def _address(self) -> str:
        return urlsplit(self.url)._replace(scheme="mysql").geturl()


class ToozRedis(Tooz):
    key = "redis-tooz"
    server = "redis"
    waits = "redis-py's `Lock`"


CONTENDERS: list[type[Contender]] = [
    RedisPy,
    RedisPyDurable,
    ToozRedis,
    ToozPostgreSQL,
    ToozMySQL,
]
