"""The example: its races, its page, and how the demo counts. On SQLite, whatever is tested."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from example_project import counting
from example_project.schedules import INTERVAL, MIN_HOLD, Aligned, tick_now

pytestmark = pytest.mark.vendor("sqlite")
ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 100
RACE = ("manage.py", "race", "--processes", "3", "--sales", "5")

PAGE = """
import django; django.setup()
from django.conf import settings; settings.ALLOWED_HOSTS = ["testserver"]
from django.core.management import call_command; call_command("migrate", verbosity=0)
from django.test import Client
from distlock import lock
from example_project.shop.models import Charge, Order, Payment, Product
bicycle = Product.objects.create(name="Bicycle", stock=1)
payment = Payment.objects.create(customer="Ada", euros=49)
client = Client(enforce_csrf_checks=False)
def post(path):
    return client.post(path, follow=True).content.decode()
assert "Bicycle" in client.get("/").content.decode()
assert client.get(f"/buy/{bicycle.pk}/").status_code == 405
assert "is yours" in post(f"/buy/{bicycle.pk}/")
assert "Sold out" in post(f"/buy/{bicycle.pk}/")
assert "Captured." in post(f"/capture/{payment.pk}/")
assert "before" in post(f"/capture/{payment.pk}/")
assert (Order.objects.count(), Charge.objects.count()) == (1, 1)
how = {"Idempotency-Key": "one", "Api-Key": "demo"}
def pay(euros, **headers):
    form = {"customer": "Grace", "euros": euros}
    return client.post("/api/payments/", form, headers={**how, **headers})
first, again = pay(7), pay(7)
assert (first.status_code, again.status_code, pay(8).status_code) == (201, 201, 422)
assert first.json() == again.json() and again.headers["Idempotency-Replayed"] == "true"
assert pay(7, **{"Api-Key": "stolen"}).status_code == 403
assert Payment.objects.filter(customer="Grace").count() == 1
from example_project.shop.tasks import delivered
for _ in range(2):
    delivered.apply(("event-1", bicycle.pk, 5)).get()
bicycle.refresh_from_db()
assert bicycle.stock == 5
with lock("somebody", note="<script>"):
    page = client.get("/").content.decode()
assert "somebody" in page and "MainThread" in page and "<script>" not in page
"""


def example(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the example, on a database of its own."""
    environ = {
        "DJANGO_SETTINGS_MODULE": "example_project.settings",
        "DATABASE_URL": f"sqlite:///{folder / 'shop.sqlite3'}",
        "BROKER_URL": f"sqla+sqlite:///{folder / 'broker.sqlite3'}",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def test_the_race_is_lost_without_the_lock(tmp_path: Path) -> None:
    done = example(tmp_path, *RACE, "--without-lock")
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("WRONG") == 4


def test_the_race_is_won_with_the_lock(tmp_path: Path) -> None:
    done = example(tmp_path, *RACE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    assert done.stdout.count("right") == 5


def test_the_page(tmp_path: Path) -> None:
    done = example(tmp_path, "-c", PAGE)
    assert done.returncode == 0, done.stderr


UNDER_ASGI = """
import asyncio, threading, time, urllib.request
from contextlib import suppress
import django; django.setup()
from django.conf import settings
settings.MIDDLEWARE.remove("django.middleware.csrf.CsrfViewMiddleware")
settings.LOGGING_CONFIG = None
from django.core.management import call_command; call_command("migrate", verbosity=0)
from django.db import connection
from example_project.shop.models import Product
import uvicorn
from example_project.asgi import application
bicycle = Product.objects.create(name="Bicycle", stock=20)
server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="warning"))
thread = threading.Thread(target=server.run, daemon=True)
thread.start()
while not server.started:
    time.sleep(0.01)
port = server.servers[0].sockets[0].getsockname()[1]
def post(path):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=b"")
    opener.open(request, timeout=60).close()
paths = [f"/restock/{bicycle.pk}/"] * 25 + [f"/buy/{bicycle.pk}/"] * 10
threads = [threading.Thread(target=post, args=(path,)) for path in paths]
[one.start() for one in threads]
[one.join() for one in threads]
bicycle.refresh_from_db()
assert bicycle.stock == 20 + 25 - 10, bicycle.stock
server.should_exit = True
thread.join(20)
assert not thread.is_alive()
"""


def test_coroutines_and_threads_of_an_asgi_server_share_a_lock(tmp_path: Path) -> None:
    done = example(tmp_path, "-c", UNDER_ASGI)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_migrations_are_complete(tmp_path: Path) -> None:
    done = example(tmp_path, "manage.py", "makemigrations", "--check", "--dry-run")
    assert done.returncode == 0, done.stdout


# -- the schedule --------------------------------------------------------------------------------


def at(moment: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: moment)


def ago(moment: float) -> datetime:
    return datetime.fromtimestamp(moment, timezone.utc)


@pytest.mark.parametrize(
    ("last", "now", "due", "following"),
    [
        (1000.5, 1001.0, False, 1.0),
        (1000.5, 1001.9, False, 0.1),
        (1000.5, 1002.0, True, 2.0),
        (1000.5, 1002.3, True, 1.7),
        (1002.3, 1002.4, False, 1.6),
        (1000.5, 1009.0, True, 1.0),
    ],
)
def test_it_is_due_at_the_multiples(
    monkeypatch: pytest.MonkeyPatch, last: float, now: float, due: bool, following: float
) -> None:
    at(now, monkeypatch)
    state = Aligned(2).is_due(ago(last))
    assert state.is_due is due
    assert state.next == pytest.approx(following)


def test_beats_that_are_a_little_early_or_late_name_the_same_tick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = set()
    for off in (-0.4, -0.01, 0.0, 0.02, 0.4):
        at(1000 * INTERVAL + off * INTERVAL, monkeypatch)
        names.add(tick_now())
    assert names == {1000}
    assert 0 < MIN_HOLD < INTERVAL


# -- counting ------------------------------------------------------------------------------------


def ran(job: str, started: float, ended: float | None, *, skipped: bool = False) -> Any:
    return SimpleNamespace(job=job, started=started, ended=ended, skipped=skipped, worker="worker1")


def tick(number: int, report: list[Any], skipped: int = 1) -> counting.Tick:
    control = [ran("control", number, number + 0.3), ran("control", number, number + 0.3)]
    late = [ran("report", number, number, skipped=True)] * skipped
    return counting.Tick(number, report, late, control)


def test_all_is_well_if_every_tick_ran_once() -> None:
    ticks = [tick(n, [ran("report", n, n + 0.5)]) for n in (1, 2, 3)]
    text, good = counting.summary(ticks)
    assert good
    assert "3 runs, 3 duplicates skipped, 0 overlaps, 0 ticks ran twice, 0 ticks lost" in text
    assert "6 runs, 3 overlaps, 3 ticks ran twice" in text
    assert all(one.complete for one in ticks)


@pytest.mark.parametrize(
    "ticks",
    [
        [],
        [tick(1, [])],
        [tick(1, [ran("report", 1, 1.2), ran("report", 1.5, 1.6)])],
        [tick(1, [ran("report", 1, 2.5)]), tick(2, [ran("report", 2, 2.6)])],
        [tick(1, [ran("report", 1, None)]), tick(2, [ran("report", 2, 2.6)])],
    ],
    ids=["nothing", "lost", "twice", "overlap", "never ended"],
)
def test_what_is_not_well(ticks: list[counting.Tick]) -> None:
    assert not counting.summary(ticks)[1]
