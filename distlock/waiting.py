"""The one way to wait for a name: try, sleep, try again, until the deadline.

Sleeps start short, grow while nothing happens, and are jittered. The last try comes at the
deadline itself, so that a lock freed during the last sleep is not missed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from .deadlines import Deadline, jitter

T = TypeVar("T")

FIRST_DELAY = 0.005
LONGEST_DELAY = 0.25
GROWTH = 1.5


def wait_for(attempt: Callable[[float], T | None], deadline: Deadline) -> T | None:
    """Return what `attempt(waited)` gives as soon as that is not `None`.

    It is called once at once, and then again until the deadline has passed.
    """
    result = attempt(0.0)
    delay = FIRST_DELAY
    left = deadline.left
    while result is None and left > 0:
        time.sleep(min(jitter(delay), left))
        delay = min(delay * GROWTH, LONGEST_DELAY)
        left = deadline.left
        result = attempt(deadline.passed)
    return result
