"""Every task id that is published, followed through workers that are killed at random.

DISTLOCK_TORTURE=long: 400 ids instead of 30, for each broker.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from tests.app.models import Counter
from tests.contrib import faulty
from tests.contrib.celery_app import ANSWERS, noted
from tests.contrib.conftest import Broker, Worker
from tests.support import becomes_free, eventually
from tests.torture.conftest import LEVEL

LONG = LEVEL == "long"
VENDORS = ("postgresql", "mysql") if LONG else ("postgresql",)
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.vendor(*VENDORS)]

IDS, KEYS = 400 if LONG else 30, 3
QUEUE = "followed"
LIMIT = 60.0


class Nemesis:
    """Kills the child that is at work, and sometimes a whole worker, which is replaced.

    Not on Redis: kombu takes a message off the list before it notes that it has it, so that one
    which a worker dies with in between is lost, whatever its task does.
    """

    def __init__(self, start: Callable[[], Worker], *, workers: bool) -> None:
        self.start = start
        self.workers = workers
        self.worker = start()
        self.children_killed = self.workers_killed = 0
        self.killed: set[int] = set()

    def strike(self) -> None:
        if self.workers and random.random() < 0.12:
            self.replace_worker()
            return
        begun = [entry["pid"] for entry in noted() if entry["event"] == "start"]
        if begun and begun[-1] not in self.killed:
            self.killed.add(begun[-1])
            with contextlib.suppress(ProcessLookupError):  # it went with its worker
                os.kill(begun[-1], signal.SIGKILL)
                self.children_killed += 1

    def replace_worker(self) -> None:
        self.worker.kill()
        self.workers_killed += 1
        self.worker = self.start()


@pytest.fixture
def nemesis(broker: Broker, start_worker: Callable[..., Worker]) -> Iterator[Nemesis]:
    options = ("-P", "prefork", "-c", "3", "-Q", QUEUE)
    workers = not broker.url.startswith("redis")
    made = Nemesis(lambda: start_worker(QUEUE, *options, broker=broker.url), workers=workers)
    yield made
    made.worker.kill()


def counted() -> dict[str, int]:
    """How often the work of each id was done, as its transactions have left it."""
    return dict(Counter.objects.values_list("name", "value"))


def skipped() -> dict[str, str]:
    """The ids that were told to be skipped, and in favour of whom."""
    told = [entry for entry in noted(ANSWERS) if (entry["result"] or {}).get("distlock")]
    return {
        entry["id"]: entry["result"]["holder"]
        for entry in told
        if entry["result"]["distlock"] == "skipped"
    }


def lost(ids: list[str]) -> set[str]:
    """The ids that have neither run nor were skipped, up to now."""
    return set(ids) - counted().keys() - skipped().keys()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("broker", ["rabbitmq", "impatient"], indirect=True)
def test_no_published_id_is_lost_and_none_runs_twice(nemesis: Nemesis) -> None:
    """Each has run, or was skipped for the sake of another one, and that one has run."""
    ids = []
    for at in range(IDS):
        seconds = random.uniform(0.05, 0.4)
        how = {"dies": "after" if random.random() < 0.25 else ""}
        sent = faulty.followed.apply_async((at % KEYS, seconds), how, queue=QUEUE)
        ids.append(sent.id)
        time.sleep(random.uniform(0, 0.4))
        if at % 2:
            nemesis.strike()
    if nemesis.workers:
        nemesis.replace_worker()  # and with it what Celery itself forgets when a child is killed
    assert eventually(lambda: not lost(ids), LIMIT), lost(ids)
    for key in range(KEYS):
        assert becomes_free(f"followed:{key}", 10)
    done, left_out = counted(), skipped()
    assert set(done.values()) == {1}
    assert set(done) <= set(ids)
    for one, holder in left_out.items():
        winner = holder.partition("[")[2].partition("]")[0]
        assert one in done or (winner != one and winner in done), (one, holder)
    assert nemesis.children_killed
    assert bool(nemesis.workers_killed) is nemesis.workers
    assert len(done) < IDS, "nobody was skipped"
