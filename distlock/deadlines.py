"""Durations, deadlines and jitter: checked once at the border, then plain seconds.

# Note [Which clock]
Trust and waits are measured on CLOCK_BOOTTIME where there is one: CLOCK_MONOTONIC stands still
while a Linux machine is suspended, and a lease does not. Neither is ever compared with the
database's clock. How long a statement may take is real time, whatever a test has done to the
rest (`testing/`).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

Seconds = int | float | timedelta

SHORTEST = 0.001
"""Of a lease: what the coarsest clock of a database can count, that of SQLite."""

LONGEST = 10 * 365 * 24 * 3600.0
"""Ten years: far below what overflows a database's interval."""

ahead = 0.0
"""Seconds that tests have let pass at once; it only grows, too."""

real_clock: Callable[[], float] = time.monotonic
"""Seconds on the machine's clock, which no test moves."""
if hasattr(time, "CLOCK_BOOTTIME"):
    real_clock = partial(time.clock_gettime, time.CLOCK_BOOTTIME)


def clock() -> float:
    """Seconds on a clock that only grows; see Note [Which clock]."""
    return real_clock() + ahead


def seconds(value: Seconds, argument: str, *, positive: bool = False) -> float:
    """Return a duration as float seconds.

    Raises `TypeError` for anything but int, float and timedelta, and `ValueError` for a negative
    one, NaN, or more than ten years; with `positive`, also for less than a millisecond.
    """
    if isinstance(value, bool) or not isinstance(value, Seconds):
        raise TypeError(
            f"{argument} must be a number of seconds or a timedelta, not {type(value).__name__}."
        )
    if isinstance(value, timedelta):
        result = value.total_seconds()
    else:
        result = float(value) if -LONGEST <= value <= LONGEST else _beyond(value)
    if math.isnan(result) or result < 0 or (positive and result == 0):
        bound = "greater than 0" if positive else "0 or greater"
        raise ValueError(f"{argument} must be {bound}, not {value!r}.")
    if positive and result < SHORTEST:
        raise ValueError(f"{argument} must be at least a millisecond ({SHORTEST}), not {value!r}.")
    if result > LONGEST:
        raise ValueError(f"{argument} must be at most ten years ({LONGEST:.0f}), not {value!r}.")
    return result


def _beyond(value: float) -> float:
    """Return what is out of range as an infinity, or NaN; an int may be too large for a float."""
    if value != value:
        return math.nan
    return math.inf if value > 0 else -math.inf


class Deadline:
    """A moment until which something may take; `None` seconds means for ever."""

    __slots__ = ("_at", "started")

    _clock = staticmethod(clock)

    def __init__(self, wait: float | None) -> None:
        self.started = self._clock()
        self._at = math.inf if wait is None else self.started + wait

    @property
    def left(self) -> float:
        """Seconds left, never negative; infinite without a deadline."""
        return max(0.0, self._at - self._clock())

    @property
    def passed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self.started


class Limit(Deadline):
    """How long the database may take, in real time."""

    __slots__ = ()
    _clock = staticmethod(real_clock)


def jitter(delay: float) -> float:
    """Return about `delay`, so that many processes do not act in step."""
    return delay * random.uniform(0.75, 1.25)
