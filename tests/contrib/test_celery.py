"""`single_instance` in one process: keys, signatures, wrong uses, and calls without a worker."""

from __future__ import annotations

import inspect
import json
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from celery import Celery, Task, shared_task
from celery._state import _task_stack
from celery.exceptions import Ignore, Reject, Retry
from django.core.exceptions import ImproperlyConfigured
from django.db import connection, transaction

from distlock import AlreadyHeld, Lock, LockBusy, LockLost, contexts, lock
from distlock.contrib._canonical import canonical_name
from distlock.contrib._deliveries import HEADER
from distlock.contrib.celery import current_lock, single_instance
from distlock.models import DistributedLock, Job
from tests.app.models import Counter
from tests.contrib import tasks
from tests.contrib.in_memory import broker_down
from tests.support import in_thread, is_free, kill_session

transactional = pytest.mark.django_db(transaction=True)
MOMENT = datetime(2024, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc)


@contextmanager
def held(name: str, **how: Any) -> Iterator[None]:
    """Hold a lock in another thread: in this one it would be nesting."""
    lease = in_thread(lambda: lock(name, **{"ttl": 60, "note": "somebody"} | how).acquire())
    try:
        yield
    finally:
        lease.release()


def held_names() -> list[str]:
    return [one.name for one in DistributedLock.objects.exclude(owner="").order_by("name")]


# -- the order of the decorators -----------------------------------------------------------------


def test_above_app_task_it_names_the_right_order(app: Celery) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"goes under.*\n.*@shared_task\n.*@single_inst"):

        @single_instance
        @app.task
        def one() -> None: ...


def test_above_a_task_that_is_made_already(app: Celery) -> None:
    @app.task
    def two() -> None: ...

    app.finalize()
    for task in (two, app.tasks[two.name]):
        with pytest.raises(ImproperlyConfigured, match="goes under"):
            single_instance(key="a")(task)


def test_above_shared_task() -> None:
    with pytest.raises(ImproperlyConfigured, match="goes under"):

        @single_instance("key", ttl=5)
        @shared_task
        def three() -> None: ...


# -- wrong uses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"on_busy": "drop"}, "on_busy"),
        ({"ttl": 0}, "ttl"),
        ({"wait": -1}, "wait"),
        ({"min_hold": "1"}, "min_hold"),
        ({"max_hold": 0}, "max_hold"),
        ({"renew": 1}, "renew"),
        ({"atomic": "yes"}, "atomic"),
        ({"using": 3}, "using"),
        ({"key": "sync:{account}"}, "account"),
        ({"key": 42}, "key"),
    ],
)
def test_wrong_arguments_are_named(how: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):

        @single_instance(**how)
        def task(account_id: int) -> None: ...


def test_async_functions_and_generators_are_refused() -> None:
    async def coroutine() -> None: ...

    def generator() -> Iterator[int]:
        yield 1

    class Callable:
        async def __call__(self) -> None: ...

    for function in (coroutine, generator, Callable(), int, object()):
        with pytest.raises(TypeError):
            single_instance(function)  # type: ignore[arg-type]


@transactional
def test_a_key_function_by_position_is_refused_when_it_is_put_to_use() -> None:
    def make_key(arguments: Any) -> str:
        return "k"

    with pytest.raises(ImproperlyConfigured, match="by keyword"):

        @single_instance(make_key)
        def task() -> None: ...


# -- the signature -------------------------------------------------------------------------------

SENTINEL = object()


def plain(a: int, b: int = 2) -> None: ...
def anything_as_default(a: int, b: Any = SENTINEL, c: Any = MOMENT, d: Any = lambda: 1) -> None: ...
def keyword_only(a: int, *, b: int, c: Any = SENTINEL) -> None: ...
def variable(a: int, *more: int, **others: int) -> None: ...
def positional_only(a: int, b: int = 1, /, c: int = 2) -> None: ...
def nothing() -> None: ...


FUNCTIONS = [plain, anything_as_default, keyword_only, variable, positional_only, nothing]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_signature_is_kept(function: Callable[..., None]) -> None:
    wrapped = single_instance(function)
    assert inspect.signature(wrapped) == inspect.signature(function)
    assert inspect.getfullargspec(wrapped) == inspect.getfullargspec(function)
    assert wrapped.__name__ == function.__name__
    assert wrapped.__doc__ == function.__doc__


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bind", [False, True])
def test_the_caller_is_told_of_wrong_arguments(
    app: Celery, function: Callable[..., None], bind: bool
) -> None:
    """A call passes or fails at the caller exactly as it does without the decorator."""

    if bind and function is nothing:
        return  # there is no self to bind
    bare = app.task(bind=bind, name="bare")(function)
    task = app.task(bind=bind, name="locked")(single_instance(key="k")(function))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}),
        ((1,), {}),
        ((1, 2), {}),
        ((1, 2, 3, 4, 5), {}),
        ((), {"a": 1}),
        ((1,), {"b": 2}),
        ((1,), {"unknown": 2}),
    ]
    for args, kwargs in calls:
        assert outcome(task, args, kwargs) == outcome(bare, args, kwargs), (args, kwargs)


def outcome(task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    try:
        task.apply_async(args, kwargs)
    except TypeError as error:
        return str(error)
    return "sent"


def test_a_missing_argument_fails_at_the_caller() -> None:
    with pytest.raises(TypeError, match="number"):
        tasks.skipping.delay()
    with pytest.raises(TypeError, match="number"):
        tasks.bound.delay()
    with pytest.raises(TypeError, match="argument"):
        tasks.bound.delay(1, 2, 3)


# -- the key -------------------------------------------------------------------------------------


@transactional
def test_one_key_however_a_call_is_spelled(app: Celery) -> None:
    @app.task(name="spelled")
    @single_instance
    def task(a: int, b: Any = 2, *, c: Any = None) -> list[str]:
        return held_names()

    expected = ['spelled:{"a":1,"b":2,"c":null}']
    assert task(1) == expected
    assert task(a=1) == expected
    assert task(1, 2) == expected
    assert task(b=2, a=1, c=None) == expected
    assert task.apply((1,)).get() == expected
    assert task.apply(kwargs={"a": 1}).get() == expected


@transactional
def test_self_is_not_part_of_the_key(app: Celery) -> None:
    @app.task(name="with-self", bind=True)
    @single_instance()
    def task(self: Task[Any, Any], a: int) -> list[str]:
        assert isinstance(self, Task)
        return held_names()

    assert task(1) == ['with-self:{"a":1}']
    assert task.run(1) == ['with-self:{"a":1}']
    assert task.apply((1,)).get() == ['with-self:{"a":1}']


@transactional
def test_without_arguments_the_key_is_the_name_of_the_task(app: Celery) -> None:
    @app.task(name="nightly")
    @single_instance
    def task() -> list[str]:
        return held_names()

    assert task() == ["nightly"]


@transactional
def test_outside_celery_the_key_has_the_name_of_the_function() -> None:
    @single_instance
    def function(a: int) -> list[str]:
        return held_names()

    (name,) = function(1)
    assert name.startswith("tests.contrib.test_celery.")
    assert name.endswith('function:{"a":1}')


@transactional
def test_a_shared_task_called_without_celery_has_the_same_key() -> None:
    assert tasks.renamed() == ["tests.renamed"]
    assert tasks.renamed.run() == ["tests.renamed"]


def test_the_order_of_the_parameters_may_change() -> None:
    assert canonical_name("job", {"b": 1, "a": 2}) == 'job:{"a":2,"b":1}'


@transactional
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"b": 1, "a": [1, 2]}, {"a": (1, 2), "b": 1}),
        ({1: "x"}, {"1": "x"}),
        (Decimal("1.0"), "1.0"),
        (timedelta(seconds=1), "P0DT00H00M01S"),
    ],
)
def test_what_json_makes_equal_has_one_key(app: Celery, one: Any, other: Any) -> None:
    task = telling_its_key(app)
    assert task(one) == task(other)


@transactional
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, "1"),
        (1, True),
        (None, "null"),
        (MOMENT, MOMENT + timedelta(microseconds=1)),
        (MOMENT.time(), (MOMENT + timedelta(microseconds=1)).time()),
        ("é", "e\N{COMBINING ACUTE ACCENT}"),
        ("x" * 300, "x" * 299 + "y"),
        ("a", "A"),
        ("a", "a "),
    ],
)
def test_what_json_tells_apart_has_two_keys(app: Celery, one: Any, other: Any) -> None:
    task = telling_its_key(app)
    assert task(one) != task(other)


def telling_its_key(app: Celery) -> Any:
    @app.task(name="telling")
    @single_instance
    def task(value: Any) -> list[str]:
        return held_names()

    return task


@transactional
def test_a_long_key_is_readable_at_its_beginning(app: Celery) -> None:
    (name,) = telling_its_key(app)("x" * 1000)
    assert len(name) == 255
    assert name.startswith('telling:{"value":"xxxxx')
    assert "#" in name


@transactional
@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), {(1, 2): 3}, {1: 2, "a": 3}])
def test_an_argument_without_json_is_named(app: Celery, value: Any) -> None:
    with pytest.raises(TypeError, match=r"no default key for telling: its argument 'value'.*key="):
        telling_its_key(app)(value)


@transactional
def test_variable_arguments(app: Celery) -> None:
    @app.task(name="variable")
    @single_instance
    def task(*more: int, **others: int) -> list[str]:
        return held_names()

    assert task(1, 2, y=3, x=4) == ['variable:{"more":[1,2],"others":{"x":4,"y":3}}']
    assert task() == ['variable:{"more":[],"others":{}}']


@transactional
def test_templates_and_callables(app: Celery) -> None:
    @app.task
    @single_instance("sync:{account.real}:{full}")
    def template(account: int, full: bool = False) -> list[str]:
        return held_names()

    @app.task(bind=True)
    @single_instance(key=lambda arguments: f"sync:{arguments['account']}")
    def function(self: Task[Any, Any], account: int) -> list[str]:
        return held_names()

    assert template(4) == ["sync:4:False"]
    assert template(full=True, account=4) == ["sync:4:True"]
    assert function(account=5) == ["sync:5"]


# -- without a worker ----------------------------------------------------------------------------


@transactional
def test_called_directly(app: Celery) -> None:
    @app.task(name="direct")
    @single_instance
    def task() -> str:
        assert not is_free("direct") or connection.vendor == "sqlite"
        return "done"

    assert task() == "done"
    assert is_free("direct")
    with held("direct"):
        began = time.monotonic()
        assert task()["distlock"] == "skipped"
        assert "somebody" in task()["holder"]
        assert time.monotonic() - began < 5  # it does not wait


@transactional
def test_eager(app: Celery) -> None:
    app.conf.task_always_eager = True

    @app.task(name="eager", bind=True)
    @single_instance
    def task(self: Task[Any, Any]) -> str:
        holder = lock("eager").holder()
        assert holder is not None
        assert holder.thread == f"task eager[{self.request.id}]"
        return "done"

    assert task.delay().get() == "done"
    with held("eager"):
        assert task.delay().get()["distlock"] == "skipped"


@pytest.mark.django_db
def test_eager_inside_a_testcase(app: Celery) -> None:
    @app.task
    @single_instance
    def task(number: int) -> int:
        return 12 // number

    assert task.apply((3,)).get() == 4
    assert task.apply((0,), throw=False).failed()
    assert held_names() == []


@transactional
@pytest.mark.parametrize("on_busy", ["skip", "retry", "wait", "raise"])
def test_nested_in_a_run_of_its_own(app: Celery, on_busy: str) -> None:
    """Waiting for oneself would never end."""

    @app.task(name=f"nested-{on_busy}")
    @single_instance("nested", on_busy=on_busy)
    def task(again: bool = True) -> Any:
        return task.apply((False,), throw=True).get() if again else "ran twice at once"

    if on_busy == "skip":
        result = task()
        assert result["distlock"] == "skipped"
        assert result["lock"] == "nested"
    else:
        with pytest.raises(LockBusy if on_busy == "retry" else AlreadyHeld, match="already holds"):
            task()
    assert is_free("nested")


@transactional
@pytest.mark.parametrize("on_busy", ["retry", "raise"])
def test_without_a_queue_retry_raises(app: Celery, on_busy: str) -> None:
    @app.task(max_retries=None)
    @single_instance("busy", on_busy=on_busy)
    def task() -> None: ...

    with held("busy"):
        with pytest.raises(LockBusy):
            task()
        with pytest.raises(LockBusy):
            task.apply(throw=True)


@transactional
def test_wait_ends_in_lock_busy(app: Celery) -> None:
    @app.task
    @single_instance("busy", on_busy="wait", wait=0.2)
    def task() -> None: ...

    with held("busy"), pytest.raises(LockBusy) as caught:
        task()
    assert caught.value.waited >= 0.2


@transactional
def test_a_busy_lock_of_the_body_is_not_taken_for_its_own(app: Celery) -> None:
    @app.task
    @single_instance("outer")
    def task() -> None:
        lock("inner", wait=0).acquire()

    with held("inner"), pytest.raises(LockBusy, match="inner"):
        task()
    assert is_free("outer")


@transactional
def test_locks_inside_the_body_show_the_task_too(app: Celery) -> None:
    @app.task(name="outer", bind=True)
    @single_instance("outer")
    def task(self: Task[Any, Any]) -> tuple[str, str]:
        with lock("inner"):
            holder = lock("inner").holder()
            assert holder is not None
            return holder.thread, self.request.id

    thread, task_id = task.apply().get()
    assert thread == f"task outer[{task_id}]"
    with lock("inner"):
        holder = lock("inner").holder()
        assert holder is not None
        assert holder.thread == "MainThread"


@transactional
def test_retry_inside_an_eager_run(app: Celery) -> None:
    @app.task(bind=True, max_retries=3)
    @single_instance("again")
    def task(self: Task[Any, Any]) -> int:
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return int(self.request.retries)

    assert task.apply().get() == 2


@transactional
def test_autoretry_in_an_eager_run(app: Celery) -> None:
    runs: list[int] = []

    @app.task(autoretry_for=(ValueError,), max_retries=2, default_retry_delay=0)
    @single_instance
    def task() -> str:
        runs.append(1)
        if len(runs) < 3:
            raise ValueError("not yet")
        return "done"

    assert task.apply().get() == "done"
    assert len(runs) == 3


@transactional
def test_min_hold_drops_a_late_twin(app: Celery) -> None:
    runs: list[int] = []

    @app.task
    @single_instance("report", min_hold=60)
    def task() -> None:
        runs.append(1)

    task()
    assert task()["holder"].startswith("nobody (kept until")
    assert runs == [1]


@transactional
def test_atomic_commits_work_and_release_together(app: Celery) -> None:
    @app.task
    @single_instance("atomic", atomic=True)
    def task(fail: bool) -> None:
        assert connection.in_atomic_block
        Counter.objects.create(name="atomic", value=1)
        if fail:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        task(True)
    assert not Counter.objects.exists()
    task(False)
    assert Counter.objects.count() == 1
    assert is_free("atomic")


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_another_database(app: Celery) -> None:
    @app.task
    @single_instance("elsewhere", using="other")
    def task() -> list[str]:
        assert lock("elsewhere", using="other").holder() is not None
        return held_names()

    assert task() == []


# -- a message, as a worker sees it --------------------------------------------------------------


class Message:
    """A delivery of a bound task's message, without a worker."""

    def __init__(self, app: Celery, task: Any, **request: Any) -> None:
        self.app = app
        self.task = task
        self.request = {
            "id": "me",
            "called_directly": False,
            "retries": 0,
            "args": (),
            "kwargs": {},
        }
        self.request |= request

    def run(self, *args: Any) -> Any:
        _task_stack.push(self.task)
        self.task.push_request(**self.request)
        try:
            return self.task.run(*args)
        finally:
            self.task.request_stack.pop()
            _task_stack.pop()

    def sent_again(self) -> Any:
        with self.app.connection_for_read() as channel:
            return channel.default_channel.basic_get("celery", no_ack=True)


@pytest.fixture
def message(app: Celery) -> Callable[..., Message]:
    def make(
        on_busy: Any = "skip",
        body: Callable[[], Any] = lambda: "done",
        atomic: bool = False,
        min_hold: float | None = None,
        **request: Any,
    ) -> Message:
        app.tasks.pop("task", None)

        @app.task(name="task", bind=True, max_retries=0)
        @single_instance(
            "name", on_busy=on_busy, ttl=60, wait=0.1, atomic=atomic, min_hold=min_hold
        )
        def task(self: Task[Any, Any]) -> Any:
            return body()

        return Message(app, task, **request)

    return make


@contextmanager
def held_by(thread: str, **how: Any) -> Iterator[None]:
    def take() -> Any:
        contexts.caller.set(thread)
        return lock("name", **{"ttl": 60} | how).acquire()

    lease = in_thread(take)
    try:
        yield
    finally:
        lease.release()


@transactional
def test_a_first_delivery_is_skipped(message: Callable[..., Message]) -> None:
    with held_by("task task[other]"):
        assert message().run()["distlock"] == "skipped"


@transactional
@pytest.mark.parametrize(
    "request_",
    [
        {"retries": 2},
        {"delivery_info": {"redelivered": True, "exchange": "", "routing_key": "celery"}},
        {"headers": {HEADER: 3}},
    ],
)
@pytest.mark.parametrize("on_busy", ["skip", lambda busy: "called"])
def test_what_is_never_skipped(
    message: Callable[..., Message], request_: dict[str, Any], on_busy: Any
) -> None:
    one = message(on_busy, **request_)
    with held_by("task task[other]"), pytest.raises(Retry):
        one.run()
    again = one.sent_again()
    assert again.headers["id"] == "me"
    assert again.headers["retries"] == request_.get("retries", 0)
    assert again.headers[HEADER] == request_.get("headers", {}).get(HEADER, 0) + 1
    assert again.headers["eta"]


@transactional
@pytest.mark.parametrize("on_busy", ["skip", "retry", "wait", "raise", lambda busy: "called"])
def test_what_its_own_id_holds_is_tried_again_in_every_mode(
    message: Callable[..., Message], on_busy: Any
) -> None:
    one = message(on_busy)
    with held_by("task task[me]"), pytest.raises(Retry):
        one.run()
    assert one.sent_again().headers["id"] == "me"
    assert one.run() == "done"


@transactional
def test_what_cannot_be_sent_again_goes_back_to_the_broker_if_that_still_has_it(
    message: Callable[..., Message], app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distlock.contrib._deliveries.PAUSE", 0.01)
    one = message()
    with held_by("task task[me]"), broker_down(app):
        with pytest.raises(ConnectionRefusedError):
            one.run()
        one.task.acks_late = True
        with pytest.raises(Reject) as raised:
            one.run()
    assert raised.value.requeue
    assert one.run() == "done"


@transactional
def test_autoretry_does_not_take_what_is_given_back_for_a_failure(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distlock.contrib._deliveries.PAUSE", 0.01)

    @app.task(name="task", bind=True, acks_late=True, autoretry_for=(Exception,))
    @single_instance("name", ttl=60)
    def task(self: Task[Any, Any]) -> str:
        return "done"

    with held_by("task task[me]"), broker_down(app), pytest.raises(Reject) as raised:
        Message(app, task).run()
    assert raised.value.requeue
    again = pickle.loads(pickle.dumps(raised.value))  # it goes to the worker's main process
    assert (again.requeue, again.reason) == (True, raised.value.reason)


@transactional
@pytest.mark.parametrize("on_busy", ["skip", "retry", "wait", "raise"])
def test_what_its_own_min_hold_keeps_runs(message: Callable[..., Message], on_busy: str) -> None:
    with held_by("task task[me]", min_hold=30):
        pass
    assert message(on_busy).run() == "done"


@transactional
@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"retries": 2},
        {"delivery_info": {"redelivered": True, "exchange": "", "routing_key": "celery"}},
    ],
)
def test_what_the_min_hold_of_another_keeps_is_skipped(
    message: Callable[..., Message], request_: dict[str, Any]
) -> None:
    with held_by("task task[other]", min_hold=30):
        pass
    marker = message(**request_).run()
    assert (marker["distlock"], marker["reason"]) == ("skipped", "too_soon")
    with pytest.raises(Retry):
        message("retry", **request_).run()


# -- a message that comes again after the run ----------------------------------------------------


@transactional
@pytest.mark.parametrize(
    "request_",
    [
        {"delivery_info": {"redelivered": True, "exchange": "", "routing_key": "celery"}},
        {"retries": 1},  # retry_on_worker_lost
        {"headers": {HEADER: 3}},
        {},  # a copy that was late
    ],
)
@pytest.mark.parametrize("how", [{}, {"atomic": True}, {"min_hold": 60}])
def test_what_was_done_does_not_run_again(
    message: Callable[..., Message], how: dict[str, Any], request_: dict[str, Any]
) -> None:
    assert message(**how).run() == "done"
    row = DistributedLock.objects.get(name="name")
    marker = message(**how, **request_).run()
    receipt = Job.objects.get(key="celery:me")
    assert marker == {
        "distlock": "duplicate",
        "lock": "name",
        "task_id": "me",
        "finished_at": receipt.finished_at.isoformat(),
    }
    assert json.loads(json.dumps(marker)) == marker
    assert (receipt.task, receipt.task_id, receipt.state) == ("task", "me", Job.State.DONE)
    assert receipt.token == row.fencing_token
    assert receipt.started_at == row.acquired_at
    after = DistributedLock.objects.get(name="name")
    assert after.owner == ""
    if "min_hold" in how:
        assert after.expires_at == row.expires_at
    else:
        assert is_free("name")


@transactional
def test_a_duplicate_has_the_result_that_is_known(
    app: Celery, message: Callable[..., Message]
) -> None:
    assert message(id="known").run() == "done"
    app.backend.store_result("known", None, "STARTED")
    assert message(id="known").run()["distlock"] == "duplicate"
    app.backend.store_result("known", "what it was", "SUCCESS")
    assert message(id="known").run() == "what it was"
    app.backend.forget("known")


@transactional
def test_a_duplicate_after_its_min_hold_keeps_nobody_out(message: Callable[..., Message]) -> None:
    assert message(min_hold=0.3).run() == "done"
    time.sleep(0.4)
    assert message(min_hold=60).run()["distlock"] == "duplicate"
    assert is_free("name")


@transactional
def test_it_is_remembered_for_a_day(message: Callable[..., Message]) -> None:
    message().run()
    receipt = Job.objects.get()
    assert receipt.expires_at - receipt.finished_at == timedelta(days=1)
    Job.objects.update(expires_at=receipt.finished_at)
    assert message().run() == "done"
    assert Job.objects.get().finished_at > receipt.finished_at


@transactional
@pytest.mark.parametrize("raised", [ValueError(), Retry(), Ignore(), Reject()])
@pytest.mark.parametrize("atomic", [False, True])
def test_a_body_that_raises_leaves_no_receipt(
    message: Callable[..., Message], raised: Exception, atomic: bool
) -> None:
    def body() -> None:
        raise raised

    with pytest.raises(type(raised)):
        message(body=body, atomic=atomic).run()
    assert not Job.objects.exists()
    assert message().run() == "done"


@transactional
def test_a_call_of_the_body_inside_itself_leaves_no_receipt(app: Celery) -> None:
    @app.task(name="recursive", bind=True)
    @single_instance("recursive:{depth}")
    def recursive(self: Task[Any, Any], depth: int, fails: bool) -> str:
        if depth:
            assert self.run(depth - 1, fails) == "done"
            assert not Job.objects.exists()
            assert self.run(depth, fails)["distlock"] == "skipped"
        if depth and fails:
            raise ValueError("not yet")
        return "done"

    one = Message(app, recursive)
    with pytest.raises(ValueError, match="not yet"):
        one.run(2, True)
    assert not Job.objects.exists()
    assert one.run(2, False) == "done"
    assert Job.objects.get().task_id == "me"


@transactional
def test_a_body_that_rolls_back_leaves_no_receipt(message: Callable[..., Message]) -> None:
    message(body=lambda: transaction.set_rollback(True), atomic=True).run()
    assert not Job.objects.exists()


@transactional
def test_a_body_that_publishes_itself_again_leaves_no_receipt(
    app: Celery, message: Callable[..., Message]
) -> None:
    def body() -> None:
        app.tasks["task"].retry(countdown=0, max_retries=1, throw=False)

    message(body=body).run()
    assert not Job.objects.exists()
    assert message(retries=1).run() == "done"


@transactional
@pytest.mark.vendor("postgresql", "mysql")
def test_a_run_that_lost_its_lock_leaves_no_receipt(message: Callable[..., Message]) -> None:
    def body() -> None:
        DistributedLock.objects.update(owner="somebody else")

    with pytest.raises(LockLost):
        message(body=body).run()
    assert not Job.objects.exists()


@transactional
@pytest.mark.vendor("postgresql", "mysql")
def test_a_connection_that_was_closed_meanwhile_costs_no_receipt(
    message: Callable[..., Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distlock.connections.SHORT", 0.0)
    assert message(body=kill_session).run() is None
    assert Job.objects.filter(key="celery:me").exists()
    assert is_free("name")


@transactional
@pytest.mark.vendor("postgresql", "mysql")
def test_a_receipt_that_cannot_be_written_is_no_failure(
    message: Callable[..., Message], caplog: pytest.LogCaptureFixture
) -> None:
    """The work is done: its result is not thrown away."""
    assert message(body=kill_session).run() is None
    assert "task_receipt_missing id='me'" in caplog.text
    assert not Job.objects.exists()
    assert is_free("name")


@transactional
def test_a_call_that_is_no_message_is_not_remembered(app: Celery) -> None:
    @app.task
    @single_instance("unremembered")
    def task() -> str:
        return "done"

    for _ in range(2):
        assert task() == "done"
        assert task.apply(task_id="me").get() == "done"
    assert not Job.objects.exists()


# -- the lock at hand ----------------------------------------------------------------------------


def test_current_lock_outside_a_run() -> None:
    with pytest.raises(RuntimeError, match="body of a task"):
        current_lock()


@transactional
def test_current_lock_is_the_lease_of_the_innermost_run(app: Celery) -> None:
    @app.task
    @single_instance("inner")
    def inner(fail: bool) -> str:
        if fail:
            raise ValueError("no")
        return current_lock().name

    @app.task
    @single_instance("outer", atomic=True)
    def outer() -> None:
        lease = current_lock()
        holder = lock("outer").holder()
        assert holder is not None
        assert (lease.name, lease.token, lease.owner) == ("outer", holder.token, holder.owner)
        lease.check()
        lease.guard()
        with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="its own thread"):
            pool.submit(current_lock).result()

    @app.task
    @single_instance("nesting")
    def nesting() -> None:
        lease = current_lock()
        assert inner.apply((False,)).get() == "inner"
        assert current_lock() is lease
        assert inner.apply((True,)).failed()
        assert current_lock() is lease

    outer()
    nesting()
    with pytest.raises(RuntimeError):
        current_lock()


@transactional
def test_an_unknown_holder_might_be_oneself(
    message: Callable[..., Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = message()
    with held_by("task task[other]"):
        monkeypatch.setattr(Lock, "holder", lambda self: None)
        with pytest.raises(Retry):
            one.run()
        assert one.task()["holder"] is None


@transactional
@pytest.mark.parametrize(
    ("times", "ttl", "visible", "expected"),
    [(0, 60, 3600, 1), (2, 60, 3600, 4), (9, 7, 3600, 7), (9, 900, 3600, 60), (9, 900, 40, 20)],
)
def test_the_delay_doubles_up_to_the_end_of_the_lease(
    app: Celery,
    message: Callable[..., Message],
    times: int,
    ttl: float,
    visible: float,
    expected: float,
) -> None:
    app.conf.broker_transport_options = {"visibility_timeout": visible}
    with held_by("task task[me]", ttl=ttl), pytest.raises(Retry) as caught:
        message(headers={HEADER: times}).run()
    delay: Any = caught.value.when
    assert expected * 0.7 < delay < expected * 1.3
    app.conf.broker_transport_options = {}


@transactional
def test_a_message_that_cannot_be_sent_again_fails_loudly(
    message: Callable[..., Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = message("retry")

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no broker")

    monkeypatch.setattr(one.task.__class__, "apply_async", unreachable)
    with held_by("task task[other]"), pytest.raises(ConnectionError):
        one.run()
