"""The contract of a contender: the same few verbs for all of them."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from tests.databases import settings_for

from ..environment import configure, migrate

T = TypeVar("T")

TTL = 60
"""Seconds of a lease, where a contender has leases: no run holds one so long."""
ALONE = ("latency", "throughput")
CONTENDED = ("hand-over", "waiting")
PATIENCE = 100.0
"""Seconds that a waiter waits before the run has failed."""


class Contender(ABC):
    """One way to lock. An object serves all threads of a process."""

    key: ClassVar[str]
    server: ClassVar[str]
    title: ClassVar[str]
    waits: ClassVar[str] = ""
    """How a waiter learns that the lock is free."""
    workloads: ClassVar[tuple[str, ...]] = (*ALONE, *CONTENDED)
    """What it takes part in."""
    ours: ClassVar[bool] = False
    table: ClassVar[str] = ""
    """Where its locks are rows."""
    fill: ClassVar[str] = ""
    """The statement that adds `{rows}` rows that end at `{end}`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.local = threading.local()

    def prepare(self) -> None:  # noqa: B027
        """Make what it needs on the server; called once. Raises what says that it cannot run."""

    @abstractmethod
    def acquire(self, name: str) -> Any:
        """Return what `release` needs, once the lock is held; wait for it up to PATIENCE."""

    @abstractmethod
    def release(self, name: str, held: Any) -> None: ...

    def close(self) -> None:  # noqa: B027
        """Close what this thread has opened, as far as that does not close with the thread."""

    def cycle(self, name: str) -> None:
        """What is timed where nobody competes."""
        self.release(name, self.acquire(name))


class DjangoContender(Contender):
    apps: ClassVar[tuple[str, ...]] = ("benchmarks",)

    def __init__(self, url: str) -> None:
        super().__init__(url)
        configure(url, self.apps)

    def prepare(self) -> None:
        migrate()

    def close(self) -> None:
        from django.db import connections

        connections.close_all()


def polled(attempt: Callable[[], T | None], interval: float) -> T:
    """What `attempt` gives at last, tried at a fixed interval. Raises TimeoutError."""
    end = time.monotonic() + PATIENCE
    while (result := attempt()) is None:
        if time.monotonic() > end:
            raise TimeoutError("the lock did not come free")
        time.sleep(interval)
    return result


def server_at(url: str) -> dict[str, Any]:
    """Host, port, user, password and database of a URL, as drivers call them."""
    at = settings_for(url)
    fields = ("HOST", "PORT", "USER", "PASSWORD")
    return {field.lower(): at[field] for field in fields} | {"database": at["NAME"]}
