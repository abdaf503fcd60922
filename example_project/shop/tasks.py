"""What workers do: the periodic jobs of the demo, and what the supplier tells.

Of two jobs, one runs once per tick however many beats send it, and one does not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Task, shared_task
from celery.signals import task_success

from distlock.contrib.celery import single_instance
from example_project.schedules import MIN_HOLD

from . import services
from .models import Run

WORK = 0.3
"""Seconds that a job takes."""


@shared_task(bind=True)
@single_instance("report", min_hold=MIN_HOLD)
def report(self: Task[Any, Any], tick: int) -> None:
    """Send the report of a tick: once, although two beats send this message."""
    with recorded("report", self, tick):
        time.sleep(WORK)


@shared_task(bind=True)
def control(self: Task[Any, Any], tick: int) -> None:
    """Do the same, without the decorator: twice."""
    with recorded("control", self, tick):
        time.sleep(WORK)


@shared_task(acks_late=True)
def delivered(event: str, product_id: int, pieces: int) -> None:
    """Consume an event of the supplier's, which a queue may deliver more than once."""
    services.receive(event, product_id, pieces)


@contextmanager
def recorded(job: str, task: Task[Any, Any], tick: int) -> Iterator[None]:
    """Keep a row about what runs in the block."""
    run = Run.objects.create(job=job, tick=tick, started=time.time(), **who(task))
    try:
        yield
    finally:
        run.ended = time.time()
        run.save(update_fields=["ended"])


@task_success.connect(sender=report)
def record_skipped(sender: Task[Any, Any], result: Any, **kwargs: object) -> None:
    """Keep a row about a duplicate: it ended well, and its result says that it was skipped."""
    if isinstance(result, dict) and result.get("distlock") == "skipped":
        now, tick = time.time(), (sender.request.kwargs or {})["tick"]
        Run.objects.create(
            job="report", tick=tick, skipped=True, started=now, ended=now, **who(sender)
        )


def who(task: Task[Any, Any]) -> dict[str, Any]:
    """Return which worker a task runs in."""
    return {"worker": str(task.request.hostname).partition("@")[0], "pid": os.getpid()}
