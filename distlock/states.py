"""What a row says at a moment of the database's clock: its state, and its times, for people."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db import models
from django.db.models import Case, F, Q, Value, When
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from .backends.base import EPOCH, MICROSECOND, microseconds_of
from .receipts import is_locked


class LockState(models.TextChoices):
    """What a row says at a moment of the database's clock."""

    HELD = "held", _("held")
    KEPT = "kept", _("kept")
    EXPIRED = "expired", _("expired")
    FREE = "free", _("free")


MEANING = {
    LockState.HELD: _("Somebody holds it."),
    LockState.KEPT: _("It was released, and min_hold keeps it for a while."),
    LockState.EXPIRED: _("Its holder neither renewed nor released it. It can be acquired."),
    LockState.FREE: _("It was released. It can be acquired."),
}


class JobState(models.TextChoices):
    """What a job's row says at a moment of the database's clock, and whether its lock is held."""

    QUEUED = "queued", _("queued")
    RUNNING = "running", _("running")
    BROKEN = "broken", _("broken off")
    DONE = "done", _("done")
    PAST = "past", _("expired")


MEANING_OF_JOB = {
    JobState.QUEUED: _("It waits to be run."),
    JobState.RUNNING: _("Somebody runs it and holds its lock."),
    JobState.BROKEN: _("It was begun, failed or was killed. The next call runs it."),
    JobState.DONE: _("It was done, and does not run again until its receipt has expired."),
    JobState.PAST: _("It was done, and its receipt has expired. The next call runs it."),
}


def state_at(now: int) -> Case:
    """Return the expression for a row's state at that many microseconds since 1970.

    See Note [Nobody's row] in `backends/base.py`.
    """
    over = Q(expires_at__lte=EPOCH + now * MICROSECOND)
    return Case(
        When(Q(owner="") & (over | Q(ttl=0)), then=Value(LockState.FREE.value)),
        When(over, then=Value(LockState.EXPIRED.value)),
        When(Q(owner=""), then=Value(LockState.KEPT.value)),
        default=Value(LockState.HELD.value),
        output_field=models.CharField(),
    )


def job_state_at(now: int) -> Case:
    """Return the expression for a job's state at that many microseconds since 1970."""
    at = EPOCH + now * MICROSECOND
    return Case(
        When(Q(state="done", expires_at__lte=at), then=Value(JobState.PAST.value)),
        When(Q(state="running") & ~Q(is_locked(at)), then=Value(JobState.BROKEN.value)),
        default=F("state"),
        output_field=models.CharField(),
    )


def job_state_of(job: Any, now: int, *, locked: bool) -> JobState:
    """Return the same for one row, where it is known whether its lock is held."""
    if job.state == JobState.DONE and microseconds(job.expires_at) <= now:
        return JobState.PAST
    if job.state == JobState.RUNNING and not locked:
        return JobState.BROKEN
    return JobState(job.state)


def duration(microseconds: int) -> str:
    """Return a duration for people: 3 ms, 4.2 s, 1 min 30 s, 2 h 5 min, 3 d 4 h."""
    seconds = max(0, microseconds) / 1_000_000
    if seconds < 0.1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 1:
        return f"{int(seconds * 1000)} ms"
    if seconds < 60:
        return f"{int(seconds * 10) / 10} s" if seconds < 10 else f"{int(seconds)} s"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    parts = [(days, "d"), (hour, "h"), (minute, "min"), (second, "s")]
    first = next(index for index, (count, _unit) in enumerate(parts) if count)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count)


def moment(value: datetime, *, zone: bool = True) -> str:
    """Return a moment of the database's clock, in the current time zone, to the second."""
    local = timezone.localtime(value) if timezone.is_aware(value) else value
    return local.strftime("%Y-%m-%d %H:%M:%S %Z" if zone else "%Y-%m-%d %H:%M:%S").strip()


def microseconds(value: datetime) -> int:
    """Return the microseconds since 1970 of a moment as Django keeps them."""
    if timezone.is_naive(value):
        value = timezone.make_aware(value, timezone.get_default_timezone())
    return microseconds_of(value)
