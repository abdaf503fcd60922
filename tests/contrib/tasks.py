"""Tasks under a lock, each for one thing that must not go wrong."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from celery import Task, shared_task
from celery.signals import task_prerun
from django.db import transaction

from distlock import LockBusy, lock, once
from distlock.contrib.celery import single_instance
from distlock.models import DistributedLock
from tests.contrib.celery_app import note, noted


def work(seconds: float = 0, **what: Any) -> None:
    """Be busy for a while, on record."""
    note(event="start", at=time.time(), **what)
    time.sleep(seconds)
    note(event="end", at=time.time(), **what)


def starts() -> int:
    return sum(entry["event"] == "start" for entry in noted())


@shared_task
@single_instance
def skipping(number: int, seconds: float = 0) -> int:
    work(seconds, number=number)
    return number


@shared_task(name="tests.renamed")
@single_instance
def renamed() -> list[str]:
    return list(DistributedLock.objects.exclude(owner="").values_list("name", flat=True))


@shared_task
@single_instance("renewed", ttl=1)
def renewed(seconds: float) -> str:
    work(seconds)
    holder = lock("renewed").holder()
    return "lost" if holder is None else "still held"


@shared_task(max_retries=0)
@single_instance("retrying", on_busy="retry")
def retrying(seconds: float = 0) -> str:
    work(seconds)
    return "done"


@shared_task
@single_instance("waiting:{number}", on_busy="wait", wait=20)
def waiting(number: int, seconds: float = 0) -> str:
    work(seconds)
    return "done"


@shared_task
@single_instance("raising", on_busy="raise")
def raising() -> str:
    return "done"


def tell(busy: LockBusy) -> str:
    assert busy.holder is not None
    return f"{busy.name} is held by {busy.holder.note}"


@shared_task
@single_instance("telling", on_busy=tell)
def telling() -> str:
    return "done"


@shared_task(bind=True)
@single_instance(key="bound:{number}")
def bound(self: Task[Any, Any], number: int, seconds: float = 0) -> str:
    work(seconds, id=self.request.id)
    return f"{self.request.id} {number}"


@shared_task(autoretry_for=(ValueError,), max_retries=3, default_retry_delay=0)
@single_instance("flaky")
def flaky() -> str:
    work()
    if starts() == 1:
        raise ValueError("the first time")
    return "done"


@shared_task(bind=True, max_retries=3)
@single_instance("tidy")
def tidy(self: Task[Any, Any], seconds: float) -> str:
    """Retry at once, but be slow to end: the retry arrives while this run has the lock."""
    first = starts() == 0
    note(event="start", at=time.time())
    try:
        if first:
            raise self.retry(countdown=0)
    finally:
        time.sleep(seconds)
        note(event="end", at=time.time())
    return f"done with {self.request.retries} retries"


@shared_task(acks_late=True, reject_on_worker_lost=True)
@single_instance("dying", ttl=3)
def dying() -> str:
    note(event="start", at=time.time())
    if starts() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


@shared_task
@single_instance("doomed", ttl=2)
def doomed() -> None:
    work(60)


@shared_task
def total(results: list[Any]) -> list[Any]:
    return results


@shared_task
def connecting(number: int) -> str:
    """Take a lock in autocommit and one inside a transaction, and have both renewed."""
    with lock(f"outer {number}", ttl=0.6) as outer, transaction.atomic():
        with lock(f"inner {number}", ttl=0.6):
            time.sleep(0.8)
            outer.check()
    return "done"


@shared_task(bind=True)
@once("{self.request.id}")
def ticking(self: Task[Any, Any]) -> None:
    """One tick of a beat. A twin has the same id, and gets the result of the first."""
    headers = self.request.headers or {}
    note(event="tick", tick=headers["distlock_tick"], at=time.time())


@task_prerun.connect
def count(sender: Any, **kwargs: Any) -> None:
    """Count the messages, twins included."""
    if sender.name == ticking.name:
        note(event="message", at=time.time())
