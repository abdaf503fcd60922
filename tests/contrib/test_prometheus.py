"""What distlock.contrib.prometheus counts, in one process and in several."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from django.db import OperationalError, connection, transaction
from prometheus_client import REGISTRY

from distlock import LockBusy, LockLost, lock, once, signals
from distlock.contrib import prometheus
from distlock.contrib.prometheus import _receivers
from distlock.keeper import keeper
from distlock.places import Place
from tests.support import eventually, in_thread, other_session, run_async, steal

pytestmark = pytest.mark.django_db(transaction=True)
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    """Metrics for one test; the others run without."""
    prometheus.install()
    prometheus.install()  # a second call does nothing
    yield
    for signal in map(signals.__dict__.get, signals.__all__):
        signal.disconnect(dispatch_uid=_receivers.UID)  # type: ignore[union-attr]


Since = Callable[..., float]


@pytest.fixture
def since() -> Since:
    """How much a metric has grown since the test began."""
    before = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
    }

    def grown(name: str, **labels: str) -> float:
        now = REGISTRY.get_sample_value(f"distlock_{name}", labels) or 0
        return now - before.get((f"distlock_{name}", *sorted(labels.items())), 0)

    return grown


def held(group: str) -> float | None:
    return REGISTRY.get_sample_value("distlock_leases_held", {"group": group})


def test_a_grant_a_release_and_what_is_between(since: Since) -> None:
    with lock("paid:1"):
        assert held("paid") == 1
        with lock("paid:2"):
            assert held("paid") == 2
        time.sleep(0.1)
    assert held("paid") == 0
    for name in ("acquire_attempts_total", "grants_total", "releases_total", "hold_seconds_count"):
        assert since(name, group="paid") == 2, name
    assert since("wait_seconds_count", group="paid", outcome="granted") == 2
    assert 0.1 <= since("hold_seconds_sum", group="paid") < 30
    for name in ("busy_total", "losses_total", "drops_total", "acquire_failures_total"):
        assert REGISTRY.get_sample_value(f"distlock_{name}", {"group": "paid"}) == 0, name


def test_nesting_and_a_release_in_a_transaction_count_once(since: Since) -> None:
    with transaction.atomic():
        with lock("nested:1", reentrant=True), lock("nested:1", reentrant=True):
            pass
        assert since("releases_total", group="nested") == 0
    assert since("grants_total", group="nested") == 1
    assert since("releases_total", group="nested") == 1
    assert held("nested") == 0


def test_who_gives_up_is_counted_with_the_wait(since: Since) -> None:
    with lock("full:1"):
        with pytest.raises(LockBusy):
            in_thread(lock("full:1", wait=0.2).acquire)
        assert in_thread(lock("full:1").try_acquire) is None
        assert in_thread(lambda: run_async(lock("full:1").atry_acquire)) is None
    assert since("busy_total", group="full") == 3
    assert since("acquire_attempts_total", group="full") == 4
    assert since("wait_seconds_count", group="full", outcome="busy") == 3
    assert 0.2 <= since("wait_seconds_sum", group="full", outcome="busy") < 30


def test_the_wait_for_a_grant_is_measured(since: Since) -> None:
    lease = lock("slow:1").acquire()
    threading.Timer(0.3, lambda: in_thread(lease.release)).start()
    in_thread(lambda: lock("slow:1", wait=30).acquire().release())
    assert 0.2 <= since("wait_seconds_sum", group="slow", outcome="granted") < 30


@pytest.mark.vendor("postgresql", "mysql")
def test_a_loss_ends_the_hold(since: Since) -> None:
    with pytest.raises(LockLost), lock("gone:1", ttl=30):
        steal("gone:1")
    assert since("grants_total", group="gone") == 2  # the thief is of this process
    assert eventually(lambda: since("losses_total", group="gone") == 1, within=30)
    assert eventually(lambda: held("gone") == 1, within=30)
    assert since("releases_total", group="gone") == 0


def test_a_lease_that_is_collected_is_not_held_any_more(since: Since) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        lock("forgot:1", ttl=0.9).acquire()
        gc.collect()
    assert eventually(lambda: since("drops_total", group="forgot") == 1, within=30)
    assert held("forgot") == 0


def test_an_acquire_without_an_answer_is_neither_a_grant_nor_busy(
    since: Since, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: Any) -> None:
        raise OperationalError("gone")

    monkeypatch.setattr(Place, "grant", gone)
    with pytest.raises(OperationalError):
        lock("broken:1").acquire()
    with pytest.raises(OperationalError):
        in_thread(lambda: run_async(lock("broken:1").aacquire))
    assert since("acquire_failures_total", group="broken") == 2
    assert since("acquire_attempts_total", group="broken") == 2


def test_a_task_that_is_cancelled_as_it_waits_is_a_failure(since: Since) -> None:
    async def cancelled() -> None:
        task = asyncio.ensure_future(lock("cancelled:1", wait=30).aacquire())
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with lock("cancelled:1"):
        in_thread(lambda: run_async(cancelled))
    assert since("acquire_failures_total", group="cancelled") == 1
    assert since("grants_total", group="cancelled") == 1


def test_renewals_are_counted_by_database(since: Since, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: Any) -> Any:
        raise OperationalError("gone")

    with lock("renewed", ttl=30) as one, lock("renewed:2", ttl=30):
        one.renew()
        assert since("renewals_total", database="default") == 1
        make_due()
        assert eventually(lambda: since("renewals_total", database="default") == 3, within=30)
        with monkeypatch.context() as patch:
            patch.setattr("distlock.keeper.backend_for", gone)
            make_due()
            assert eventually(
                lambda: since("renewal_failures_total", database="default") >= 2, within=30
            )


@pytest.mark.vendor("postgresql", "mysql")
def test_renewals_that_meet_a_locked_row_are_counted_apart(since: Since) -> None:
    with lock("pinned:1", ttl=60), other_session() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT 1 FROM distlock_distributedlock WHERE name = 'pinned:1' FOR UPDATE")
        make_due()
        assert eventually(
            lambda: since("renewals_locked_total", database="default") >= 1, within=30
        )
        cursor.execute("ROLLBACK")
    assert since("renewal_failures_total", database="default") == 0


def test_an_end_that_is_told_before_its_beginning_leaves_nothing_held(since: Since) -> None:
    def lose(lease: Any, **kwargs: Any) -> None:
        lease._term.lose("at once")
        assert eventually(lambda: since("losses_total", group="early") == 1, within=30)

    signals.lock_acquired.disconnect(dispatch_uid=_receivers.UID)
    signals.lock_acquired.connect(lose)
    try:
        prometheus.install()  # it hears of the grant last
        with pytest.raises(LockLost), lock("early:1") as lease:
            pass
    finally:
        signals.lock_acquired.disconnect(lose)
    assert lease.lost  # and somebody has it still: what is collected is not held anyway
    assert since("grants_total", group="early") == since("losses_total", group="early") == 1
    assert held("early") == 0


def make_due() -> None:
    rounds = keeper.rounds("default")
    for term in rounds._kept():
        term.next_renewal = 0.0
    rounds._thread.wake()


def test_jobs_that_ran_and_duplicates(since: Since) -> None:
    ran: list[int] = []

    @once("billed:{n}")
    def job(n: int) -> None:
        ran.append(n)

    for _ in range(3):
        job(1)
    asyncio_job = once("billed:{n}", atomic=False)(acoroutine)
    in_thread(lambda: run_async(lambda: asyncio_job(2)))
    in_thread(lambda: run_async(lambda: asyncio_job(2)))
    assert ran == [1]
    assert since("jobs_total", group="once:billed", outcome="done") == 2
    assert since("jobs_total", group="once:billed", outcome="duplicate") == 3


async def acoroutine(n: int) -> int:
    return n


def test_without_a_receiver_no_thread_is_started_for_renewals() -> None:
    signals.leases_renewed.disconnect(dispatch_uid=_receivers.UID)
    started: list[object] = []
    before = threading.Thread.start

    def start(self: threading.Thread) -> None:
        started.append(self.name)
        before(self)

    with lock("quiet", ttl=30) as lease, pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        first = lease.expires_at
        make_due()
        assert eventually(lambda: lease.expires_at > first, within=30)
    assert "distlock-signal" not in started


# -- several processes ---------------------------------------------------------------------------

SETTINGS = """
from tests.settings import *
INSTALLED_APPS = [*INSTALLED_APPS, "distlock.contrib.prometheus", *{more}]
ROOT_URLCONF = {urls!r}
ALLOWED_HOSTS = ["*"]
DATABASES["default"]["NAME"] = {name!r}
"""

FORKS = """
import os, sys
import django
django.setup()
from django.db import connections
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from distlock import lock

def held():
    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    return registry.get_sample_value("distlock_leases_held", {"group": "forked"})

mine = lock("forked:1").acquire()
assert held() == 1
connections.close_all()
read, write = os.pipe()
child = os.fork()
if not child:
    several = "PROMETHEUS_MULTIPROC_DIR" in os.environ
    assert held() == (1 if several else 0), held()
    with lock("forked:2"):
        assert held() == (2 if several else 1), held()
    lock("forked:3").acquire()._released = True
    assert held() == (2 if several else 1), held()
    os.write(write, b"done")
    os._exit(0)  # with a lease, as if killed
os.close(write)
assert os.read(read, 4) == b"done"
assert os.waitpid(child, 0)[1] == 0
mark_process_dead(child, os.environ.get("PROMETHEUS_MULTIPROC_DIR", "."))
assert held() == 1, held()
mine.release()
assert held() == 0, held()
print("all is well")
"""

SERVED = """
import django
django.setup()
from django.test import Client
from distlock import lock
with lock("served:1"):
    page = Client().get("/metrics").content.decode()
assert 'distlock_leases_held{group="served"} 1.0' in page, page
assert 'distlock_grants_total{group="served"} 1.0' in page, page
assert "python_info" in page, page
print("all is well")
"""


def run(tmp_path: Path, script: str, more: tuple[str, ...] = (), urls: str = "tests.urls") -> str:
    """Run a script in a process of its own, on the same database; return what it prints."""
    name = connection.settings_dict["NAME"]
    settings = SETTINGS.format(more=more, urls=urls, name=str(name))
    (tmp_path / "own_settings.py").write_text(settings)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "own_settings", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_forked_process_holds_nothing_of_its_parents(tmp_path: Path) -> None:
    assert "all is well" in run(tmp_path, FORKS)


def test_the_leases_of_several_processes_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numbers").mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "numbers"))
    assert "all is well" in run(tmp_path, FORKS)


@pytest.mark.skipif(
    find_spec("django_prometheus") is None, reason="django-prometheus allows no such new Django"
)
def test_the_page_of_django_prometheus_has_them(tmp_path: Path) -> None:
    (tmp_path / "own_urls.py").write_text(
        "from django.urls import include, path\n"
        "urlpatterns = [path('', include('django_prometheus.urls'))]\n"
    )
    assert "all is well" in run(tmp_path, SERVED, ("django_prometheus",), "own_urls")
