"""`single_instance` and `once` for Django's own tasks, with real workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import IO, Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from distlock import LockBusy, lock
from distlock.contrib.tasks import once, single_instance
from distlock.models import Job
from tests.app.models import Counter
from tests.contrib import own_tasks
from tests.contrib.conftest import ROOT, STOP_LIMIT
from tests.machine import die_with_parent
from tests.support import eventually, in_thread

pytestmark = pytest.mark.django_db(transaction=True)
servers = pytest.mark.vendor("postgresql")  # real workers; once is enough
LIMIT = 30.0
COMMAND = "-m django db_worker --interval 0.05 --no-startup-delay"


class Worker:
    """A worker process and its log."""

    def __init__(self, queue: str) -> None:
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        environ = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.contrib.settings"}
        for alias in connections:
            name = connections[alias].settings_dict["NAME"]
            environ[f"DISTLOCK_WORKER_DATABASE_{alias}"] = str(name)
        self.process = subprocess.Popen(
            [sys.executable, *COMMAND.split(), "--queue-name", queue],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End it; a second time there is nothing to do."""
        self.process.send_signal(how)
        try:
            self.process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_LIMIT)
        self.log.close()


@pytest.fixture(scope="module")
def start(django_db_setup: None) -> Iterator[Callable[[str], Worker]]:
    """Start a worker of a queue; it is stopped before the database goes."""
    with ExitStack() as stack:

        def started(queue: str) -> Worker:
            worker = Worker(queue)
            stack.callback(worker.stop)
            return worker

        yield started


@pytest.fixture(scope="module")
def two(start: Callable[[str], Worker]) -> list[Worker]:
    """Two workers, for all tests."""
    return [start("default"), start("default")]


@pytest.fixture
def workers(two: list[Worker]) -> Iterator[list[Worker]]:
    Counter.objects.create(name="inside")
    yield two
    for worker in two:
        assert worker.process.poll() is None, worker.said()[-3000:]


def ended(result: Any) -> Any:
    """A task's result, when it has one."""

    def over() -> bool:
        result.refresh()
        return bool(result.is_finished)

    assert eventually(over, LIMIT), f"{result.task.name} is still {result.status}"
    return result


def value_of(result: Any) -> Any:
    ended(result)
    assert not result.errors, result.errors[0].traceback
    return result.return_value


def begun(times: int = 1) -> bool:
    return eventually(lambda: own_tasks.noted("begun") == times, LIMIT)


def is_skip(value: Any, reason: str, name: str) -> bool:
    assert set(value) == {"distlock", "reason", "lock", "holder"}
    return (value["distlock"], value["reason"], value["lock"]) == ("skipped", reason, name)


# -- single_instance ------------------------------------------------------------------------------


@servers
def test_a_duplicate_is_skipped_and_says_who_runs(workers: list[Worker]) -> None:
    name = 'tests.contrib.own_tasks.skipping:{"account":1,"seconds":1.0}'
    first = own_tasks.skipping.enqueue(1, 1.0)
    assert begun()
    duplicate = value_of(own_tasks.skipping.enqueue(seconds=1.0, account=1))
    assert is_skip(duplicate, "busy", name)
    assert "task tests.contrib.own_tasks.skipping" in duplicate["holder"]
    assert value_of(first) == "done"
    assert value_of(own_tasks.skipping.enqueue(2)) == "done"
    assert own_tasks.noted("begun") == 2


@servers
def test_who_waits_takes_turns(workers: list[Worker]) -> None:
    results = [own_tasks.waiting.enqueue(1, 0.2) for _ in range(4)]
    assert [value_of(result) for result in results] == ["done"] * 4
    assert (own_tasks.noted("begun"), own_tasks.noted("overlap")) == (4, 0)


@servers
def test_a_busy_task_fails_with_the_reason(workers: list[Worker]) -> None:
    first = own_tasks.raising.enqueue(0.5)
    assert begun()
    failed = ended(own_tasks.raising.enqueue())
    assert failed.errors[0].exception_class is LockBusy
    assert value_of(first) == "done"
    assert value_of(own_tasks.raising.enqueue()) == "done"


@servers
def test_coroutine_functions(workers: list[Worker]) -> None:
    first = own_tasks.in_coroutine.enqueue(1, seconds=0.5)
    assert begun()
    name = 'tests.contrib.own_tasks.in_coroutine:{"account":1,"seconds":0.5}'
    assert value_of(own_tasks.in_coroutine.enqueue(1, 0.5)) == {"told": name}
    assert value_of(first) == "done"
    assert value_of(own_tasks.in_coroutine.enqueue(1, seconds=0.5)) == "done"


@servers
def test_the_lock_of_a_killed_worker_is_free_after_its_ttl(
    workers: list[Worker], start: Callable[[str], Worker]
) -> None:
    third = start("killed")
    killed = own_tasks.raising.using(queue_name="killed").enqueue(60.0)
    assert begun()
    third.stop(signal.SIGKILL)
    assert ended(own_tasks.raising.enqueue()).errors[0].exception_class is LockBusy
    assert eventually(lambda: lock("skipping by hand").holder() is None, 5)
    assert value_of(own_tasks.raising.enqueue()) == "done"
    killed.refresh()
    assert not killed.is_finished  # nobody delivers it again, but for an administrator


@servers
def test_the_context_is_no_part_of_the_key_and_names_the_holder(workers: list[Worker]) -> None:
    result = own_tasks.with_context.enqueue(1)
    assert f"task tests.contrib.own_tasks.with_context[{result.id}]" in value_of(result)


@servers
def test_a_task_delivered_twice_is_not_skipped_by_itself() -> None:
    """As if a worker had died in the middle, and somebody had made the task ready again."""
    unserved = own_tasks.with_context.using(queue_name="unserved")
    context = own_tasks.tasks.TaskContext(task_result=unserved.enqueue(1))
    another = own_tasks.tasks.TaskContext(task_result=unserved.enqueue(1))
    seen: list[Any] = []

    @single_instance("k")
    def body(context: Any) -> None:
        with pytest.raises(LockBusy):
            in_thread(lambda: single_instance("k")(nobody)(context))
        seen.append(in_thread(lambda: single_instance("k")(nobody)(another)))
        seen.append(in_thread(lambda: single_instance("k")(nobody)()))

    def nobody(*context: Any) -> None:
        raise AssertionError("the lock is held")

    nobody.__module__, nobody.__qualname__ = body.__module__, body.__qualname__
    body(context)
    assert [is_skip(value, "busy", "k") for value in seen] == [True, True]


def test_what_min_hold_keeps_is_too_soon() -> None:
    run = single_instance("kept", min_hold=60)(lambda: "done")
    assert run() == "done"
    assert is_skip(run(), "too_soon", "kept")


def test_at_once_and_inside_itself() -> None:
    assert own_tasks.nests.enqueue(False).return_value is None
    assert is_skip(own_tasks.nests_in_itself.enqueue().return_value, "busy", "nests")


# -- once -----------------------------------------------------------------------------------------


@servers
def test_a_task_runs_once_per_key(workers: list[Worker]) -> None:
    results = [own_tasks.charge.enqueue(7, 0.1) for _ in range(6)]
    assert [value_of(result) for result in results] == [[7]] * 6
    assert own_tasks.noted("charge") == 1
    assert Job.objects.get().task == "tests.contrib.own_tasks.charge"


@servers
def test_a_killed_worker_leaves_nothing_and_the_next_task_runs(
    workers: list[Worker], start: Callable[[str], Worker]
) -> None:
    third = start("killed")
    own_tasks.charge.using(queue_name="killed").enqueue(7, 60.0)
    assert eventually(lambda: lock("once:charge:7").holder() is not None, LIMIT)
    third.stop(signal.SIGKILL)
    assert value_of(own_tasks.charge.enqueue(7)) == [7]
    assert own_tasks.noted("charge") == 1


@servers
def test_once_in_coroutines_and_without_the_context(workers: list[Worker]) -> None:
    first = own_tasks.charge_in_coroutine.enqueue(7)
    assert value_of(first) == first.id
    assert value_of(own_tasks.charge_in_coroutine.enqueue(order=7)) == first.id
    assert own_tasks.noted("charge") == 1
    assert Job.objects.get().key == 'tests.contrib.own_tasks.charge_in_coroutine:{"order":7}'


@servers
def test_what_a_task_cannot_return_is_undone(workers: list[Worker]) -> None:
    failed = ended(own_tasks.not_json.enqueue())
    assert failed.errors[0].exception_class is TypeError
    assert "not_json returned what is no plain JSON" in failed.errors[0].traceback
    assert (own_tasks.noted("not JSON"), Job.objects.count()) == (0, 0)


def test_a_duplicate_may_be_skipped() -> None:
    assert own_tasks.skips.call("a", "{names}") is None
    key = 'once:tests.contrib.own_tasks.skips:{"names":["a","{names}"]}'
    assert is_skip(own_tasks.skips.call("a", "{names}"), "done", key)
    assert own_tasks.skips.call("b") is None
    assert own_tasks.noted("skips") == 2
    assert own_tasks.skips.call("x" * 500) is None
    assert own_tasks.skips.call("x" * 500)["distlock"] == "skipped"


# -- misuse ---------------------------------------------------------------------------------------


def no_generator() -> Iterator[int]:
    yield 1


async def coroutine() -> None: ...


@pytest.mark.parametrize("decorate", [single_instance, once])
def test_what_cannot_be_decorated(decorate: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match=f"{decorate.__name__} goes under @task"):
        decorate(own_tasks.charge)
    with pytest.raises(TypeError, match="decorates functions"):
        decorate(Worker)
    with pytest.raises(TypeError, match="generator"):
        decorate(no_generator)
    with pytest.raises(TypeError, match="transaction"):
        decorate(atomic=True)(coroutine)
    with pytest.raises(TypeError, match="key must be"):
        decorate(key=7)(coroutine)
    with pytest.raises(ValueError, match="no argument"):
        decorate("{nobody}", atomic=False)(coroutine)


def test_there_is_no_retry() -> None:
    with pytest.raises(ValueError, match="cannot send itself again"):
        single_instance(on_busy="retry")
    with pytest.raises(ValueError, match="on_busy must be one of"):
        single_instance(on_busy="drop")
