"""Three beats whose clocks are half a minute apart, killed and paused; every tick runs once.

DISTLOCK_TORTURE=long: 500 ticks instead of 40.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from typing import IO, Any

import pytest

from distlock import lock
from tests.contrib.beats import EVERY, QUEUE, TASK
from tests.contrib.celery_app import noted, record
from tests.contrib.conftest import ROOT, WITH_DATABASE_BEAT, Worker, environment
from tests.machine import die_with_parent

LONG = os.environ.get("DISTLOCK_TORTURE") == "long"
TICKS = 500 if LONG else 40
LIMIT = 900.0 if LONG else 90.0
TTL = 2.0
OFFSETS = (-30.0, 0.0, 30.0)
SCHEDULER = "distlock.contrib.celery:SingleBeatScheduler"
DATABASE_SCHEDULER = "distlock.contrib.celery:SingleDatabaseBeatScheduler"

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.vendor("postgresql", "mysql"), pytest.mark.timeout(LIMIT + 60)]


class Beat:
    """A beat process and its log; started again after each end."""

    def __init__(self, offset: float, name: str, scheduler: str, chance: float, ttl: float) -> None:
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        conf = {
            "distlock_beat_name": name,
            "distlock_beat_ttl": ttl,
            "distlock_beat_catch_up": 600,
            "result_expires": None,
        }
        self.environ = {**environment(), "BEATS_CONF": json.dumps(conf)}
        self.command = f"-m tests.contrib.beats {offset} {chance} beat -l INFO --pidfile="
        self.command += f" -S {scheduler}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *self.command.split()],
            cwd=ROOT,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def send(self, *numbers: int) -> None:
        for number in numbers:
            if self.process.poll() is None:
                os.kill(self.process.pid, number)

    def end(self, number: int) -> None:
        self.send(number)
        deadline = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < deadline:
            self.send(signal.SIGCONT)  # it may stop itself on its way
            time.sleep(0.05)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(20)
            pytest.fail(f"It did not end by signal {number}:\n{self.said()[-3000:]}")

    def revive(self) -> None:
        """Start it again, or wake it up."""
        if self.process.poll() is None:
            self.send(signal.SIGCONT)
        else:
            self.start()

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")


class Beats:
    """Some beats of one schedule, and who of them leads."""

    def __init__(
        self,
        name: str,
        scheduler: str,
        offsets: Sequence[float] = OFFSETS,
        chance: float = 0,
        ttl: float = TTL,
    ) -> None:
        self.name = name
        self.all = [Beat(offset, name, scheduler, chance, ttl) for offset in offsets]

    def leader(self) -> Beat | None:
        holder = lock(self.name).holder()
        return next((one for one in self.all if holder and one.process.pid == holder.pid), None)

    def wait_for_leader(self, limit: float, other_than: int = 0) -> float:
        """Return after how long somebody leads."""
        begun = time.monotonic()
        while (found := self.leader()) is None or found.process.pid == other_than:
            if time.monotonic() - begun > limit:
                pytest.fail(f"nobody leads after {limit} s:\n{self.said()}")
            time.sleep(0.02)
        return time.monotonic() - begun

    def said(self) -> str:
        return "\n".join(f"--- {one.command}\n{one.said()[-3000:]}" for one in self.all)

    def stop(self) -> None:
        for one in self.all:
            one.send(signal.SIGTERM, signal.SIGCONT)
        for one in self.all:
            one.end(signal.SIGTERM)

    def close(self) -> None:
        self.stop()
        for one in self.all:
            one.log.close()


@pytest.fixture
def beats(transactional_db: None, redis_url: str) -> Iterator[Callable[..., Beats]]:
    """Start beats; they are ended after the test."""
    with record() as connection:
        connection.flushdb()
    with contextlib.ExitStack() as stack:

        def start(*arguments: Any, **more: Any) -> Beats:
            made = Beats(*arguments, **more)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture(scope="module")
def ticker(start_worker: Callable[..., Worker]) -> Worker:
    """A worker for nothing but ticks."""
    return start_worker("ticker", "-P", "threads", "-c", "3", "-Q", QUEUE)


# -- what befalls a beat -------------------------------------------------------------------------


def kill(one: Beat) -> None:
    one.end(signal.SIGKILL)


def stop(one: Beat) -> None:
    one.end(signal.SIGTERM)


def pause(one: Beat) -> None:
    """Longer than its lease lasts: another one leads meanwhile, and it wakes up as a leader."""
    one.send(signal.SIGSTOP)
    time.sleep(TTL * 1.6)


def blink(one: Beat) -> None:
    one.send(signal.SIGSTOP)
    time.sleep(0.3)


def check(entries: list[dict[str, Any]]) -> str:
    """Fail unless each tick ran once, and none before it was due; return the figures."""
    runs = [entry for entry in entries if entry["event"] == "tick"]
    messages = sum(entry["event"] == "message" for entry in entries)
    times = Counter(run["tick"] for run in runs)
    assert {tick: count for tick, count in times.items() if count > 1} == {}
    due = sorted(datetime.fromisoformat(tick).timestamp() for tick in times)
    steps = [round((after - before) * 1000) for before, after in pairwise(due)]
    lost = {at: step for at, step in enumerate(steps) if step != EVERY * 1000}
    assert lost == {}, "ticks are missing, or out of step"
    late = [run["at"] - datetime.fromisoformat(run["tick"]).timestamp() for run in runs]
    assert min(late) > -0.05, "a tick ran before it was due"
    return f"{len(runs)} ticks, {messages - len(runs)} twins dropped, latest {max(late):.1f} s late"


def ticks(entries: list[dict[str, Any]]) -> int:
    return sum(entry["event"] == "tick" for entry in entries)


def harm(those: Beats, chance: random.Random, enough: int) -> Counter[str]:
    """Let things befall the beats until there were enough ticks; return what did."""
    deadline = time.monotonic() + LIMIT
    done: Counter[str] = Counter()
    while ticks(noted()) < enough:
        assert time.monotonic() < deadline, those.said()
        what = chance.choice([kill, kill, pause, pause, stop, blink])
        leader = those.leader() if chance.random() < 0.8 else None
        what(leader or chance.choice(those.all))
        done[what.__name__] += 1
        for one in those.all:
            one.revive()
        time.sleep(chance.uniform(0.1, 3.0))
    return done


@pytest.mark.parametrize(
    "scheduler", [SCHEDULER, *([DATABASE_SCHEDULER] if WITH_DATABASE_BEAT else [])]
)
def test_every_tick_runs_once_whatever_befalls_the_beats(
    beats: Callable[..., Beats], ticker: Worker, scheduler: str
) -> None:
    if scheduler == DATABASE_SCHEDULER:
        from django_celery_beat.models import IntervalSchedule, PeriodicTask

        half = IntervalSchedule.objects.create(every=EVERY * 1_000_000, period="microseconds")
        PeriodicTask.objects.create(name="half", task=TASK, queue=QUEUE, interval=half)
    those = beats("torture", scheduler, chance=0.04)
    those.wait_for_leader(30)
    done = harm(those, random.Random(1), TICKS if LONG or scheduler == SCHEDULER else TICKS // 2)
    those.stop()
    time.sleep(1)
    logger.info("%s; %s", check(noted()), dict(done))


def leader_of_two(those: Beats) -> Beat:
    """The leader, once the other one has started, too, and waits."""
    those.wait_for_leader(30)
    deadline = time.monotonic() + 30
    while not all("beat: Starting" in one.said() for one in those.all):
        assert time.monotonic() < deadline, those.said()
        time.sleep(0.1)
    time.sleep(2)
    leader = those.leader()
    assert leader is not None
    return leader


def test_a_killed_leader_is_replaced(beats: Callable[..., Beats], ticker: Worker) -> None:
    those = beats("killed", SCHEDULER, (0.0, 30.0))
    one = leader_of_two(those)
    one.end(signal.SIGKILL)
    assert those.wait_for_leader(20, one.process.pid) < TTL + 1
    those.stop()
    check(noted())


def test_a_leader_that_is_stopped_hands_over_at_once(
    beats: Callable[..., Beats], ticker: Worker
) -> None:
    those = beats("stopped", SCHEDULER, (0.0, 30.0), ttl=20)
    one = leader_of_two(those)
    one.send(signal.SIGTERM)
    assert those.wait_for_leader(20, one.process.pid) < 5
    one.process.wait(20)
    those.stop()
    check(noted())
