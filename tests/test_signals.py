"""What the signals tell: how each acquire and each lease has ended, once, and nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from django.db import OperationalError, connection, transaction

from distlock import AlreadyHeld, LockBusy, LockError, lock, signals
from distlock.backends import backend_for
from distlock.backends.base import TABLE
from distlock.keeper import keeper
from tests.support import eventually, in_thread, other_session, run_async
from tests.waiters import calls_of, instead_of

pytestmark = pytest.mark.django_db(transaction=True)
servers = pytest.mark.vendor("postgresql", "mysql")

Told = list[tuple[str, dict[str, Any]]]


@contextmanager
def receiving(name: str, receiver: Callable[..., Any]) -> Iterator[None]:
    signal = getattr(signals, name)
    signal.connect(receiver)
    try:
        yield
    finally:
        signal.disconnect(receiver)


@pytest.fixture
def told() -> Iterator[Told]:
    """What the signals say of the lock `told`."""
    said: Told = []

    def receiver_for(name: str) -> Callable[..., None]:
        def receive(sender: Any, signal: Any, **more: Any) -> None:
            if (more["lease"].name if "lease" in more else more["name"]) == "told":
                said.append((name.removeprefix("lock_"), more))

        return receive

    receivers = {name: receiver_for(name) for name in signals.__all__ if name.startswith("lock_")}
    for name, receiver in receivers.items():
        getattr(signals, name).connect(receiver)
    yield said
    for name, receiver in receivers.items():
        getattr(signals, name).disconnect(receiver)


def names(told: Told) -> list[str]:
    return [name for name, _ in told]


def gone(*arguments: Any, **more: Any) -> Any:
    raise OperationalError("the server is gone")


# -- busy ----------------------------------------------------------------------------------------


def test_a_quiet_lock_tells_nobody_that_it_is_busy_and_asks_for_no_holder(told: Told) -> None:
    def quiet(**more: Any) -> Any:
        return dataclasses.replace(lock("told", wait=0.05, **more), quiet=True)

    def give_up() -> LockBusy:
        assert quiet().try_acquire() is None
        assert run_async(quiet().atry_acquire) is None
        for acquire in (quiet().acquire, quiet(atomic=True).__enter__):
            with pytest.raises(LockBusy) as busy:
                acquire()
        return busy.value

    with calls_of("holder") as asked:
        with lock("told"):
            error = in_thread(give_up)
        with quiet():
            pass
    assert (error.name, error.holder) == ("told", None)
    assert error.waited >= 0.05
    assert not asked
    assert names(told) == ["acquired", "released"] * 2


def test_busy_is_told_though_nobody_can_say_who_holds_it(told: Told) -> None:
    async def acquire() -> None:
        await lock("told", wait=0).aacquire()

    with lock("told"), instead_of("holder", gone):
        for give_up in (lock("told", wait=0).acquire, lambda: run_async(acquire)):
            with pytest.raises(LockBusy, match="the server is gone") as busy:
                in_thread(give_up)  # type: ignore[arg-type]
            assert isinstance(busy.value.__cause__, OperationalError)
            assert busy.value.holder is None
    assert names(told) == ["acquired", "busy", "busy", "released"]
    assert told[1][1]["holder"] is None


# -- failed --------------------------------------------------------------------------------------


def test_a_missing_table_is_told_and_wrong_use_is_not(told: Told) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {TABLE} RENAME TO hidden")
    try:
        with pytest.raises(LockError, match=r"manage\.py migrate"):
            lock("told").acquire()
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER TABLE hidden RENAME TO {TABLE}")
    ((name, about),) = told
    assert name == "failed"
    assert "migrate" in str(about["error"])
    with lock("told"), pytest.raises(AlreadyHeld):
        lock("told").acquire()
    if backend_for(connection).private_connection:
        with transaction.atomic(), instead_of("snapshot_isolation", lambda *arguments: True):
            with pytest.raises(LockError, match="REPEATABLE READ"):
                lock("told").acquire()
    assert names(told).count("failed") == 1


def test_an_async_receiver_swallows_no_cancellation(
    told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    async def receiver(**kwargs: Any) -> None:
        raise AssertionError("nobody can wait for it here")

    async def cancelled() -> None:
        task = asyncio.ensure_future(lock("told", wait=30).aacquire())
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with lock("told"), receiving("lock_failed", receiver):
        in_thread(lambda: run_async(cancelled))
    assert names(told) == ["acquired", "failed", "released"]
    assert "signal_not_sent" in caplog.text


@pytest.mark.parametrize("kept", [True, False], ids=["by the keeper", "at once"])
def test_a_cancelled_task_whose_grant_comes_later_is_told_once(
    told: Told, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    monkeypatch.setattr("distlock.acquisitions.can_keep", lambda connection: kept)
    granted, cancelled = threading.Event(), threading.Event()

    def late(real: Any, *arguments: Any, **more: Any) -> Any:
        found = real(*arguments, **more)
        granted.set()
        assert cancelled.wait(20)
        return found

    async def main() -> None:
        task = asyncio.ensure_future(lock("told", ttl=300, min_hold=300).aacquire())
        assert await asyncio.to_thread(granted.wait, 20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        cancelled.set()

    with instead_of("grant", late):
        in_thread(lambda: run_async(main))
    assert eventually(lambda: lock("told").holder() is None, 30)
    assert names(told) == ["failed"]


def test_a_cancelled_task_whose_grant_was_told_is_not_told_again(told: Told) -> None:
    begun, cancelled = threading.Event(), threading.Event()

    def receiver(**kwargs: Any) -> None:
        begun.set()
        assert cancelled.wait(20)

    async def main() -> None:
        task = asyncio.ensure_future(lock("told").aacquire())
        assert await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        cancelled.set()

    with receiving("lock_acquired", receiver):
        in_thread(lambda: run_async(main))
    assert eventually(lambda: names(told) == ["acquired", "released"], 30), names(told)


# -- the end of a lease --------------------------------------------------------------------------


def test_a_release_that_the_database_never_answered_is_not_told_as_one(
    told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    with instead_of("release", gone), instead_of("free", gone):
        with lock("told", ttl=0.5, renew=False):
            pass
        assert eventually(lambda: len(told) > 1, 30)
    assert names(told) == ["acquired", "dropped"]
    assert told[1][1]["held"] > 0
    late = [one for one in caplog.records if getattr(one, "event", "") == "lock_release_delayed"]
    assert late
    assert {one.error for one in late} == {"the server is gone"}  # type: ignore[attr-defined]


@servers
def test_nor_is_one_that_a_rollback_left_to_the_keeper(told: Told) -> None:
    with instead_of("free", gone):
        with suppress(ZeroDivisionError), transaction.atomic():
            with lock("told", ttl=0.5, renew=False):
                pass
            raise ZeroDivisionError
        assert eventually(lambda: len(told) > 1, 30)
    assert names(told) == ["acquired", "dropped"]


def test_a_release_that_comes_late_is_told_as_one(told: Told) -> None:
    with instead_of("release", gone), lock("told", ttl=60, renew=False):
        pass
    assert eventually(lambda: len(told) > 1, 30)
    assert names(told) == ["acquired", "released"]


# -- renewals ------------------------------------------------------------------------------------


@servers
def test_a_renewal_that_meets_a_locked_row_is_counted() -> None:
    figures: list[tuple[int, int, int]] = []

    def receiver(*, renewed: int, failed: int, locked: int, **kwargs: Any) -> None:
        figures.append((renewed, failed, locked))

    with lock("told", ttl=60) as lease, receiving("leases_renewed", receiver):
        with other_session() as cursor:
            cursor.execute("BEGIN")
            cursor.execute("SELECT 1 FROM distlock_distributedlock WHERE name = 'told' FOR UPDATE")
            lease._term.next_renewal = 0.0
            keeper.rounds("default")._thread.wake()
            assert eventually(lambda: (0, 0, 1) in figures, 30)
            figures.clear()
            with pytest.raises(LockError, match="was not renewed"):
                lease.renew()
            assert (0, 0, 1) in figures
            cursor.execute("ROLLBACK")
        lease.renew()
        assert (1, 0, 0) in figures
