"""A warning before leases begin to be lost: a lock that is regularly held for most of its ttl.

A receiver of `lock_released`. What counts is how much of its ttl a lease had spent when it was
renewed, pinned in a transaction, or released, whichever came first: from then on it was safe. A
lock that the keeper renews never counts, however long it is held, and be it before the first time.

Names that differ in numbers only, such as those of a template's arguments, are looked at together.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import signals
from .background import after_fork
from .deadlines import clock
from .events import log

if TYPE_CHECKING:
    from .terms import Key, Term

LONG = 0.8
"""The share of its ttl after which a lease was held long."""
TIMES, LAST = 3, 5
"""How many of its last leases in this process make it regular."""
QUIET = 3600.0
"""Seconds between two warnings about a lock."""
NAMES = 256
"""How many names are remembered at most: those that were held long."""

UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
VALUE = re.compile(rf"{UUID}|[0-9a-f]{{32,}}|\d+", re.IGNORECASE)


@dataclass
class Past:
    """What is remembered of a name."""

    were_long: deque[bool] = field(default_factory=lambda: deque(maxlen=LAST))
    quiet_until: float = 0.0


class LongHolds:
    """The names of this process that were held long, the latest last."""

    def __init__(self) -> None:
        self._mutex = threading.RLock()  # a signal's handler may release a lock, too
        self._names: OrderedDict[Key, Past] = OrderedDict()

    def note(self, term: Term) -> None:
        """Note a lease that was released, and warn if that makes it regular."""
        is_long = term.spent > LONG
        if not (is_long or self._names):
            return
        with self._mutex:
            times = self._times((term.alias, VALUE.sub("*", term.name), term.slot), is_long)
        if times:
            held = term.spent * term.first
            log(
                logging.WARNING,
                "lock_held_long name=%r held=%.3f ttl=%.3f times=%d of_last=%d remedy=%r",
                lock=term.name,
                held=held,
                ttl=term.first,
                times=times,
                of_last=LAST,
                remedy=f"renew it (renew=True), or give it a ttl of {2 * held:.0f} s, "
                "or do less under it",
            )

    def _times(self, key: Key, is_long: bool) -> int:
        """Return how many of the last leases were long, if that is to be told now."""
        if not is_long and key not in self._names:
            return 0
        past = self._names.setdefault(key, Past())
        self._names.move_to_end(key)
        if len(self._names) > NAMES:
            self._names.popitem(last=False)
        past.were_long.append(is_long)
        times = sum(past.were_long)
        if not is_long or times < TIMES or clock() < past.quiet_until:
            return 0
        past.quiet_until = clock() + QUIET
        return times


long_holds = LongHolds()


def connect() -> None:
    """Attach the receiver; called once, when the app is ready."""
    signals.lock_released.connect(_released, dispatch_uid="distlock.longholds")


def _released(sender: object, *, lease: Any, **kwargs: object) -> None:
    long_holds.note(lease._term)


def _forget() -> None:
    long_holds.__init__()  # type: ignore[misc]


after_fork(_forget)
