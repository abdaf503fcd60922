"""`once()`: the first call runs, and the others get its result."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.core.handlers.base import BaseHandler
from django.db import IntegrityError, connection, transaction
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory, TestCase

from distlock import AlreadyHeld, JobDuplicate, LockBusy, LockLost, lock, once
from distlock.backends import backend_for
from distlock.backends.base import microseconds_of
from distlock.calls import Call
from distlock.models import Job
from tests.app.models import Counter
from tests.isolation import expire
from tests.support import in_thread, is_free, kill_session, steal
from tests.test_async import run

pytestmark = pytest.mark.django_db(transaction=True)
servers = pytest.mark.vendor("postgresql", "mysql")  # SQLite has one writer at a time


class Work:
    """A body that counts its runs, here and in the database."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, result: Any = None) -> Any:
        self.runs += 1
        Counter.objects.create(name=f"run {self.runs}")
        return result


@pytest.fixture
def work() -> Work:
    return Work()


def effects() -> int:
    return Counter.objects.count()


@pytest.mark.vendor("postgresql", "mysql")
def test_a_connection_that_was_closed_during_a_long_run_costs_no_receipt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distlock.connections.SHORT", 0.0)
    once("k", atomic=False).run(kill_session)
    assert Job.objects.get().state == "done"
    assert is_free("once:k")


@pytest.mark.parametrize("atomic", [True, False])
def test_the_first_call_runs_and_a_later_one_gets_its_result(work: Work, atomic: bool) -> None:
    for _ in range(3):
        assert once("charge:42", atomic=atomic).run(work, {"paid": 1}) == {"paid": 1}
    assert (work.runs, effects()) == (1, 1)


def test_the_receipt_says_what_was_done(work: Work) -> None:
    once("charge:42", keep=60).run(work, [1])
    job = Job.objects.get()
    assert (job.key, job.state, job.result, job.attempts) == ("charge:42", "done", [1], 1)
    assert (job.task, job.task_id, job.arguments) == (f"{__name__}.Work", "", None)
    assert job.token > 0
    assert job.created_at == job.finished_at >= job.started_at
    assert job.expires_at - job.finished_at == timedelta(seconds=60)


def test_a_decorated_function_runs_once_per_key(work: Work) -> None:
    @once("charge:{order}")
    def charge(order: int, *, amount: int = 1) -> int:
        work()
        return order * amount

    assert [charge(2, amount=3), charge(2), charge(order=2), charge(3)] == [6, 6, 6, 3]
    assert work.runs == 2
    assert charge.__name__ == "charge"


@pytest.mark.parametrize("atomic", [True, False])
def test_a_body_that_raises_leaves_no_receipt(work: Work, atomic: bool) -> None:
    def fail() -> None:
        work()
        raise KeyError("x")

    for _ in range(2):
        with pytest.raises(KeyError):
            once("k", atomic=atomic).run(fail)
    assert work.runs == 2
    assert effects() == (0 if atomic else 2)
    assert once("k", atomic=atomic).run(work, "done") == "done"
    assert Job.objects.get().attempts == (1 if atomic else 3)


def test_on_duplicate(work: Work) -> None:
    once("k").run(work, 7)
    assert once("k", on_duplicate="return").run(work) == 7
    assert once("k", on_duplicate="skip").run(work) is None
    with pytest.raises(JobDuplicate, match="'k'") as caught:
        once("k", on_duplicate="raise").run(work)
    error, job = caught.value, Job.objects.get()
    assert (error.key, error.result, error.finished_at) == ("k", 7, job.finished_at)
    assert work.runs == 1


def test_a_concurrent_call_waits_and_finds_the_receipt(work: Work) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        assert go_on.wait(10)
        return work("mine")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(in_thread, lambda: once("k").run(slow))
        assert begun.wait(10)
        second = pool.submit(in_thread, lambda: once("k").run(work, "theirs"))
        with pytest.raises(FutureTimeout):
            second.result(0.2)
        go_on.set()
        assert [first.result(10), second.result(10)] == ["mine", "mine"]
    assert effects() == 1


@servers
@pytest.mark.parametrize("atomic", [True, False])
def test_who_waits_no_longer_is_told_that_it_is_busy(work: Work, atomic: bool) -> None:
    def busy() -> None:
        with pytest.raises(LockBusy) as caught:
            in_thread(lambda: once("k", wait=0.05).run(work))
        assert caught.value.name == "once:k"

    once("k", atomic=atomic).run(busy)
    assert work.runs == 0


@pytest.mark.parametrize("atomic", [True, False])
def test_inside_a_transaction_the_receipt_commits_with_it(work: Work, atomic: bool) -> None:
    job = once("k", atomic=atomic)
    with transaction.atomic():
        assert job.run(work, 1) == 1
        assert job.run(work, 2) == 1
        transaction.set_rollback(True)
    assert (effects(), Job.objects.count()) == (0, 0)
    with transaction.atomic():
        assert job.run(work, 3) == 3
    assert in_thread(lambda: once("k", wait=0).run(work, 4)) == 3
    assert (effects(), work.runs) == (1, 2)


@servers
def test_inside_a_transaction_others_wait_for_its_end(work: Work) -> None:
    with transaction.atomic():
        once("k").run(work, 1)
        with pytest.raises(LockBusy):
            in_thread(lambda: once("k", wait=0).run(work, 2))
    assert in_thread(lambda: once("k", wait=0).run(work, 3)) == 1
    assert work.runs == 1


def test_a_coroutine_function_runs_once(work: Work) -> None:
    @once("k:{n}", atomic=False)
    async def job(n: int) -> int:
        await sync_to_async(work)()
        return n

    async def main() -> None:
        assert [await job(1), await job(1), await job(2)] == [1, 1, 2]
        assert await once("k:1", atomic=False).arun(job, 5) == 1
        assert await once("k:3").arun(work, 3) == 3

    run(main)
    assert work.runs == 3


# -- the lock ----------------------------------------------------------------------------


def test_the_lock_of_a_job_is_not_that_of_its_key(work: Work) -> None:
    with lock("k"):
        assert once("k").run(work, 1) == 1
    with lock("once:other"), pytest.raises(LockBusy):
        in_thread(lambda: once("other", wait=0).run(work))


def test_the_lock_says_what_runs(work: Work) -> None:
    def body() -> None:
        holder = lock("once:k").holder()
        assert holder is not None
        assert holder.note == f"{__name__}.test_the_lock_says_what_runs.<locals>.body"

    once("k").run(body)


def test_a_job_that_calls_itself_never_waits_for_itself() -> None:
    def body() -> None:
        once("k").run(body)

    with pytest.raises(AlreadyHeld):
        once("k").run(body)


@servers
@pytest.mark.parametrize("atomic", [True, False])
def test_a_job_that_lost_its_lock_leaves_no_receipt(work: Work, atomic: bool) -> None:
    def body() -> None:
        work()
        steal("once:k")

    with pytest.raises(LockLost):
        once("k", atomic=atomic).run(body)
    assert effects() == (0 if atomic else 1)
    assert [job.state for job in Job.objects.all()] == ([] if atomic else ["running"])


def test_a_lease_that_was_given_back_meanwhile_leaves_no_receipt() -> None:
    """As after a task was cancelled, and had no time for its release."""
    lease = lock("once:k").acquire()
    lease.release()
    with pytest.raises(LockLost):
        Call(once("k", atomic=False), "k", int, int)._finish(lease, 1)
    assert not Job.objects.exists()


@servers
def test_a_job_that_was_overtaken_leaves_the_newer_receipt() -> None:
    def newer() -> str:
        expire("once:k")
        return in_thread(lambda: once("k", wait=5).run(lambda: "newer"))

    with pytest.raises(LockLost):
        once("k", atomic=False, ttl=30).run(newer)
    assert Job.objects.get().result == "newer"
    assert once("k").run(lambda: "third") == "newer"


# -- results -----------------------------------------------------------------------------


def test_the_first_caller_gets_what_the_body_returned() -> None:
    first = (1, Decimal("1.5"))
    assert once("k").run(lambda: first) is first
    assert once("k").run(lambda: None) == [1, "1.5"]


@pytest.mark.parametrize("result", [object(), float("nan"), {1, 2}, {("a",): 1}])
@pytest.mark.parametrize("atomic", [True, False])
def test_a_result_that_is_not_json_is_refused(work: Work, atomic: bool, result: Any) -> None:
    with pytest.raises(TypeError, match="'charge:42'"):
        once("charge:42", atomic=atomic).run(work, result)
    assert effects() == (0 if atomic else 1)
    assert not Job.objects.filter(state="done").exists()
    assert once("charge:42", wait=0).run(work, 1) == 1


def test_inside_a_transaction_what_a_failed_job_wrote_is_undone(work: Work) -> None:
    with transaction.atomic():
        Counter.objects.create(name="mine")
        with pytest.raises(TypeError):
            once("k").run(work, object())
        with pytest.raises(KeyError):
            once("k").run(lambda: [work(), {}["x"]])
    assert [counter.name for counter in Counter.objects.all()] == ["mine"]
    assert once("k").run(work, 1) == 1


# -- keep and every ----------------------------------------------------------------------


def test_a_receipt_past_keep_counts_as_none(work: Work) -> None:
    once("k", keep=0.05).run(work, 1)
    time.sleep(0.1)
    assert once("k", on_duplicate="raise").run(work, 2) == 2
    job = Job.objects.get()
    assert (job.attempts, job.result) == (2, 2)


def at(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Let the database's clock show that moment, in UTC."""
    shown = microseconds_of(datetime.fromisoformat(moment + "+00:00"))
    monkeypatch.setattr(type(backend_for(connection)), "clock", lambda *given: shown)


def test_every_hour_is_counted_on_the_clock_of_the_database(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    hourly = once("report", every=timedelta(hours=1))(work)
    for moment, result in [
        ("2126-11-21T13:59:59.999999", 1),
        ("2126-11-21T13:00:00.000000", 2),
        ("2126-11-21T14:00:00.000000", 3),
        ("2126-11-21T14:59:59.999999", 4),
    ]:
        at(monkeypatch, moment)
        hourly(result)
    monkeypatch.undo()
    assert {job.key: job.result for job in Job.objects.all()} == {
        "report@2126-11-21T13:00:00Z/3600": 1,
        "report@2126-11-21T14:00:00Z/3600": 3,
    }


def test_spans_of_two_lengths_that_begin_together_are_two_jobs(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, "2126-11-21T00:00:00.000000")
    assert once("report", every=timedelta(hours=1)).run(lambda: "hourly") == "hourly"
    assert once("report", every=timedelta(days=1)).run(lambda: "daily") == "daily"


def test_a_receipt_is_kept_as_long_as_its_span(work: Work) -> None:
    once("k", every=timedelta(days=7), keep=60).run(work)
    job = Job.objects.get()
    assert job.expires_at - job.finished_at == timedelta(days=7)


# -- transactions ------------------------------------------------------------------------


def test_a_savepoint_that_is_rolled_back_takes_the_receipt_with_it(work: Work) -> None:
    with transaction.atomic():
        with pytest.raises(KeyError), transaction.atomic():
            once("k").run(work, 1)
            raise KeyError
        assert once("k").run(work, 2) == 2
    assert (effects(), Job.objects.get().result) == (1, 2)


def test_atomic_requests(work: Work) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        found = once("k").run(work, 1)
        if request.GET:
            raise KeyError
        return HttpResponse(str(found))

    connection.settings_dict["ATOMIC_REQUESTS"] = True
    try:
        wrapped = BaseHandler().make_view_atomic(view)
        with pytest.raises(KeyError):
            wrapped(RequestFactory().get("/?fail=1"))
        assert (effects(), Job.objects.count()) == (0, 0)
        for _ in range(2):
            assert wrapped(RequestFactory().get("/")).content == b"1"
    finally:
        connection.settings_dict["ATOMIC_REQUESTS"] = False
    assert (effects(), work.runs) == (1, 2)


def test_a_transaction_by_hand(work: Work) -> None:
    transaction.set_autocommit(False)
    try:
        once("k").run(work, 1)
        transaction.rollback()
        once("k").run(work, 2)
        transaction.commit()
    finally:
        transaction.set_autocommit(True)
    assert (effects(), Job.objects.get().result) == (1, 2)


def test_a_swallowed_error_of_the_database_is_not_success(work: Work) -> None:
    def body() -> None:
        work()
        with suppress(IntegrityError), transaction.atomic(savepoint=False):
            Counter.objects.create(name="run 1")

    with pytest.raises(transaction.TransactionManagementError):
        once("k").run(body)
    assert (effects(), Job.objects.count()) == (0, 0)


def test_the_body_is_or_is_not_in_a_transaction() -> None:
    def body() -> bool:
        return connection.in_atomic_block

    assert once("a").run(body) is True
    assert once("b", atomic=False).run(body) is False


@servers
def test_without_a_transaction_others_see_that_it_runs() -> None:
    def body() -> tuple[str, int]:
        job = in_thread(Job.objects.get)
        return job.state, job.attempts

    assert once("k", atomic=False).run(body) == ("running", 1)


class InTestCase(TestCase):
    def test_once(self) -> None:
        for atomic in (True, False):
            key = f"k {atomic}"
            with pytest.raises(KeyError):
                once(key, atomic=atomic).run(lambda: {}["x"])
            for result in (1, 2):
                assert once(key, atomic=atomic).run(lambda result=result: result) == 1
            with pytest.raises(JobDuplicate):
                once(key, on_duplicate="raise").run(int)

    async def test_a_coroutine(self) -> None:
        async def body(result: int) -> int:
            return result

        for result in (1, 2):
            assert await once("k", atomic=False).arun(body, result) == 1


# -- coroutines --------------------------------------------------------------------------


def test_concurrent_coroutines_run_it_once(work: Work) -> None:
    async def body() -> None:
        await asyncio.sleep(0.1)
        await sync_to_async(work)()

    async def main() -> None:
        job = once("k", atomic=False)(body)
        await asyncio.gather(*(job() for _ in range(5)))

    run(main)
    assert work.runs == 1


def test_a_coroutine_that_raises_leaves_no_receipt(work: Work) -> None:
    async def body() -> Any:
        work.runs += 1
        if work.runs == 1:
            raise KeyError
        return object() if work.runs == 2 else "done"

    async def main() -> None:
        job = once("k", atomic=False)
        for error in (KeyError, TypeError):
            with pytest.raises(error):
                await job.arun(body)
        assert [await job.arun(body), await job.arun(body)] == ["done", "done"]

    run(main)
    assert (work.runs, Job.objects.get().attempts) == (3, 3)


def test_a_cancelled_coroutine_leaves_no_receipt_and_no_lock() -> None:
    async def body(begun: asyncio.Event) -> None:
        begun.set()
        await asyncio.sleep(30)

    async def main() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(once("k", atomic=False).arun(body, begun))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await once("k", atomic=False, wait=5).arun(asyncio.sleep, 0, "done") == "done"

    run(main)


def test_a_plain_function_is_atomic_also_for_a_coroutine(work: Work) -> None:
    def body() -> None:
        work()
        raise KeyError

    async def main() -> None:
        with pytest.raises(KeyError):
            await once("k").arun(body)

    run(main)
    assert effects() == 0


def test_in_an_event_loop_run_says_what_to_do() -> None:
    async def main() -> None:
        with pytest.raises(SynchronousOnlyOperation, match="arun"):
            once("k").run(int)

    run(main)


# -- what is refused ---------------------------------------------------------------------


async def coroutine() -> None:
    pass


def generator() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"key": ""}, "key must have 1 to 250 characters, not 0"),
        ({"key": "k" * 251}, "key must have 1 to 250 characters, not 251"),
        ({"key": "k" * 213, "every": 60}, "key must have 1 to 212 characters, not 213"),
        ({"key": "a\0"}, "key must not hold a NUL"),
        ({"key": 7}, "key must be a str or a callable, not int"),
        ({"keep": 0}, "keep must be greater than 0"),
        ({"keep": "1"}, "keep must be a number of seconds"),
        ({"keep": None}, "keep must be a number of seconds"),
        ({"every": 0.5}, "every must be at least a second"),
        ({"every": "hour"}, "every must be a number of seconds"),
        ({"atomic": 1}, "atomic must be True or False"),
        ({"wait": -1}, "wait must be 0 or greater"),
        ({"ttl": 0}, "ttl must be greater than 0"),
        ({"on_duplicate": "drop"}, 'on_duplicate must be "return", "skip" or "raise"'),
        ({"using": "nowhere"}, "using='nowhere' is not in DATABASES"),
    ],
)
def test_what_is_bad_is_refused_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        once(**{"key": "k", **given})


def test_a_key_of_the_greatest_length_is_stored(work: Work) -> None:
    once("k" * 250).run(work)
    once("k" * 212, every=timedelta(days=3649, microseconds=1)).run(work)
    assert sorted(len(job.key) for job in Job.objects.all()) == [250, 250]


def test_a_key_that_a_call_makes_too_long_is_refused(work: Work) -> None:
    with pytest.raises(ValueError, match="key must have 1 to 250 characters, not 300"):
        once(lambda bound: "k" * bound["result"])(lambda result: work(result))(300)
    assert work.runs == 0


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: once("k")(coroutine), "atomic=False.* arun"),
        (lambda: once("k")(int), "decorates functions"),
        (lambda: once("k")("text"), "decorates functions"),
        (lambda: once("k")(generator), "generator"),
        (lambda: once("k").run(generator), "generator"),
        (lambda: once("k").run(coroutine), "await arun"),
        (lambda: once("{x}")(len), "no argument"),
        (lambda: once("{result}").run(Work()), "f-string"),
        (lambda: once(str).run(int), "decorator"),
        (lambda: asyncio.run(once("k").arun(coroutine)), "atomic=False"),
    ],
)
def test_what_cannot_run_once_is_refused(use: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        use()
    assert not Job.objects.exists()


def test_outside_a_decorator_a_brace_is_a_brace(work: Work) -> None:
    once("{other}").run(work, 1)
    assert Job.objects.get().key == "{other}"
