"""One beat after the other in this process, over a broker in memory, by a clock of our own."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from typing import Any

import pytest
from celery import Celery
from celery.schedules import BaseSchedule, crontab, schedstate, schedule
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, connection
from kombu.exceptions import OperationalError as BrokerError

from distlock import LockError, LockLost, lock, signals
from distlock.backends import backend_for
from distlock.contrib import _ticks
from distlock.contrib._ticks import tick_of
from distlock.contrib.beat import SingleBeatScheduler
from distlock.leases import Lease
from distlock.models import Job
from tests.contrib.world import NAME, START, Dies, World, elsewhere, pause_keeper
from tests.waiters import calls_of

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])


def test_an_interval_ticks_in_step(world: World) -> None:
    world.every(a=10, b=4)
    one = world.beat()
    world.run(one, 20.5)
    assert world.ticks() == ["b 4", "b 8", "a 10", "b 12", "b 16", "a 20", "b 20"]
    one.close()


# -- ticks ---------------------------------------------------------------------------------------


def test_a_tick_says_when_it_fell_due_and_for_which_entry(world: World) -> None:
    world.every(a=10)
    world.app.conf.beat_schedule["a"]["options"] = {"headers": {"mine": 1}, "priority": 3}
    one = world.beat()
    entry = one.schedule["a"]
    world.run(one, 25)
    with world.app.connection_for_read() as broker, broker.SimpleQueue("celery") as queue:
        headers = [queue.get_nowait().headers for _ in range(2)]
    assert headers[0]["distlock_tick"] == "2026-03-01T12:00:10+00:00"
    assert [header["mine"] for header in headers] == [1, 1]
    assert headers[0]["id"] != headers[1]["id"]
    assert entry.options == {"headers": {"mine": 1}, "priority": 3}
    one.close()


def test_a_tick_that_is_sent_late_does_not_move_the_next(world: World) -> None:
    world.every(a=10)
    one = world.beat()
    world.run(one, 9)
    world.seconds += 3.5
    world.run(one, 10)
    assert world.ticks() == ["a 10", "a 20"]
    one.close()


def test_the_schedule_of_cron_and_the_zone(world: World) -> None:
    world.every(minute=crontab(), lunch=crontab(hour="13", minute="2"))
    one = world.beat()
    world.run(one, 185)
    assert world.ticks() == ["minute 60", "lunch 120", "minute 120", "minute 180"]
    one.close()


class Sun(BaseSchedule):
    """It rises every hundred seconds. Asked from a sunrise, it names that one, or the next."""

    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        rises = -(-last_run_at.timestamp() // 100) * 100
        return timedelta(seconds=rises - self.now().timestamp())

    def is_due(self, last_run_at: datetime) -> Any:
        left = self.remaining_estimate(last_run_at).total_seconds()
        return schedstate(left <= -0.5, max(left + 0.5, 0))


def test_a_schedule_that_may_name_a_tick_twice_is_reckoned_from_now(world: World) -> None:
    world.every(a=Sun())
    one = world.beat()
    world.run(one, 10)
    world.sent()
    world.seconds += 0.25
    world.run(one, 240)
    assert world.ticks() == ["a 100", "a 200"]
    one.close()


def test_an_interval_of_nothing_makes_ticks_of_their_own(world: World) -> None:
    world.every(a=0)
    one = world.beat()
    for _ in range(4):
        one.tick()
        world.seconds += 0.25
    ids = [id_ for _, _, id_ in world.sent()]
    assert len(ids) == len(set(ids)) >= 3
    one.close()


def test_beats_of_two_names_have_ticks_of_their_own(world: World) -> None:
    world.every(a=10, b=10)
    one = world.beat()
    late = START + timedelta(seconds=11)
    ids = [
        tick_of(name, entry, late, timedelta(0)).id
        for name in ("one beat", "other beat")
        for entry in one.schedule.values()
    ]
    assert len(set(ids)) == 4
    one.close()


@pytest.mark.parametrize(
    ("begin", "hours"), [("2026-03-28T23:00:00", [1, 1, 1, 1]), ("2026-10-24T23:00:00", [1, 2, 1])]
)
def test_the_night_on_which_the_clocks_change(world: World, begin: str, hours: list[int]) -> None:
    """Celery's crontab passes over the hour that comes twice; that remains so."""
    world.seconds = datetime.fromisoformat(begin).replace(tzinfo=timezone.utc).timestamp()
    world.every(hourly=crontab(minute="30"), often=1800)
    one = world.beat()
    world.run(one, 5 * 3600)
    sent = [(entry, at) for entry, at, _ in world.sent()]
    assert len(sent) == len(set(sent))
    hourly = sorted(float(at) for entry, at in sent if entry == "hourly")
    assert [(after - before) / 3600 for before, after in pairwise(hourly)] == hours
    assert sum(entry == "often" for entry, _ in sent) == 10
    one.close()


def test_beats_own_entry_for_old_results_is_there(world: World) -> None:
    world.app.conf.result_expires = 3600
    world.every(a=10)
    one = world.beat()
    assert set(one.schedule) == {"a", "celery.backend_cleanup"}
    one.close()


# -- from one leader to the next -----------------------------------------------------------------


@pytest.mark.parametrize("gap", [0, 3])
def test_the_next_leader_goes_on_where_the_last_one_ended(world: World, gap: float) -> None:
    world.every(a=10, b=crontab())
    one, two = world.beat(), world.beat()
    world.run(one, 64)
    assert world.ticks()[-3:] == ["a 50", "a 60", "b 60"]
    one.close()
    world.seconds += gap
    three = world.beat()  # it was started in the middle of an interval
    world.run(three, 10)
    three.close()
    world.run(two, 10)  # it has waited from the beginning
    assert world.ticks() == ["a 70", "a 80"]
    two.close()


def test_ticks_that_fall_due_between_two_leaders_are_sent_late(world: World) -> None:
    world.every(a=10, b=crontab())
    one, two = world.beat(), world.beat()
    world.run(one, 25)
    one.close()
    world.seconds += 37
    world.run(two, 9)
    assert world.ticks() == ["a 10", "a 20", "a 30", "a 40", "a 50", "a 60", "b 60", "a 70"]
    two.close()


def test_of_ticks_that_are_long_overdue_one_is_sent(world: World) -> None:
    world.every(a=10)
    one, two = world.beat(), world.beat()
    world.run(one, 15)
    one.close()
    world.seconds += 600
    world.run(two, 12)
    assert world.ticks() == ["a 10", "a 20", "a 625"]
    two.close()


def test_catch_up_can_be_set(world: World) -> None:
    world.app.conf.distlock_beat_catch_up = 0
    world.every(a=10)
    one = world.beat()
    world.run(one, 5)
    world.seconds += 26
    world.run(one, 12)
    assert world.ticks() == ["a 10", "a 41"]
    one.close()


def test_an_entry_counts_from_when_the_first_leader_saw_it(world: World) -> None:
    world.every(a=10)
    one = world.beat()
    world.run(one, 9)  # and is killed before the first tick
    one.stand_down()
    two = world.beat()
    world.run(two, 2)
    assert world.ticks() == ["a 10"]
    two.close()


def test_an_entry_that_is_gone_is_forgotten(world: World) -> None:
    world.every(a=10, b=10)
    one = world.beat()
    world.run(one, 11)
    one.close()
    world.every(a=10)
    two = world.beat()
    world.run(two, 20)
    assert list(Job.objects.get(key=NAME).result) == ["a"]
    two.close()
    world.every(a=10, b=10)
    world.sent()
    three = world.beat()  # b is new again, at 31
    world.run(three, 12)
    assert world.ticks() == ["a 40", "b 41"]
    three.close()


def test_a_leader_that_dies_before_it_has_noted_a_tick(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent again, with the same id: the worker knows it."""
    world.every(a=10)
    one, two = world.beat(), world.beat()
    world.run(one, 9)

    def die(name: str) -> None:
        raise Dies

    monkeypatch.setattr(one, "remember", die)
    with pytest.raises(Dies):
        world.run(one, 2)
    one.stand_down()  # its lock expired
    world.seconds += 4
    world.run(two, 10)
    first, again, other = world.sent()
    assert first == again
    assert first[1] == "10"
    assert other[1] == "20"
    assert other[2] != first[2]
    two.close()


def test_a_leader_that_was_paused_sends_nothing(world: World) -> None:
    world.every(a=10)
    one = world.beat()
    world.run(one, 9)
    pause_keeper()
    world.take_away()
    with elsewhere() as other:
        two = world.beat()
        other(world.run, two, 3)
        assert world.ticks() == ["a 10"]
        assert one.lease is not None  # it does not know yet
        world.seconds += 9
        assert one.tick() == 1  # a 20 is due, and it finds out
        assert world.ticks() == []
        assert one.lease is None
        other(world.run, two, 1)
        other(two.close)
    world.run(one, 12)  # and it leads again
    assert world.ticks() == ["a 20", "a 30"]
    one.close()


def test_a_leader_that_was_paused_in_the_middle_sends_a_twin_and_notes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.every(a=10)
    one = world.beat()
    world.run(one, 10 - 1e-3)
    with elsewhere() as other:
        two = world.beat()
        world.pause_while_it_sends(one, lambda: other(world.run, two, 25))
        world.run(one, 0.5)
        sent = world.sent()
        assert [at for _, at, _ in sent] == ["10", "20", "30", "10"]
        assert sent[0] == sent[3]
        other(world.run, two, 6)
        assert world.ticks() == ["a 40"]
        other(two.close)
    one.close()


def in_use(lease: Lease) -> None:
    raise LockError("a running transaction has its row locked. It still is yours")


def test_a_row_that_somebody_has_for_a_moment_is_no_reason_to_stand_down(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.every(a=10)
    one = world.beat()
    monkeypatch.setattr(Lease, "renew", in_use)
    world.run(one, 25)
    assert world.ticks() == ["a 10", "a 20"]
    one.close()


def test_a_leader_whose_row_is_in_use_does_not_outlive_its_lease(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.every(a=10)
    one = world.beat()
    world.run(one, 1)
    lease = one.lease
    assert lease is not None
    monkeypatch.setattr(Lease, "renew", in_use)
    one._prove(lease)
    world.take_away()
    lease._term.lose("it was taken away")
    with pytest.raises(LockLost):
        one._prove(lease)
    one.close()


def test_a_leader_that_lost_its_lock_follows_and_leads_again(world: World) -> None:
    world.app.conf.update(distlock_beat_ttl=0.2, beat_max_loop_interval=0.5)
    world.every(a=10)
    one = world.beat()
    world.run(one, 11)
    world.take_away()
    with elsewhere() as other:
        held = other(lock(NAME, ttl=60).acquire)
        for _ in range(50):
            if one.lease is None:
                break
            time.sleep(0.02)
            one.tick()
        assert one.lease is None
        assert one.tick() == 0  # it waited
        other(held.release)
    world.run(one, 10)
    assert world.ticks() == ["a 10", "a 20"]
    one.close()


def test_a_beat_that_stands_by_does_not_say_so_each_time(world: World) -> None:
    told: list[str] = []
    signals.lock_busy.connect(receiver := lambda name, **kwargs: told.append(name))
    world.app.conf.update(beat_max_loop_interval=0.05)
    world.every(a=10)
    one, two = world.beat(), world.beat()
    one.tick()
    with elsewhere() as other, calls_of("holder") as asked:
        assert [other(two.tick) for _ in range(3)] == [0, 0, 0]
        other(two.close)
    signals.lock_busy.disconnect(receiver)
    assert told == asked == []
    one.close()


# -- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [BrokerError("no broker"), ConnectionResetError("cut")])
def test_what_the_broker_does_not_take_stays_due(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    world.every(a=10, b=10)
    one = world.beat()
    world.run(one, 9)
    with monkeypatch.context() as broken:

        def refuse(*args: Any, **how: Any) -> None:
            raise error

        broken.setattr(one, "send_task", refuse)
        world.run(one, 5)
        assert lock(NAME).holder() is None  # another beat may reach the broker
    world.run(one, 2)
    assert world.ticks() == ["a 10", "b 10"]
    one.close()


def test_what_cannot_be_sent_at_all_does_not_stop_the_rest(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.every(a=10, b=10)
    world.app.conf.beat_schedule["a"]["args"] = [object()]
    one = world.beat()
    world.run(one, 21)
    assert world.ticks() == ["b 10", "b 20"]
    assert caplog.text.count("beat_tick_failed entry='a'") == 2
    one.close()


def test_a_database_that_is_away_only_delays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.every(a=10)
    one = world.beat()
    world.run(one, 9)
    with monkeypatch.context() as broken:

        def away(self: Any) -> None:
            raise OperationalError("away")

        broken.setattr(_ticks.DatabaseClock, "measure", away)
        world.run(one, 4)
        assert world.ticks() == []
    world.run(one, 10)
    assert world.ticks() == ["a 10", "a 20"]
    one.close()


# -- the end -------------------------------------------------------------------------------------


def test_it_hands_over_at_once(world: World) -> None:
    world.every(a=10)
    one = world.beat()
    world.run(one, 1)
    assert lock(NAME).holder() is not None
    one.close()
    assert lock(NAME).holder() is None
    one.close()


@pytest.mark.parametrize("error", [SystemExit, ValueError])
def test_a_signal_in_the_middle_of_a_pass_ends_that_and_then_beat(
    world: World, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Beat's handler closes the scheduler and exits. Clean-up may hide the exit: redis' does."""
    world.every(a=10)
    one = world.beat()
    world.run(one, 9)
    producer = one.producer

    def signalled(*args: Any, **kwargs: Any) -> None:
        one.close()
        assert lock(NAME).holder() is not None
        assert one.producer is producer
        raise error

    monkeypatch.setattr(one, "send_task", signalled)
    with pytest.raises(SystemExit):
        world.run(one, 3)
    one.close()
    assert lock(NAME).holder() is None
    two = world.beat()
    world.run(two, 1)
    assert world.ticks() == ["a 10"]
    two.close()


# -- settings ------------------------------------------------------------------------------------


def test_the_settings(world: World) -> None:
    world.every(a=10)
    one = world.beat()
    assert (one.lock.name, one.lock.ttl, one.lock.alias) == (NAME, 10, "default")
    world.app.conf.update(
        distlock_beat_name="other beat", distlock_beat_ttl=5, distlock_beat_using="other"
    )
    two = world.beat()
    assert two.info == "    . lock -> other beat (5 s, other)"
    world.run(two, 11)
    assert Job.objects.using("other").filter(key="other beat").exists()
    two.close()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("name", "", "name must have 1 to 255"),
        ("ttl", 0, "ttl must be greater than 0"),
        ("ttl", "10", "ttl must be a number"),
        ("catch_up", -1, "catch_up must be 0 or greater"),
        ("using", "nowhere", "nowhere"),
    ],
)
def test_bad_settings(world: World, setting: str, value: Any, message: str) -> None:
    world.app.conf[f"distlock_beat_{setting}"] = value
    with pytest.raises(ImproperlyConfigured, match=rf"distlock_beat_\*: .*{message}"):
        world.beat()


def test_the_banner_asks_no_database() -> None:
    app = Celery("unit", broker="memory://", set_as_current=False)
    connection.close()
    lazy = SingleBeatScheduler(app=app, lazy=True)
    assert "celery-beat:unit" in lazy.info
    assert connection.connection is None


ABOUT_IMPORTS = """
import sys, django
from django.conf import settings
settings.configure()
import distlock.contrib.celery as adapter
assert "celery.beat" not in sys.modules and "shelve" not in sys.modules
try:
    adapter.SingleBeat
except AttributeError as error:
    assert "distlock.contrib.celery" in str(error)
else:
    raise SystemExit("no error")
"""


def test_workers_do_not_import_the_schedulers() -> None:
    done = subprocess.run([sys.executable, "-c", ABOUT_IMPORTS], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


# -- the clock -----------------------------------------------------------------------------------


def test_the_clock_is_that_of_the_database() -> None:
    app = Celery("unit", broker="memory://", set_as_current=False)
    app.conf.timezone = "Asia/Tokyo"
    found = _ticks.DatabaseClock(app, "default")
    found.measure()
    wanted = backend_for(connection).clock(connection) / 1e6
    assert found.now().timestamp() == pytest.approx(wanted, abs=0.1)
    assert found.now().utcoffset() == timedelta(hours=9)
    with found.stopped_at(START):
        assert found.now() == START


def test_schedules_ask_that_clock(world: World) -> None:
    one = world.beat()
    assert schedule(5, app=world.app).now() == START
    assert crontab(app=world.app).now() == START
    one.close()
