"""A beat on a host whose clock is wrong.

    python -m tests.contrib.beats SECONDS CHANCE beat -S ...

BEATS_CONF is the JSON of what to set in the app's configuration. What Python says about the time is
off by so many seconds; `sleep` is not, as with libfaketime, nor is the database. With that CHANCE a
beat is stopped or killed right before it sends a tick, or before it notes that it has.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import signal
import sys
import time
import types
from typing import Any

import django
from celery.beat import Scheduler

from distlock.contrib.beat import Leader

REAL = datetime.datetime
EVERY = 0.5
TASK = "tests.contrib.tasks.ticking"
QUEUE = "ticks"


class Meta(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, REAL)


class Skewed(REAL, metaclass=Meta):
    shift = datetime.timedelta()

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return REAL.now(tz) + cls.shift

    @classmethod
    def utcnow(cls) -> Any:
        return REAL.now(datetime.timezone.utc).replace(tzinfo=None) + cls.shift


def skew(offset: float) -> None:
    """Make this process's clock wrong, for Celery and Django as they have been imported."""
    right = time.time
    time.time = lambda: right() + offset
    Skewed.shift = datetime.timedelta(seconds=offset)
    shim = types.SimpleNamespace(**{**vars(datetime), "datetime": Skewed})
    for name, module in list(sys.modules.items()):
        if name.startswith(("celery.", "django_celery_beat.", "django.utils.timezone")):
            if getattr(module, "datetime", None) is REAL:
                module.datetime = Skewed  # type: ignore[attr-defined]
            if getattr(module, "datetime", None) is datetime:
                module.datetime = shim  # type: ignore[attr-defined]


def stumble(chance: float) -> None:
    """Stop or kill this process now and then, at the worst points."""

    def before(method: Any, *numbers: int) -> Any:
        def stumbling(*args: Any, **kwargs: Any) -> Any:
            if random.random() < chance:
                os.kill(os.getpid(), random.choice(numbers))
            return method(*args, **kwargs)

        return stumbling

    Scheduler.apply_async = before(Scheduler.apply_async, signal.SIGSTOP)
    Leader.guarded = before(Leader.guarded, signal.SIGSTOP, signal.SIGKILL)


def main(offset: str, chance: str, *arguments: str) -> None:
    django.setup()
    from django.utils import timezone

    from tests.contrib.celery_app import app

    in_database = "SingleDatabaseBeatScheduler" in "".join(arguments)
    if in_database:  # what is to be wrong has to be there
        import distlock.contrib.beat_database  # noqa: F401
    stumble(float(chance))
    skew(float(offset))
    for now in (timezone.now().timestamp(), app.now().timestamp()):
        assert abs(now - time.time()) < 1, "the clock is not off"
    app.conf.update(json.loads(os.environ["BEATS_CONF"]))
    if not in_database:
        entry = {"task": TASK, "schedule": EVERY, "options": {"queue": QUEUE}}
        app.conf.beat_schedule = {"half": entry}
    app.start(list(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
