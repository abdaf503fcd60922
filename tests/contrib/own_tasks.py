"""Tasks of Django's own kind, which real workers run; what they did stands in the database."""

from __future__ import annotations

import asyncio
import importlib
import time
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.db.models import F

from distlock import LockBusy, lock
from distlock.contrib.tasks import once, single_instance
from tests.app.models import Counter

tasks: Any = importlib.import_module(settings.DJANGO_TASKS)
task = tasks.task


def note(name: str) -> None:
    """Count something that happened."""
    Counter.objects.get_or_create(name=name)
    Counter.objects.filter(name=name).update(value=F("value") + 1)


def noted(name: str) -> int:
    return sum(Counter.objects.filter(name=name).values_list("value", flat=True))


def alone(seconds: float) -> None:
    """Work that must not overlap: `name` counts who is inside, `overlap` who met somebody."""
    note("begun")
    Counter.objects.filter(name="inside").update(value=F("value") + 1)
    if noted("inside") > 1:
        note("overlap")
    time.sleep(seconds)
    Counter.objects.filter(name="inside").update(value=F("value") - 1)


@task()
@single_instance
def skipping(account: int, seconds: float = 0.0) -> str:
    alone(seconds)
    return "done"


@task()
@single_instance("waiting:{account}", on_busy="wait", wait=20)
def waiting(account: int, seconds: float = 0.0) -> str:
    alone(seconds)
    return "done"


@task()
@single_instance("skipping by hand", on_busy="raise", ttl=1.5)
def raising(seconds: float = 0.0) -> str:
    alone(seconds)
    return "done"


def told(busy: LockBusy) -> dict[str, str]:
    note("told")
    return {"told": busy.name}


@task()
@single_instance(on_busy=told)
async def in_coroutine(account: int, seconds: float = 0.0) -> str:
    await sync_to_async(note)("begun")
    await asyncio.sleep(seconds)
    return "done"


@task(takes_context=True)
@single_instance
def with_context(context: Any, account: int) -> str:
    name = f'{__name__}.with_context:{{"account":{account}}}'
    return str(lock(name).holder())


@task()
@once("charge:{order}", ttl=1.5)
def charge(order: int, seconds: float = 0.0) -> list[int]:
    note("charge")
    time.sleep(seconds)
    return [order]


@task(takes_context=True)
@once(atomic=False)
async def charge_in_coroutine(context: Any, order: int) -> str:
    await sync_to_async(note)("charge")
    return str(context.task_result.id)


@task()
@once(on_duplicate="skip")
def skips(*names: str) -> None:
    note("skips")


@task()
@once("not JSON")
def not_json() -> set[int]:
    note("not JSON")
    return {1}


@task(backend="immediate")
@single_instance
def nests(again: bool) -> Any:
    return nests.enqueue(again).return_value if again else None


@task(backend="immediate")
@single_instance("nests")
def nests_in_itself(deep: bool = True) -> Any:
    return nests_in_itself.enqueue(deep=False).return_value if deep else "inside"
