"""Tasks for `enqueue_once`."""

from __future__ import annotations

import os
import signal
from typing import Any

from celery import Task, shared_task

from distlock.contrib.celery import deduplicated
from tests.contrib.tasks import starts, work


@shared_task(bind=True)
@deduplicated
def import_feed(self: Task[Any, Any], feed: int, seconds: float = 0) -> str:
    work(seconds, id=self.request.id, feed=feed)
    return f"feed {feed}"


def crash_at_first(task: Task[Any, Any]) -> str:
    work(0, id=task.request.id)
    if starts() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


@shared_task(bind=True, acks_late=True, reject_on_worker_lost=True)
@deduplicated
def crash_late(self: Task[Any, Any]) -> str:
    """Be redelivered."""
    return crash_at_first(self)


@shared_task(bind=True)
@deduplicated
def crash_early(self: Task[Any, Any]) -> str:
    """Be lost: the message is gone when the task begins."""
    return crash_at_first(self)


@shared_task(bind=True)
@deduplicated
def hammered(self: Task[Any, Any]) -> None:
    work(0.01, id=self.request.id)
