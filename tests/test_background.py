"""The threads that send signals: few, and no receiver that hangs or fails stops the others."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from django.db import connection, connections

from distlock import background
from distlock.background import FEW, MOST, SIGNAL, Messengers, soon
from tests.support import eventually
from tests.test_leases import in_fork
from tests.torture.conftest import ROOT, environment

pytestmark = pytest.mark.django_db(transaction=True)


def senders() -> int:
    """How many threads send signals, or watch those that do."""
    return [thread.name for thread in threading.enumerate()].count(SIGNAL)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    assert eventually(lambda: not senders())
    yield
    assert eventually(lambda: not senders())


def test_all_are_called_by_a_few_threads() -> None:
    called: list[int] = []
    seen: set[int] = set()

    def call(number: int) -> None:
        seen.add(senders())
        time.sleep(0.001)
        called.append(number)

    messengers = Messengers()
    for number in range(1000):
        messengers.send(lambda number=number: call(number))
    assert eventually(lambda: len(called) == 1000, 30)
    assert sorted(called) == list(range(1000))
    assert max(seen) <= FEW + 1


def test_those_that_wait_for_one_that_comes_later_get_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    came, ended = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        assert came.wait(30)
        ended.release()

    messengers = Messengers()
    for _ in range(FEW + 1):
        messengers.send(wait)
    messengers.send(came.set)
    for _ in range(FEW + 1):
        assert ended.acquire(timeout=30)
    assert not messengers._waiting
    assert "signal_delayed threads=8 waiting=2" in caplog.text


def test_however_many_hang_there_are_not_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "STUCK", 0.01)
    go_on, called = threading.Event(), threading.Semaphore(0)

    def hang() -> None:
        assert go_on.wait(60)
        called.release()

    messengers = Messengers()
    for _ in range(MOST + 10):
        messengers.send(hang)
    assert eventually(lambda: len(messengers._threads) == MOST, 30)
    assert not eventually(lambda: len(messengers._threads) > MOST, 0.3)
    go_on.set()
    for _ in range(MOST + 10):
        assert called.acquire(timeout=30)


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_one_that_raises_does_not_stop_the_others(
    caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    done = threading.Semaphore(0)

    def fail() -> None:
        raise error

    messengers = Messengers()
    for _ in range(3 * FEW):
        messengers.send(fail)
        messengers.send(done.release)
    for _ in range(3 * FEW):
        assert done.acquire(timeout=30)
    assert eventually(lambda: len(caplog.records) == 3 * FEW)
    assert {record.event for record in caplog.records} == {"thread_failed"}  # type: ignore[attr-defined]


def test_each_ends_with_its_connections_closed() -> None:
    left: list[bool] = []
    done = threading.Event()

    def ask() -> None:
        left.extend(one.connection is not None for one in connections.all(initialized_only=True))
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")

    messengers = Messengers()
    for _ in range(5 * FEW):
        messengers.send(ask)
    messengers.send(done.set)
    assert done.wait(30)
    assert not any(left)


def test_without_a_thread_there_is_no_signal_until_there_is_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    called: list[str] = []
    messengers = Messengers()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        messengers.send(lambda: called.append("refused"))
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "signal_not_sent" in caplog.text
    messengers.send(lambda: called.append("sent"))
    assert eventually(lambda: called == ["sent"])


def test_a_forked_child_has_threads_of_its_own() -> None:
    go_on = threading.Event()
    for _ in range(FEW + 1):
        soon(lambda: go_on.wait(30))

    def child() -> None:
        called = threading.Event()
        soon(called.set)
        assert called.wait(20)
        assert not background._messengers._waiting

    try:
        assert eventually(lambda: senders() == FEW + 1)
        in_fork(child)
    finally:
        go_on.set()


HANGS = """
import threading, django
django.setup()
from distlock.background import soon
begun = threading.Event()
def hang():
    begun.set()
    threading.Event().wait()
for _ in range(20):
    soon(hang)
assert begun.wait(20)
"""


def test_a_process_ends_though_receivers_hang() -> None:
    command = [sys.executable, "-W", "error", "-c", HANGS]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), timeout=20, check=False)
    assert ended.returncode == 0
