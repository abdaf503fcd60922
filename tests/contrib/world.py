"""Beats in one process: over a broker in memory, and by a clock that only a test moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import pytest
from celery import Celery
from django.db import connection, connections

from distlock import lock
from distlock.backends import backend_for
from distlock.backends.base import Pinned
from distlock.contrib import _ticks, beat
from distlock.contrib.beat import Leader, SingleBeatScheduler
from distlock.keeper import keeper
from tests.support import eventually

START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=timezone.utc)
NAME = "celery-beat:unit"
Sent = tuple[str, str, str]


class Dies(BaseException):
    """What a kill looks like from inside: nothing is handled."""


class World:
    """The clock, the broker, and what was sent to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.seconds = START.timestamp()
        self.app = Celery("unit", broker="memory://", set_as_current=False)
        self.app.conf.update(result_expires=None, timezone="Europe/Berlin")
        monkeypatch.setattr(_ticks, "clock", lambda: self.seconds)
        monkeypatch.setattr(beat, "jitter", lambda delay: delay)
        monkeypatch.setattr(_ticks.DatabaseClock, "measure", lambda self: None)
        self.kind: type[Leader] = SingleBeatScheduler

    def every(self, **schedules: Any) -> None:
        """Set the schedule: seconds, or one of Celery's."""
        self.app.conf.beat_schedule = {
            name: {"task": f"do.{name}", "schedule": every} for name, every in schedules.items()
        }

    def beat(self) -> Leader:
        return self.kind(app=self.app)

    def run(self, one: Leader, seconds: float) -> None:
        """Let a beat pass as often as it wants, for a while."""
        end = self.seconds + seconds
        for _ in range(10_000):
            delay = one.tick()
            if self.seconds + delay > end:
                break
            self.seconds += delay
        else:
            pytest.fail("it never comes to rest")
        self.seconds = max(self.seconds, end)

    def sent(self) -> list[Sent]:
        """What was sent since the last time: entry, tick (since START) and id."""
        found = []
        with self.app.connection_for_read() as broker, broker.SimpleQueue("celery") as queue:
            while queue.qsize():
                message = queue.get_nowait()
                message.ack()
                at = datetime.fromisoformat(message.headers["distlock_tick"]) - START
                entry = message.headers["distlock_entry"]
                assert message.headers["task"] == f"do.{entry}"
                found.append((entry, f"{at.total_seconds():.9g}", message.headers["id"]))
        return found

    def ticks(self) -> list[str]:
        """The same, in the order of the ticks."""
        sent = sorted((float(at), entry) for entry, at, _ in self.sent())
        return [f"{entry} {at:g}" for at, entry in sent]

    def take_away(self) -> None:
        """Take the lock from whoever holds it, as its expiry would from one who is paused."""
        holder = lock(NAME).holder()
        assert holder is not None
        backend = backend_for(connection)

        def taken() -> bool:
            try:
                return backend.force_release(connection, NAME, 0, holder.token) is not None
            except Pinned:  # the keeper renews it just now
                return False

        assert eventually(taken)

    def pause_while_it_sends(self, one: Leader, meanwhile: Callable[[], object]) -> None:
        """Let a leader lose its lock, and others go on, before its next message is sent."""
        apply_async = one.apply_async

        def late(entry: Any, **how: Any) -> Any:
            self.take_away()
            meanwhile()
            return apply_async(entry, **how)

        self._monkeypatch.setattr(one, "apply_async", late)


def pause_keeper() -> None:
    """Let the keeper find out nothing more about the leases of now."""
    for term in list(keeper.rounds("default")._terms):
        keeper.drop(term)


@contextmanager
def elsewhere() -> Iterator[Callable[..., Any]]:
    """Run functions in another thread, which holds none of this one's locks."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(30)
        pool.submit(connections.close_all).result(30)
