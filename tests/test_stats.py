"""`Lock.stats()`: what a lock's row has counted, from the library's own ways to get and lose it.

How each statement counts is told in conformance/test_counters.py.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, connections, transaction
from django.test import TestCase

from distlock import Lease, Lock, LockLost, LockStats, lock
from distlock.backends import backend_for
from distlock.backends.base import Claim
from distlock.longholds import LongHolds
from distlock.testing import fake_clock, locks_disabled
from tests.support import eventually, in_thread, steal
from tests.test_async import run
from tests.waiters import Waiter, ended, in_line, running

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
PAGE = (Path(__file__).parent.parent / "docs" / "statistics.md").read_text()
servers = pytest.mark.vendor("postgresql", "mysql")


def stats(name: str = "x", **more: Any) -> LockStats:
    found = lock(name, **more).stats()
    assert found is not None
    return found


def test_a_name_that_was_never_taken_has_none() -> None:
    assert lock("x").stats() is None
    with lock("x"):
        assert lock("X").stats() is None


def test_what_nobody_waited_for_is_no_wait() -> None:
    for _ in range(5):
        with lock("x"):
            pass
        (lock("x").try_acquire() or pytest.fail("busy")).release()
    found = stats()
    assert (found.acquisitions, found.releases, found.waits, found.losses) == (10, 10, 0, 0)
    assert (found.total_waited, found.longest_waited, found.share_waited) == (0, 0, 0)
    assert 0 < found.mean_held <= found.longest_held <= found.total_held < 60
    assert found.last_lost_at is None


def test_one_statement_tells_it(django_assert_num_queries: Any) -> None:
    with lock("x"), django_assert_num_queries(1):
        stats()


def test_whoever_waits_counts_once_however_often_he_tries() -> None:
    with lock("x"):
        waiters = [Waiter("x"), Waiter("x")]
        assert eventually(lambda: in_line("x") == 2 or connection.vendor == "sqlite")
        time.sleep(0.3)
    for waiter in waiters:
        waiter.result()
    found = stats()
    assert (found.acquisitions, found.waits) == (3, 2)
    assert found.share_waited == 2 / 3
    assert 0.3 < found.longest_waited <= found.total_waited <= 2 * found.longest_waited
    assert found.mean_waited == found.total_waited / 3


def test_whoever_waited_in_vain_counts_nothing() -> None:
    with lock("x"):
        in_thread(lambda: lock("x", wait=0).try_acquire())
        waiter = Waiter("x", wait=0.2)
        assert eventually(lambda: waiter.ended)
    assert waiter.error is not None
    assert (stats().acquisitions, stats().waits) == (1, 0)


WAIT = """
import django
django.setup()
from distlock import lock, waiting
wait_for = waiting.wait_for
def said_first(*arguments):
    print("busy", flush=True)
    return wait_for(*arguments)
waiting.wait_for = said_first
with lock("x", wait=60):
    pass
"""


@servers
def test_waits_of_other_processes_are_counted() -> None:
    with running(WAIT) as first, running(WAIT) as second:
        with lock("x", ttl=60):
            for process in (first, second):
                assert process.stdout is not None
                assert process.stdout.readline() == "busy\n"
            time.sleep(0.2)
        ended(first)
        ended(second)
    found = stats()
    assert (found.acquisitions, found.waits, found.releases) == (3, 2, 3)
    assert found.longest_waited > 0.1


def test_a_loss_is_counted_by_the_next_grant() -> None:
    lease = lock("x").acquire()
    steal("x")
    with pytest.raises(LockLost):
        lease.release()
    found = stats()
    assert (found.acquisitions, found.losses, found.releases) == (2, 1, 0)
    assert found.last_lost_at is not None


def test_a_loss_is_counted_by_the_holders_own_late_release() -> None:
    with fake_clock() as clock:
        lease = lock("x", renew=False, ttl=30).acquire()
        clock.advance(31)
        assert stats().losses == 0
        with pytest.raises(LockLost):
            lease.release()
        found = stats()
        assert (found.acquisitions, found.losses, found.releases) == (1, 1, 0)
        assert found.total_held == 0
        with lock("x"):
            pass
    again = stats()
    assert (again.acquisitions, again.losses, again.releases) == (2, 1, 1)
    assert again.last_lost_at == found.last_lost_at


def test_a_loss_that_a_renewal_finds_is_counted_once() -> None:
    with fake_clock() as clock:
        lease = lock("x", renew=False, ttl=30).acquire()
        clock.advance(31)
        with pytest.raises(LockLost):
            lease.renew()
        with pytest.raises(LockLost):
            lease.release()
        with lock("x"):
            pass
    assert (stats().acquisitions, stats().losses) == (2, 1)


@servers
def test_a_loss_inside_a_transaction_is_counted_by_the_next_grant() -> None:
    def lose(clock: Any, lease: Lease) -> None:
        with transaction.atomic():
            clock.advance(31)
            lease.release()

    with fake_clock() as clock:
        with pytest.raises(LockLost):
            lose(clock, lock("x", renew=False, ttl=30).acquire())
        with lock("x"):
            pass
    assert (stats().acquisitions, stats().losses, stats().releases) == (2, 1, 1)


def test_a_release_that_was_rolled_back_counts_once() -> None:
    lease = lock("x").acquire()
    for _ in range(2):
        with transaction.atomic():
            lease.release()
            transaction.set_rollback(True)
        assert (stats().releases, stats().total_held) == (0, 0)
    lease.release()
    found = stats()
    assert (found.acquisitions, found.releases, found.losses) == (1, 1, 0)
    assert found.total_held == found.longest_held > 0


def test_a_transaction_that_commits_counts_its_hold_to_the_release() -> None:
    with transaction.atomic(), lock("x"):
        pass
    with lock("x", atomic=True):
        pass
    assert (stats().acquisitions, stats().releases, stats().losses) == (2, 2, 0)


def test_a_forced_release_is_a_loss() -> None:
    with pytest.raises(LockLost), lock("x") as lease:
        taken = backend_for(connection).force_release(connection, "x", 0, lease.token)
        assert taken is not None
    found = stats()
    assert (found.acquisitions, found.losses, found.releases) == (1, 1, 0)
    assert found.last_lost_at is not None


def test_inside_a_transaction_it_tells_the_same() -> None:
    with lock("x"):
        pass
    before = stats()
    with transaction.atomic():
        assert stats() == before


class InTestCase(TestCase):
    def test_it_works(self) -> None:
        assert lock("x").stats() is None
        with lock("x"):
            pass
        assert stats().releases == 1


def test_names_are_those_of_holder() -> None:
    with lock("stock:{product}"):  # outside a decorator a brace is a brace
        assert stats("stock:{product}").name == "stock:{product}"
        assert lock("stock:1").stats() is None
    for ask in (Lock.holder, Lock.stats):
        with pytest.raises(TypeError, match="can only be used as a decorator"):
            ask(lock(lambda arguments: "x"))


def test_aliases_are_apart() -> None:
    with lock("x", using="other"):
        pass
    assert lock("x").stats() is None
    assert stats(using="other").acquisitions == 1
    connections["other"].close()


def test_a_coroutine_awaits_it() -> None:
    async def main() -> None:
        assert await lock("x").astats() is None
        async with lock("x"):
            pass
        found = await lock("x").astats()
        assert found is not None
        assert (found.acquisitions, found.waits, found.releases) == (1, 0, 1)

    run(main)


def test_without_locks_there_is_nothing_to_tell() -> None:
    with locks_disabled(), lock("x"):
        assert lock("x").stats() is None


def test_stats_are_a_value() -> None:
    with lock("x"):
        pass
    found = stats()
    assert pickle.loads(pickle.dumps(found)) == found == stats()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.losses = 1  # type: ignore[misc]
    assert LockStats("x", 0, 0, 0, 0, None, 0, 0, 0, 0).mean_held == 0.0
    assert LockStats("x", 0, 0, 0, 0, None, 0, 0, 0, 0).mean_waited == 0.0
    assert LockStats("x", 0, 0, 0, 0, None, 0, 0, 0, 0).share_waited == 0.0


def test_many_threads_lose_no_count() -> None:
    def work() -> None:
        for _ in range(10):
            with lock("x", wait=None):
                pass

    threads = [threading.Thread(target=lambda: in_thread(work)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = stats()
    assert (found.acquisitions, found.releases, found.losses) == (40, 40, 0)
    assert found.waits <= 39
    assert (found.waits > 0) == (found.total_waited > 0)


# -- docs/statistics.md --------------------------------------------------------------------------


def test_the_page_has_every_attribute_and_no_other() -> None:
    rows = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row) if name != "LockStats"]
    fields = {field.name for field in dataclasses.fields(LockStats)}
    means = {name for name, value in vars(LockStats).items() if isinstance(value, property)}
    assert sorted(named) == sorted((fields | means) - {"name"})


def test_the_examples_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out == ""
    backend = backend_for(connection)
    for number in range(3):
        claim = Claim("import", 0, f"owner {number}", ttl=1000)
        assert eventually(lambda: backend.grant(connection, claim, 2.5))  # noqa: B023
    exec(block, {})
    assert capsys.readouterr().out == "3 of 3 had to wait, 2.5 s on average\n"


def test_the_line_of_the_page_is_the_one_that_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = re.findall(r"^WARNING distlock (.*)$", PAGE, re.MULTILINE)

    class Term:
        alias, name, slot, first, spent = "default", "import", 0, 30.0, 27.113 / 30

    term: Any = Term()
    holds = LongHolds()
    for _ in range(3):
        holds.note(term)
    assert line in caplog.messages
