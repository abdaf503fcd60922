"""What makes spans: receivers of the signals.

The span of a wait is made when the wait is over, with the start that it had; nothing is left behind
by one that never ends. That of a hold begins at the grant and ends with whatever the lease ends
with. Both are children of the span that is current where the lock is asked for. Neither is made
current: a lease may be released in another thread or task, which has a context of its own.
"""

from __future__ import annotations

import time
from typing import Any
from weakref import WeakKeyDictionary

from opentelemetry import trace
from opentelemetry.trace import Span, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from ... import signals
from ...background import after_fork
from ...conf import settings
from ...groups import group_of
from ...terms import State, Term

UID = "distlock.opentelemetry"
WAIT = "distlock wait"
HOLD = "distlock hold"

tracer = trace.get_tracer("distlock")

_holding: WeakKeyDictionary[Term, Span] = WeakKeyDictionary()
"""The spans that have not ended; one whose term nobody knows any more goes with it."""


def install() -> None:
    """Make spans from now on. A second call does nothing."""
    signals.lock_acquired.connect(_acquired, dispatch_uid=UID)
    signals.lock_busy.connect(_busy, dispatch_uid=UID)
    signals.lock_failed.connect(_failed, dispatch_uid=UID)
    signals.lock_released.connect(_released, dispatch_uid=UID)
    signals.lock_lost.connect(_lost, dispatch_uid=UID)
    signals.lock_dropped.connect(_dropped, dispatch_uid=UID)


def _acquired(sender: object, *, lease: Any, took: float, **kwargs: object) -> None:
    about = _about(lease.name) | {"distlock.token": lease.token}
    now = time.time_ns()
    _waited(now, took, about | {"distlock.outcome": "granted"})
    _holding[lease._term] = tracer.start_span(HOLD, start_time=now, attributes=about)
    if lease._term.over:  # its end may have been told before this
        _end_over(lease)


def _busy(sender: object, *, name: str, holder: Any, waited: float, **kwargs: object) -> None:
    about = _about(name) | {"distlock.outcome": "busy"}
    if holder is not None and settings().TRACE_NAMES:  # it has a note, and a thread's name
        about["distlock.holder"] = str(holder)
    _waited(time.time_ns(), waited, about)


def _failed(
    sender: object, *, name: str, error: BaseException, waited: float, **kwargs: object
) -> None:
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    about = _about(name) | {"distlock.outcome": "failed", "error.type": kind}
    text = str(error) if settings().TRACE_NAMES else type(error).__name__
    _waited(time.time_ns(), waited, about, Status(StatusCode.ERROR, text))


def _released(sender: object, *, lease: Any, **kwargs: object) -> None:
    _end(lease, "released")


def _lost(sender: object, *, lease: Any, reason: str, **kwargs: object) -> None:
    _end(lease, "lost", Status(StatusCode.ERROR, f"The lock was lost: {reason}."))


def _end_over(lease: Any) -> None:
    if lease._term.state is State.LOST:
        _lost(None, lease=lease, reason=lease._term.reason)
    else:
        _released(None, lease=lease)


def _dropped(sender: object, *, lease: Any, **kwargs: object) -> None:
    _end(lease, "dropped", Status(StatusCode.ERROR, "The lease was dropped without a release."))


def _about(name: str) -> dict[str, AttributeValue]:
    group: dict[str, AttributeValue] = {"distlock.group": group_of(name)}
    return group | {"distlock.name": name} if settings().TRACE_NAMES else group


def _waited(
    now: int, seconds: float, about: dict[str, AttributeValue], status: Status | None = None
) -> None:
    started = now - int(seconds * 1_000_000_000)
    span = tracer.start_span(WAIT, start_time=started, attributes=about)
    if status is not None:
        span.set_status(status)
    span.end(now)


def _end(lease: Any, outcome: str, status: Status | None = None) -> None:
    span = _holding.pop(lease._term, None)
    if span is None:
        return
    span.set_attribute("distlock.outcome", outcome)
    if status is not None:
        span.set_status(status)
    span.end()


def _forget() -> None:
    """The spans of a parent are for it to end."""
    _holding.clear()


after_fork(_forget)
