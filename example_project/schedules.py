"""A schedule in step with the clock on the wall, so that two beats tick at the same moments.

Beat's own `schedule(3)` counts from the moment when beat was started. Two beats are then out of
phase by anything up to the whole interval, and no `min_hold` could tell the late twin of one tick
from the first message of the next. In step, only the delay in the queue sets twins apart:

    the twin of the same tick        comes at most `delay` after the job began
    the first one of the next tick   comes at least `INTERVAL - delay` after it

A `min_hold` of half the interval therefore drops every twin and nothing else, as long as delays
stay below half an interval. (A `crontab` is in step by itself, but knows no seconds.)
"""

from __future__ import annotations

import time
from datetime import datetime

from celery.schedules import schedstate, schedule

INTERVAL = 3
MIN_HOLD = INTERVAL / 2


class Aligned(schedule):
    """Due whenever the clock passes a multiple of the interval."""

    def is_due(self, last_run_at: datetime) -> schedstate:
        """Return whether a multiple has passed since the last run, and the seconds to the next."""
        now, interval = time.time(), self.seconds
        due = now // interval > last_run_at.timestamp() // interval
        return schedstate(is_due=due, next=interval - now % interval)


def tick_now() -> int:
    """Return the number of the tick that is nearest."""
    return round(time.time() / INTERVAL)
