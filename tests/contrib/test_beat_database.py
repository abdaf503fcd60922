"""The same over django-celery-beat. Where its Django is too old for ours, there is nothing here."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from celery.schedules import crontab
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings
from django_celery_beat.models import (
    ClockedSchedule,
    CrontabSchedule,
    IntervalSchedule,
    PeriodicTask,
)

from distlock.contrib.beat_database import SingleDatabaseBeatScheduler
from tests.contrib.world import START, Dies, World, elsewhere

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])


@pytest.fixture
def world(world: World) -> World:
    world.kind = SingleDatabaseBeatScheduler
    return world


def every(seconds: int, name: str = "a", **more: Any) -> PeriodicTask:
    """An entry that ran at the start, so that the fake clock matters and the real one does not."""
    interval, _ = IntervalSchedule.objects.get_or_create(every=seconds, period="seconds")
    more.setdefault("last_run_at", START)
    return PeriodicTask.objects.create(name=name, task=f"do.{name}", interval=interval, **more)


def ran_last(name: str = "a") -> float:
    at: datetime = PeriodicTask.objects.get(name=name).last_run_at
    return (at - START).total_seconds()


def test_every_kind_of_schedule_asks_the_database_what_time_it_is(world: World) -> None:
    every(10)
    cron = CrontabSchedule.objects.create(minute="*", timezone="Asia/Tokyo")
    PeriodicTask.objects.create(name="b", task="do.b", crontab=cron, last_run_at=START)
    once = ClockedSchedule.objects.create(clocked_time=START + timedelta(seconds=33))
    PeriodicTask.objects.create(name="c", task="do.c", clocked=once, one_off=True)
    every(10, "d", start_time=START + timedelta(seconds=45), last_run_at=None)
    one = world.beat()
    world.run(one, 69)
    ticks = world.ticks()
    assert [tick for tick in ticks if tick[0] == "a"] == [f"a {n}" for n in range(10, 70, 10)]
    assert [tick for tick in ticks if tick[0] == "b"] == ["b 60"]
    assert [tick for tick in ticks if tick[0] == "c"] == ["c 33"]
    assert len([tick for tick in ticks if tick[0] == "d"]) == 3
    one.close()


def test_the_table_says_at_once_when_an_entry_ran(world: World) -> None:
    every(10)
    one = world.beat()
    world.run(one, 23)
    assert ran_last() == 20
    assert PeriodicTask.objects.get(name="a").total_run_count == 2
    one.close()


def test_the_next_leader_goes_on_where_the_last_one_ended(world: World) -> None:
    every(10)
    one, two = world.beat(), world.beat()
    world.run(one, 15)
    world.run(one, 10)
    one.close()
    world.seconds += 17
    world.run(two, 13)
    assert world.ticks() == ["a 10", "a 20", "a 30", "a 40", "a 50"]
    two.close()


def test_a_leader_that_dies_before_it_has_noted_a_tick(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    every(10)
    one, two = world.beat(), world.beat()
    world.run(one, 9)

    def die(name: str) -> None:
        raise Dies

    monkeypatch.setattr(one, "remember", die)
    with pytest.raises(Dies):
        world.run(one, 2)
    one.stand_down()
    one.sync()
    assert ran_last() == 0
    world.run(two, 10)
    first, again, other = world.sent()
    assert first == again
    assert other[1] == "20"
    two.close()


def test_a_leader_that_was_paused_does_not_write_over_what_came_since(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own scheduler writes what it knows every few minutes, and when it ends."""
    every(10)
    one = world.beat()
    world.run(one, 10 - 1e-3)
    with elsewhere() as other:
        two = world.beat()
        world.pause_while_it_sends(one, lambda: other(world.run, two, 25))
        world.run(one, 0.5)
        assert [at for _, at, _ in world.sent()] == ["10", "20", "30", "10"]
        one.sync()
        assert ran_last() == 30
        other(two.close)
    one.close()
    assert ran_last() == 30


def test_an_entry_counts_from_when_the_first_leader_saw_it(world: World) -> None:
    entry = every(10, last_run_at=None)
    PeriodicTask.objects.filter(pk=entry.pk).update(date_changed=START)
    one = world.beat()
    world.run(one, 5)
    assert ran_last() == 0
    one.close()


def test_an_entry_that_is_changed_is_read_again(world: World) -> None:
    entry = every(10)
    one = world.beat()
    world.run(one, 15)
    entry.refresh_from_db()
    entry.interval, _ = IntervalSchedule.objects.get_or_create(every=5, period="seconds")
    entry.save()
    world.run(one, 11)
    assert world.ticks() == ["a 10", "a 15", "a 20", "a 25"]
    one.close()


def test_the_schedule_of_the_settings_is_taken_into_the_table(world: World) -> None:
    world.every(m=crontab(minute="*/2"))
    one = world.beat()
    PeriodicTask.objects.update(last_run_at=START)
    world.run(one, 250)
    assert world.ticks() == ["m 120", "m 240"]
    one.close()


@override_settings(DJANGO_CELERY_BEAT_TZ_AWARE=False)
def test_naive_moments_are_utc(world: World) -> None:
    every(10)
    one = world.beat()
    assert next(iter(one.schedule.values())).default_now() == START.replace(tzinfo=None)
    one.close()


def test_the_lock_is_in_the_database_of_the_schedule(world: World) -> None:
    assert world.beat().lock.alias == "default"
    world.app.conf.distlock_beat_using = "other"
    with pytest.raises(ImproperlyConfigured, match="must be in one database"):
        world.beat()
