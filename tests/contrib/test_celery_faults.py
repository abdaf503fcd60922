"""`single_instance` in real workers that are killed, stopped, or given a message twice.

Targets: no run too many, no task lost (it ran, was skipped in favour of another id, or waits in the
queue), and no lock that stays after its ttl.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from celery import chain, group
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from django.db import connection

from distlock import LockLost, lock
from distlock.backends import backend_for
from tests.app.models import Counter
from tests.contrib import faulty, tasks
from tests.contrib.celery_app import answers, first_time, noted
from tests.contrib.conftest import Broker, Worker
from tests.contrib.test_celery_workers import (
    held,
    overlaps,
    result_of,
    wait_for_start,
    wait_until,
)
from tests.support import is_free

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.vendor("postgresql", "mysql"),
]

both = pytest.mark.parametrize("broker", ["redis", "rabbitmq"], indirect=True)
redis = pytest.mark.parametrize("broker", ["redis"], indirect=True)
impatient = pytest.mark.parametrize("broker", ["impatient"], indirect=True)
matrix = pytest.mark.vendor("postgresql")


def wait_until_free(name: str, limit: float) -> None:
    wait_until(lambda: is_free(name), limit)


def is_duplicate(answer: Any) -> bool:
    return isinstance(answer, dict) and answer.get("distlock") == "duplicate"


# -- killed --------------------------------------------------------------------------------------


@both
def test_a_killed_run_is_done_again_by_its_own_id(broker: Broker) -> None:
    sent = faulty.killed.delay()
    assert result_of(sent) == "done"
    first, _, second, _ = noted()
    assert second["at"] - first["at"] > 1.5  # not before its own lease has ended
    assert tasks.starts() == 2
    wait_until(lambda: answers(sent.id))
    assert answers(sent.id) == ["done"]


@matrix
@redis
@pytest.mark.parametrize("task", ["given_up", "acked_early"])
def test_a_killed_run_that_celery_gives_up_leaves_no_lock(broker: Broker, task: str) -> None:
    sent: AsyncResult[Any] = getattr(faulty, task).delay()
    with pytest.raises(WorkerLostError):
        result_of(sent)
    wait_until_free(task.replace("_", " "), 2)
    assert tasks.starts() == 1


@both
def test_a_run_that_was_done_is_not_done_again(broker: Broker) -> None:
    """Its process dies after the receipt, and before anybody was told."""
    sent = faulty.told_late.delay(dies="after")
    marker = result_of(sent)
    assert marker == {
        "distlock": "duplicate",
        "lock": "told late",
        "task_id": sent.id,
        "finished_at": marker["finished_at"],
    }
    assert tasks.starts() == 1
    wait_until_free("told late", 2)


@both
def test_what_is_killed_at_any_point_counts_once(broker: Broker) -> None:
    keys, points = range(2), ["", "before", "amid", "after"]
    for key in keys:
        Counter.objects.create(name=f"counted {key}")
    dies = [point for _ in keys for point in points]
    sent = [faulty.counted.delay(key=at // len(points), dies=d) for at, d in enumerate(dies)]
    results = [sent_one.get(timeout=60) for sent_one in sent]
    for point, one, result in zip(dies, sent, results, strict=True):
        assert is_duplicate(result) if point == "after" else result == "done"
        asked = f"after {one.id}" if point == "after" else one.id
        assert first_time(asked) is (point == ""), "it was not killed"
    assert {one.name: one.value for one in Counter.objects.all()} == {
        f"counted {key}": len(points) for key in keys
    }
    for key in keys:
        wait_until_free(f"counted:{key}", 2)


@matrix
@pytest.mark.parametrize("broker", ["rabbitmq", "impatient"], indirect=True)
def test_a_worker_that_is_killed_is_replaced_by_another(
    broker: Broker, start_worker: Callable[..., Worker]
) -> None:
    victim = start_worker("gone", "-P", "prefork", "-c", "1", "-Q", "gone", broker=broker.url)
    sent = faulty.long.apply_async((0.5,), queue="gone")
    doomed = faulty.long.apply_async((60,), queue="gone", task_id="doomed")
    assert result_of(sent) == "done"
    wait_for_start(2)
    victim.kill()
    heir = start_worker("heir", "-P", "solo", "-Q", "gone", broker=broker.url)
    wait_for_start(3)
    assert [entry["id"] for entry in noted() if entry["event"] == "start"][1:] == ["doomed"] * 2
    heir.kill()
    assert doomed.state != "SUCCESS"
    wait_until_free("long", 3)


# -- time limits and revoke ----------------------------------------------------------------------


@matrix
@redis
def test_a_soft_time_limit_frees_the_lock_at_once(broker: Broker) -> None:
    sent = faulty.soft.delay()
    with pytest.raises(SoftTimeLimitExceeded):
        result_of(sent)
    assert noted()[1] == {"event": "limit", "held": True}
    assert is_free("soft")


@matrix
@redis
def test_a_hard_time_limit_frees_the_lock_after_its_ttl(broker: Broker) -> None:
    sent = faulty.hard.delay()
    with pytest.raises(TimeLimitExceeded):
        result_of(sent)
    wait_until_free("hard", 3)


@matrix
@redis
def test_revoking_with_terminate_frees_the_lock_after_its_ttl(broker: Broker) -> None:
    sent = faulty.revoked.delay()
    wait_for_start()
    sent.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        result_of(sent)
    wait_until_free("revoked", 3)
    before = faulty.revoked.apply_async(countdown=2)
    before.revoke()
    with pytest.raises(TaskRevokedError):
        result_of(before)
    assert is_free("revoked")
    assert tasks.starts() == 1


@matrix
@redis
def test_a_body_that_hangs_holds_no_longer_than_max_hold(broker: Broker) -> None:
    sent = faulty.hung.delay(4)
    wait_for_start()
    assert not is_free("hung")
    wait_until_free("hung", 3.8)
    with pytest.raises(LockLost):
        result_of(sent)


# -- delivered twice -----------------------------------------------------------------------------


@impatient
def test_a_twin_of_a_visibility_timeout_does_not_run(broker: Broker) -> None:
    following = chain(faulty.long.s(5), tasks.total.s())()
    sent = following.parent
    assert result_of(following) == "done"
    wait_until(lambda: len(answers(sent.id)) >= 2)
    assert set(answers(sent.id)) == {"done"}
    assert tasks.starts() == 1
    broker.wait_until_quiet()
    wait_until(lambda: answers(following.id))
    assert answers(following.id) == ["done"]  # it was not published again


@matrix
@impatient
def test_a_copy_that_was_late_does_not_run(
    broker: Broker, start_worker: Callable[..., Worker]
) -> None:
    """A worker had prefetched it, and it is none that the broker would call redelivered."""
    options = ("-P", "prefork", "-c", "1", "--prefetch-multiplier", "4", "-Q", "late")
    start_worker("slow", *options, broker=broker.url)
    busy = tasks.bound.apply_async((1, 8), queue="late")
    wait_for_start()
    sent = faulty.late.apply_async((2,), queue="late")
    broker.wait_until_taken("late")
    broker.app.control.add_consumer("late", destination=[broker.worker.name])
    assert result_of(sent) == 2
    broker.app.control.cancel_consumer("late", destination=[broker.worker.name])
    assert busy.state != "SUCCESS", "it was not late"
    wait_until(lambda: len(answers(sent.id)) >= 2)
    assert set(answers(sent.id)) == {2}
    assert tasks.starts() == 2
    broker.wait_until_quiet("late")


@both
def test_a_retry_from_inside_that_overtakes_its_own_release(broker: Broker) -> None:
    sent = tasks.tidy.delay(1.0)
    assert result_of(sent) == "done with 1 retries"
    assert tasks.starts() == 2
    assert overlaps() == 0


@matrix
@redis
def test_a_run_that_has_published_its_next_one_is_not_done(broker: Broker) -> None:
    faulty.polite.delay()
    wait_for_start(2)


@both
def test_a_redelivery_that_meets_another_holder_is_not_skipped(broker: Broker) -> None:
    sent = faulty.killed.delay()
    wait_for_start()
    dead = lock("killed").holder()
    assert dead is not None
    assert backend_for(connection).force_release(connection, "killed", 0, dead.token)
    with lock("killed", wait=0, ttl=60):
        wait_until(lambda: sent.state == "RETRY")
    assert result_of(sent) == "done"
    assert tasks.starts() == 2


# -- min_hold ------------------------------------------------------------------------------------


@both
def test_its_own_min_hold_is_not_in_the_way_of_a_retry(broker: Broker) -> None:
    sent = faulty.kept.delay()
    assert result_of(sent) == "done"
    assert tasks.starts() == 2
    twin = faulty.kept.delay()
    assert result_of(twin)["distlock"] == "skipped"
    assert result_of(twin)["reason"] == "too_soon"
    again = faulty.kept.apply_async(retries=1)
    assert result_of(again)["reason"] == "too_soon"
    late = faulty.kept.apply_async(task_id=sent.id)
    wait_until(lambda: len(answers(sent.id)) == 2)
    assert answers(sent.id) == ["done", "done"]
    assert late.result == "done"
    assert tasks.starts() == 2
    assert not is_free("kept")


# -- groups and pools ----------------------------------------------------------------------------


@both
def test_a_group_completes_with_a_skipped_member(broker: Broker) -> None:
    with held('tests.contrib.tasks.skipping:{"number":1,"seconds":0}'):
        members = group(tasks.skipping.s(1), tasks.skipping.s(2), tasks.bound.s(3))
        first, second, third = result_of(members.delay())
    assert first["distlock"] == "skipped"
    assert second == 2
    assert third.endswith(" 3")


@pytest.mark.parametrize(
    ("broker", "pool"), [("redis", "threads"), ("rabbitmq", "gevent")], indirect=["broker"]
)
def test_each_of_many_runs_at_once_has_its_own_current_lock(
    broker: Broker, pool: str, start_worker: Callable[..., Worker]
) -> None:
    start_worker(f"many-{pool}", "-P", pool, "-c", "6", "-Q", pool, broker=broker.url)
    sent = [faulty.outer.apply_async((n, 6), queue=pool) for n in range(6)]
    results = [result_of(one) for one in sent]
    for n, (first, nested, last, _) in enumerate(results):
        assert (first, nested, last) == (f"outer:{n}", f"inner:{n}", f"outer:{n}")
    assert len({token for *_, token in results}) == 6
