"""`single_instance` in real workers, over a real broker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from celery import chain, chord
from celery.result import AsyncResult

from distlock import LockBusy, lock
from tests.contrib import tasks
from tests.contrib.celery_app import answers, noted
from tests.contrib.conftest import Worker

pytestmark = pytest.mark.usefixtures("worker")

LIMIT = 30.0


def result_of(sent: AsyncResult[Any]) -> Any:
    """The result, or its exception; never a wait without end."""
    return sent.get(timeout=LIMIT, propagate=True)


def wait_until(condition: Callable[[], Any], limit: float = LIMIT) -> Any:
    deadline = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < deadline, f"nothing after {limit} s; noted: {noted()}"
        time.sleep(0.05)
    return found


def wait_for_start(count: int = 1) -> None:
    wait_until(lambda: tasks.starts() >= count)


def overlaps() -> int:
    """How many runs began before the one before them had ended."""
    events = [entry["event"] for entry in sorted(noted(), key=lambda entry: entry["at"])]
    return sum(pair == ("start", "start") for pair in pairwise(events))


@contextmanager
def held(name: str) -> Iterator[None]:
    with lock(name, ttl=60, note="the test"):
        yield


# -- busy ----------------------------------------------------------------------------------------


def test_a_duplicate_is_skipped_with_a_plain_result() -> None:
    first = tasks.skipping.delay(7, 1.5)
    wait_for_start()
    duplicate = tasks.skipping.delay(seconds=1.5, number=7)
    other = tasks.skipping.delay(8)
    skipped = result_of(duplicate)
    assert skipped == {
        "distlock": "skipped",
        "reason": "busy",
        "lock": 'tests.contrib.tasks.skipping:{"number":7,"seconds":1.5}',
        "holder": skipped["holder"],
    }
    assert f"task tests.contrib.tasks.skipping[{first.id}]" in skipped["holder"]
    assert duplicate.state == "SUCCESS"
    assert result_of(other) == 8
    assert result_of(first) == 7
    assert tasks.starts() == 2


def test_the_holder_is_the_task() -> None:
    sent = tasks.skipping.delay(1, 1)
    wait_for_start()
    holder = lock('tests.contrib.tasks.skipping:{"number":1,"seconds":1}').holder()
    assert holder is not None
    assert holder.thread == f"task tests.contrib.tasks.skipping[{sent.id}]"
    result_of(sent)


def test_retry_comes_back_until_the_lock_is_free_and_is_not_charged() -> None:
    with held("retrying"):
        sent = tasks.retrying.delay()  # its max_retries is 0
        wait_until(lambda: sent.state == "RETRY")
        time.sleep(2)
        assert tasks.starts() == 0
    assert result_of(sent) == "done"
    assert tasks.starts() == 1


def test_retries_of_many_run_one_after_the_other() -> None:
    sent = [tasks.retrying.delay(0.2) for _ in range(4)]
    assert [result_of(one) for one in sent] == ["done"] * 4
    assert tasks.starts() == 4
    assert overlaps() == 0


def test_wait_waits_in_the_worker() -> None:
    sent = [tasks.waiting.delay(1, 0.3) for _ in range(3)]
    assert [result_of(one) for one in sent] == ["done"] * 3
    assert overlaps() == 0


def test_raise_fails_with_lock_busy() -> None:
    with held("raising"):
        sent = tasks.raising.delay()
        with pytest.raises(LockBusy, match="raising"):
            result_of(sent)
    assert sent.state == "FAILURE"


def test_a_callable_makes_the_result() -> None:
    with held("telling"):
        assert result_of(tasks.telling.delay()) == "telling is held by the test"
    assert result_of(tasks.telling.delay()) == "done"


# -- chains and chords ---------------------------------------------------------------------------


def test_a_chain_goes_on_with_a_skipped_member() -> None:
    with held('tests.contrib.tasks.skipping:{"number":1,"seconds":0}'):
        sent = chain(tasks.skipping.s(1), tasks.total.s()).delay()
        assert result_of(sent)["distlock"] == "skipped"


def test_a_chord_completes_with_a_skipped_member() -> None:
    with held('tests.contrib.tasks.skipping:{"number":1,"seconds":0}'):
        header = [tasks.skipping.s(1), tasks.skipping.s(2), tasks.bound.s(3)]
        first, second, third = result_of(chord(header, tasks.total.s()).delay())
    assert first["distlock"] == "skipped"
    assert second == 2
    assert third.endswith(" 3")


def test_a_chord_completes_with_a_member_that_is_retried() -> None:
    with held("retrying"):
        sent = chord([tasks.retrying.s(), tasks.skipping.s(2)], tasks.total.s()).delay()
        time.sleep(1)
    assert result_of(sent) == ["done", 2]


# -- what is never dropped -----------------------------------------------------------------------


def test_bound_tasks_and_a_second_delivery_of_the_same_id() -> None:
    sent = tasks.bound.apply_async((5, 2), task_id="twin")
    wait_for_start()
    tasks.bound.apply_async((5, 0), task_id="twin")
    assert result_of(sent) == "twin 5"
    wait_until(lambda: len(answers("twin")) == 2)
    assert answers("twin")[1] == "twin 5"  # a duplicate has the first run's result
    assert tasks.starts() == 1


def test_an_automatic_retry_runs_again() -> None:
    sent = tasks.flaky.delay()
    assert result_of(sent) == "done"
    assert tasks.starts() == 2


def test_a_retry_that_meets_another_holder_is_not_skipped() -> None:
    with held("flaky"):
        sent = tasks.flaky.apply_async(retries=1)
        wait_until(lambda: sent.state == "RETRY")
    assert result_of(sent) == "done"


def test_a_retry_from_inside_that_overtakes_its_own_release() -> None:
    sent = tasks.tidy.delay(1.0)
    assert result_of(sent) == "done with 1 retries"
    assert tasks.starts() == 2
    assert overlaps() == 0


def test_a_task_whose_process_was_killed_runs_again_after_the_ttl() -> None:
    sent = tasks.dying.delay()
    assert result_of(sent) == "done"
    first, second = (entry["at"] for entry in noted())
    assert 2.5 < second - first < 12


def test_a_killed_worker_holds_its_lock_no_longer_than_the_ttl(
    start_worker: Callable[..., Worker],
) -> None:
    victim = start_worker("victim", "-P", "solo", "-Q", "doomed")
    sent = tasks.doomed.apply_async(queue="doomed")
    wait_for_start()
    time.sleep(2.5)  # longer than the ttl: it is renewed
    holder = lock("doomed").holder()
    assert holder is not None
    assert holder.thread == f"task tests.contrib.tasks.doomed[{sent.id}]"
    victim.kill()
    with pytest.raises(LockBusy):
        lock("doomed").acquire(wait=0)
    with lock("doomed", wait=3):
        pass
