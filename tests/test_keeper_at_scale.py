"""Ten thousand leases in one process: renewed in few statements, and lost in time."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import OperationalError, connection

from distlock import Lease, lock
from distlock.acquisitions import _tell_lost
from distlock.backends.base import TABLE
from distlock.background import FEW, SIGNAL
from distlock.deadlines import clock
from distlock.keeper import Rounds, keeper
from distlock.signals import lock_lost
from distlock.terms import State, Term, margin
from tests.support import eventually, other_session
from tests.waiters import calls_of, instead_of, statements

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "other"]),
    pytest.mark.vendor("postgresql", "mysql"),
]

MANY = 10_000


@contextmanager
def kept_out(rounds: Rounds) -> Iterator[None]:
    """No step of the keeper is under way: one that has begun is over, and the next one waits."""
    real, arrived, go_on = rounds._step, threading.Event(), threading.Event()

    def step() -> float:
        arrived.set()
        assert go_on.wait(30)
        return real()

    rounds._thread._step = step
    rounds._thread.wake()
    try:
        assert arrived.wait(30)
        yield
    finally:
        rounds._thread._step = real
        go_on.set()


class Fleet:
    """Many leases, as if each had been acquired; and when each was told lost."""

    def __init__(
        self, ttl: float, count: int = MANY, on_lost: Callable[[Term, str], None] | None = None
    ) -> None:
        self.told: dict[str, float] = {}
        on_lost = on_lost or (lambda term, reason: self.told.setdefault(term.owner, clock()))
        rows = ", ".join(["(%s, %s, '2200-01-01', %s)"] * 1000)
        with connection.cursor() as cursor:
            for start in range(0, count, 1000):
                numbers = range(start, start + 1000)
                cursor.execute(
                    "INSERT INTO distlock_distributedlock (name, owner, expires_at, ttl) "
                    f"VALUES {rows}",
                    [part for n in numbers for part in (f"lock {n}", f"owner {n}", int(ttl * 1e6))],
                )
        requested = clock()
        self.terms = [
            Term(
                "default",
                f"lock {n}",
                0,
                f"owner {n}",
                token=1,
                ttl=ttl,
                acquired_us=0,
                expires_us=0,
                requested=requested,
                renew=True,
                min_hold=0,
                max_hold=None,
                on_lost=on_lost,
            )
            for n in range(count)
        ]
        for term in self.terms:
            keeper.keep(term)

    def make_due(self) -> float:
        """Let all be due for renewal now; return the moment."""
        rounds = keeper.rounds("default")
        with kept_out(rounds):  # else a round might begin with some of them
            for term in self.terms:
                term.next_renewal = 0.0
            now = clock()
        rounds._thread.wake()
        return now

    def renewed(self, since: float) -> bool:
        """Whether every lease was renewed by a request after that moment."""
        return all(term.trusted_until > since + term.ttl - margin(term.ttl) for term in self.terms)

    def end(self) -> None:
        for term in self.terms:
            term.move(State.RELEASED)
        keeper.rounds("default")._thread.wake()
        assert eventually(lambda: not keeper.rounds("default")._terms)


@contextmanager
def fleet(ttl: float, count: int = MANY, **more: Any) -> Iterator[Fleet]:
    made = Fleet(ttl, count, **more)
    try:
        yield made
    finally:
        made.end()


def test_a_round_of_ten_thousand_renewals_is_at_most_twenty_statements() -> None:
    rounds = keeper.rounds("default")
    rounds._batch = rounds._private.backend.batch  # what failed before has made it smaller
    with fleet(ttl=120) as made:  # so much time that no batch is made smaller
        with statements() as said, calls_of("renew") as calls:
            started = made.make_due()
            assert eventually(lambda: made.renewed(started), 30)
            took = clock() - started
            time.sleep(1)
        assert len(calls) <= 20
        if connection.vendor == "postgresql":  # on MariaDB each is three statements
            assert len(said) <= 20
        assert not made.told
        sys.stdout.write(f"{MANY} renewals: {len(said)} statements, {took:.2f} s\n")


def test_exceptions_in_a_round_are_survived(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failed: list[int] = []

    def fail_sometimes(real: Any, on: Any, held: Any, *more: Any, **options: Any) -> Any:
        if len(failed) < 3:
            failed.append(len(held))
            raise (OperationalError, ZeroDivisionError, RuntimeError)[len(failed) - 1]("just now")
        return real(on, held, *more, **options)

    with instead_of("renew", fail_sometimes), fleet(ttl=12) as made:
        since = made.make_due()
        assert eventually(lambda: made.renewed(since), 12)
        assert len(failed) == 3
        assert not made.told
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 2


@contextmanager
def locked_table() -> Iterator[None]:
    """Another session has the whole table: no statement on it ends, and no limit but ours helps."""
    with other_session() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("BEGIN")
            cursor.execute("LOCK TABLE distlock_distributedlock IN ACCESS EXCLUSIVE MODE")
        else:
            cursor.execute("LOCK TABLES distlock_distributedlock WRITE")
        try:
            yield
        finally:
            cursor.execute("ROLLBACK" if connection.vendor == "postgresql" else "UNLOCK TABLES")


def test_what_hangs_is_given_up_in_time_and_each_holder_told() -> None:
    """No statement takes more than a third of the shortest trust, and a loss is told at once."""
    took: list[tuple[float, float]] = []

    def measured(real: Any, *arguments: Any, **options: Any) -> Any:
        left = min(term.trusted_until for term in made.terms) - clock()
        started = clock()
        try:
            return real(*arguments, **options)
        finally:
            took.append((left, clock() - started))

    with fleet(ttl=3) as made:
        with locked_table(), instead_of("renew", measured):
            assert eventually(lambda: len(made.told) == MANY, 6)
        late = [made.told[term.owner] - term.trusted_until for term in made.terms]
    assert took
    for left, seconds in took:
        assert seconds <= max(0.05, left / 3) + 0.15, took
    assert min(late) >= 0
    assert max(late) < 2, max(late)  # ten thousand callbacks, on a busy machine
    sys.stdout.write(f"{MANY} losses told within {max(late):.2f} s, {len(took)} tries\n")


def test_ten_thousand_losses_are_told_by_a_few_threads() -> None:
    told: list[str] = []
    threads = [0]

    def receive(lease: Lease, **more: Any) -> None:
        told.append(lease.name)
        if len(told) % 100 == 1:
            names = [thread.name for thread in threading.enumerate()]
            threads.append(names.count(SIGNAL))

    lock_lost.connect(receive)
    try:
        with fleet(ttl=30, on_lost=_tell_lost) as made, lock("kept", ttl=30) as kept:
            with connection.cursor() as cursor:
                cursor.execute(f"UPDATE {TABLE} SET owner = 'thief' WHERE name <> 'kept'")
            kept._term.next_renewal = 0.0
            since = made.make_due()
            assert eventually(lambda: len(told) == MANY, 30)
            took = clock() - since
            assert kept._term.trusted_until > since + 28
            kept.check()
    finally:
        lock_lost.disconnect(receive)
    assert sorted(told) == sorted(term.name for term in made.terms)
    assert max(threads) <= FEW + 1
    sys.stdout.write(f"{MANY} losses told within {took:.2f} s, by {max(threads)} threads\n")


def test_a_batch_that_is_too_large_for_the_trust_that_is_left_is_made_smaller() -> None:
    def slow(real: Any, on: Any, held: Any, *more: Any, **options: Any) -> Any:
        if len(held) > 200:
            raise OperationalError("it took too long")
        return real(on, held, *more, **options)

    with instead_of("renew", slow), fleet(ttl=30, count=3000) as made:
        since = made.make_due()
        assert eventually(lambda: made.renewed(since), 25)
        assert not made.told


def test_a_hung_statement_costs_none_of_them_if_it_ends_in_time() -> None:
    with fleet(ttl=20) as made:
        with locked_table():
            made.make_due()
            assert eventually(lambda: any(term.next_renewal for term in made.terms), 15)
            since = clock()  # the first one had no answer, and was given up
            time.sleep(1.5)
        assert eventually(lambda: made.renewed(since - 0.5), 12)
        assert not made.told
