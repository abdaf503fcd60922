"""Tasks that meet a fault: they are killed, take too long, or are delivered twice."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Task, shared_task
from django.db.models import F

from distlock.contrib.celery import current_lock, single_instance
from tests.app.models import Counter
from tests.contrib.celery_app import first_time, note
from tests.contrib.tasks import starts, work


def die() -> None:
    """End this process as the kernel does that has no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(what: str) -> None:
    if first_time(what):
        die()


class Mortal(Task):  # type: ignore[type-arg]  # before Celery 5.7 it cannot be subscripted
    """A task whose process dies when the body has ended and nobody knows that yet."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.run(*args, **kwargs)
        if kwargs.get("dies") == "after":
            die_once(f"after {self.request.id}")
        return result


LATE: dict[str, Any] = {"acks_late": True, "reject_on_worker_lost": True}


@shared_task(**LATE)
@single_instance("killed", ttl=2)
def killed() -> str:
    work()
    die_once("killed")
    return "done"


@shared_task(acks_late=True)
@single_instance("given up", ttl=1)
def given_up() -> None:
    work()
    die()


@shared_task
@single_instance("acked early", ttl=1)
def acked_early() -> None:
    work()
    die()


@shared_task(base=Mortal, **LATE)
@single_instance("told late", ttl=2, min_hold=1)
def told_late(dies: str) -> str:
    work()
    return "done"


@shared_task(base=Mortal, bind=True, **LATE)
@single_instance("counted:{key}", on_busy="retry", atomic=True, ttl=1.5)
def counted(self: Task[Any, Any], key: int, dies: str = "") -> str:
    """Count in the database, and be killed once at one of four points."""
    if dies == "before":
        die_once(self.request.id)
    Counter.objects.filter(name=f"counted {key}").update(value=F("value") + 1)
    if dies == "amid":
        die_once(self.request.id)
    return "done"


@shared_task(base=Mortal, bind=True, **LATE)
@single_instance("followed:{key}", atomic=True, ttl=1.5)
def followed(self: Task[Any, Any], key: int, seconds: float, dies: str = "") -> None:
    """Count its own id in the database; it may be killed anywhere."""
    counter, _ = Counter.objects.get_or_create(name=self.request.id)
    work(seconds, pid=os.getpid())
    Counter.objects.filter(pk=counter.pk).update(value=F("value") + 1)


@shared_task(soft_time_limit=1, time_limit=20)
@single_instance("soft", ttl=30)
def soft() -> str:
    try:
        work(15)
    except SoftTimeLimitExceeded:
        note(event="limit", held=not current_lock().lost)
        raise
    return "done"


@shared_task(time_limit=2)
@single_instance("hard", ttl=2)
def hard() -> None:
    work(30)


@shared_task
@single_instance("revoked", ttl=2)
def revoked() -> None:
    work(30)


@shared_task
@single_instance("hung", ttl=1, max_hold=1.5)
def hung(seconds: float) -> str:
    work(seconds)
    return "done"


@shared_task(acks_late=True, bind=True)
@single_instance("long", ttl=2)
def long(self: Task[Any, Any], seconds: float) -> str:
    """Run longer than the visibility timeout."""
    work(seconds, id=self.request.id)
    return "done"


@shared_task(bind=True)
@single_instance("late:{number}")
def late(self: Task[Any, Any], number: int) -> int:
    """Be prefetched for longer than the visibility timeout."""
    work(id=self.request.id)
    return number


@shared_task(autoretry_for=(ValueError,), max_retries=3, default_retry_delay=0)
@single_instance("kept", min_hold=60)
def kept() -> str:
    work()
    if first_time("kept"):
        raise ValueError("the first time")
    return "done"


@shared_task(bind=True)
@single_instance("polite")
def polite(self: Task[Any, Any]) -> str:
    """Publish the next try without an exception."""
    work()
    if self.request.retries == 0:
        self.retry(countdown=0, throw=False)
    return "done"


@shared_task
@single_instance("inner:{number}")
def inner(number: int) -> str:
    current_lock().check()
    return current_lock().name


@shared_task
@single_instance("outer:{number}", ttl=2)
def outer(number: int, together: int) -> list[Any]:
    """Tell the names of the locks that a run has at hand, while others run beside it."""
    lease = current_lock()
    names = [lease.name]
    note(event="start")
    deadline = time.monotonic() + 20
    while starts() < together:
        assert time.monotonic() < deadline, "they do not run at once"
        time.sleep(0.05)
    names.append(inner.apply((number,), throw=True).result)
    names.append(current_lock().name)
    lease.check()
    return [*names, lease.token]
