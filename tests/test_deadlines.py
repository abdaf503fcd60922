from __future__ import annotations

import math
import time
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any, cast

import pytest

from distlock import deadlines
from distlock.deadlines import LONGEST, Deadline, clock, jitter, seconds

pytestmark = pytest.mark.vendor("sqlite")


@pytest.mark.parametrize(
    ("given", "result"),
    [
        (0, 0.0),
        (30, 30.0),
        (0.25, 0.25),
        (timedelta(minutes=1, microseconds=1), 60.000001),
        (LONGEST, LONGEST),
        (timedelta(days=3650), LONGEST),
    ],
)
def test_a_duration_is_seconds_or_a_timedelta(given: Any, result: float) -> None:
    assert seconds(given, "ttl") == result
    assert isinstance(seconds(given, "ttl"), float)


@pytest.mark.parametrize("given", [True, False, None, "5", b"5", [5], Decimal(5), Fraction(5), 1j])
def test_anything_else_is_a_type_error_that_names_the_argument(given: Any) -> None:
    with pytest.raises(TypeError, match=r"^ttl must be a number of seconds or a timedelta, not "):
        seconds(given, "ttl")


@pytest.mark.parametrize("given", [-1, -0.001, timedelta(seconds=-1), math.nan, -math.inf])
def test_a_negative_duration_or_none_at_all_is_a_value_error(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^wait must be 0 or greater, not "):
        seconds(given, "wait")


@pytest.mark.parametrize("given", [0, 0.0, -0.0, timedelta(0), -5, math.nan])
def test_zero_is_refused_where_it_makes_no_sense(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^ttl must be greater than 0, not "):
        seconds(given, "ttl", positive=True)


@pytest.mark.parametrize("given", [1e-9, 0.00099, math.ulp(0.0), timedelta(microseconds=999)])
def test_less_than_a_millisecond_is_refused_there_too(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^ttl must be at least a millisecond \(0\.001\), not "):
        seconds(given, "ttl", positive=True)
    assert seconds(given, "wait") >= 0
    assert seconds(0.001, "ttl", positive=True) == 0.001


@pytest.mark.parametrize("given", [LONGEST + 1, 1e300, math.inf, timedelta.max, 10**30])
def test_more_than_ten_years_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^ttl must be at most ten years \(315360000\), not "):
        seconds(given, "ttl")


def test_a_deadline_counts_down_and_never_below_zero() -> None:
    deadline = Deadline(0.05)
    assert 0 < deadline.left <= 0.05
    time.sleep(0.06)
    assert deadline.left == 0.0
    assert 0.06 <= deadline.passed < 5


def test_without_a_wait_there_is_no_deadline() -> None:
    assert Deadline(None).left == math.inf
    assert Deadline(0).left == 0.0


def test_the_clock_grows_and_ignores_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    before = clock()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    deadline = Deadline(10)
    assert clock() >= before
    assert 9 < deadline.left <= 10


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="no such clock here")
def test_the_clock_goes_on_while_the_machine_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cast("partial[float]", deadlines.real_clock)
    assert (real.func, real.args) == (time.clock_gettime, (time.CLOCK_BOOTTIME,))
    monkeypatch.setattr(deadlines, "real_clock", lambda: 5.0)
    assert deadlines.clock() == 5.0 + deadlines.ahead


def test_jitter_stays_near_and_is_not_always_the_same() -> None:
    drawn = {jitter(1.0) for _ in range(100)}
    assert all(0.75 <= delay <= 1.25 for delay in drawn)
    assert len(drawn) > 50
    assert max(drawn) - min(drawn) > 0.2
    assert jitter(0) == 0


def test_an_int_beyond_every_float_is_refused_like_the_others() -> None:
    for value in (10**400, -(10**400)):
        with pytest.raises(ValueError, match="ttl"):
            seconds(value, "ttl")
