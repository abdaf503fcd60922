"""The warning about a lock that is regularly held for most of its ttl, without a renewal."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import transaction

from distlock import LockLost, lock, longholds
from distlock.longholds import NAMES, QUIET, LongHolds
from distlock.testing import FakeClock, fake_clock

pytestmark = pytest.mark.django_db(transaction=True)

TTL = 30
Said = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longholds, "long_holds", LongHolds())


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Said]:
    with caplog.at_level(logging.WARNING, "distlock"):
        yield lambda: [one.getMessage() for one in caplog.records if "held_long" in one.msg]


@pytest.fixture
def clock() -> Iterator[FakeClock]:
    with fake_clock() as one:
        yield one


def hold(clock: FakeClock, seconds: float, name: str = "x", **more: Any) -> None:
    with lock(name, **{"ttl": TTL, "renew": False, **more}):
        clock.advance(seconds)


def test_it_is_said_once_it_is_regular(clock: FakeClock, said: Said) -> None:
    for held_for in (25, 25):
        hold(clock, held_for)
        assert said() == []
    hold(clock, 25)
    (line,) = said()
    assert line.startswith("lock_held_long name='x' held=25.")
    assert "ttl=30.000 times=3 of_last=5 remedy='renew it (renew=True), or give it a ttl" in line


@pytest.mark.parametrize(
    ("holds", "times"),
    [
        ([25, 1, 25, 1, 25], 1),
        ([25, 25, 1, 1, 1, 25], 0),
        ([1, 1, 1, 25, 25], 0),
        ([23] * 6, 0),
        ([25] * 12, 1),
    ],
)
def test_three_of_the_last_five(clock: FakeClock, said: Said, holds: list[int], times: int) -> None:
    for held_for in holds:
        hold(clock, held_for)
    assert len(said()) == times


def test_it_is_said_again_after_an_hour(clock: FakeClock, said: Said) -> None:
    for _ in range(8):
        hold(clock, 25)
    assert len(said()) == 1
    clock.advance(QUIET)
    hold(clock, 1)
    assert len(said()) == 1, "the last one was short"
    hold(clock, 25)
    assert len(said()) == 2


def test_a_lease_that_was_renewed_is_never_long(clock: FakeClock, said: Said) -> None:
    for _ in range(6):
        hold(clock, 10 * TTL, renew=True)
        with lock("y", ttl=TTL, renew=False) as lease:
            clock.advance(15)
            lease.renew()
            clock.advance(28)
    assert said() == []


def test_nor_is_one_whose_min_hold_keeps_it(clock: FakeClock, said: Said) -> None:
    for _ in range(6):
        hold(clock, 29, min_hold=60)
        clock.advance(60)
    assert said() == []
    for _ in range(3):
        hold(clock, 55, min_hold=60)
        clock.advance(60)
    assert "ttl=60.000" in said()[0]


def test_nor_is_one_that_its_min_hold_has_renewed_late(clock: FakeClock, said: Said) -> None:
    for _ in range(6):
        hold(clock, 900, renew=True, min_hold=600)
        with transaction.atomic():
            hold(clock, 570, "y", renew=True, min_hold=600)
        clock.advance(600)
    assert said() == []


def test_one_that_max_hold_keeps_from_being_renewed_is(clock: FakeClock, said: Said) -> None:
    for _ in range(3):
        hold(clock, 25, renew=True, max_hold=5)
    assert len(said()) == 1


def test_the_ttl_that_it_proposes_is_in_whole_seconds(clock: FakeClock, said: Said) -> None:
    for _ in range(3):
        hold(clock, 580, ttl=600)
    assert "or give it a ttl of 1160 s, or do less" in said()[0]


def test_what_a_transaction_goes_on_keeping_is_not_counted(clock: FakeClock, said: Said) -> None:
    for _ in range(6):
        with transaction.atomic():
            with lock("x", ttl=TTL, renew=False):
                clock.advance(1)
            clock.advance(25)
    assert said() == []


@pytest.mark.vendor("mysql", "sqlite")  # elsewhere it is renewed meanwhile
def test_what_a_guard_keeps_is_not_counted(clock: FakeClock, said: Said) -> None:
    for _ in range(6):
        with lock("x", ttl=TTL, renew=False) as lease, transaction.atomic():
            lease.guard()
            clock.advance(25)
    assert said() == []


@pytest.mark.vendor("postgresql", "mysql")  # SQLite has its file locked meanwhile
def test_a_hold_in_a_transaction_of_its_own_is(clock: FakeClock, said: Said) -> None:
    for _ in range(3):
        hold(clock, 25, atomic=True)
    assert len(said()) == 1


def test_a_lease_that_was_lost_is_told_otherwise(clock: FakeClock, said: Said) -> None:
    for _ in range(6):
        with pytest.raises(LockLost):
            hold(clock, TTL + 1)
    assert said() == []


def test_names_that_differ_in_numbers_are_one_lock(clock: FakeClock, said: Said) -> None:
    for number in range(3):
        hold(clock, 25, f"stock:{number}")
        hold(clock, 25, f"file:{uuid.uuid4()}")
        hold(clock, 25, f"mail:{uuid.uuid4().hex}")
        hold(clock, 25, "name:" + "abc"[number])
    assert [line.split(" held=")[0].split("name=")[1][:6] for line in said()] == [
        "'stock",
        "'file:",
        "'mail:",
    ]
    assert "name='stock:2'" in said()[0]


def test_it_remembers_no_more_than_so_many_names(clock: FakeClock, said: Said) -> None:
    class Term:
        alias, slot, first, name, spent = "default", 0, 30.0, "", 0.9

    term: Any = Term()

    def note(name: str) -> None:
        term.name = name
        longholds.long_holds.note(term)

    note("often")
    for number in range(3 * NAMES):
        note("".join(chr(ord("a") + int(digit)) for digit in str(number)))
        term.spent = 0.1
        note("often")
        term.spent = 0.9
    assert len(longholds.long_holds._names) == NAMES
    for _ in range(2):  # the latest are those that it remembers
        note("cgh")  # 267: of the middle
        note("hgh")  # 767: the last
    assert ["name='hgh'" in line for line in said()] == [True]
    assert ("default", "often", 0) in longholds.long_holds._names


def test_short_holds_are_not_remembered(clock: FakeClock, said: Said) -> None:
    hold(clock, 25)
    for name in "abc":
        hold(clock, 1, name)
    assert len(longholds.long_holds._names) == 1


def test_a_child_forgets_what_its_parent_has_seen(clock: FakeClock) -> None:
    hold(clock, 25)
    pid = os.fork()
    if pid == 0:
        os._exit(len(longholds.long_holds._names))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(longholds.long_holds._names) == 1


def test_the_time_after_a_release_is_not_spent(clock: FakeClock) -> None:
    with lock("x", ttl=TTL, renew=False) as lease:
        clock.advance(15)
    clock.advance(60)
    assert 0.49 < lease._term.spent < 0.6
