"""`enqueue_once` with real workers, over a real broker, and with processes that die."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from celery.result import AsyncResult
from django.core.management import call_command
from django.db import transaction

from distlock.contrib._enqueue import publish
from distlock.contrib.celery import enqueue_once
from distlock.models import Job
from tests.contrib import celery_app, enqueued
from tests.contrib.celery_app import noted
from tests.contrib.conftest import ROOT, Worker, environment
from tests.contrib.tasks import starts
from tests.contrib.test_celery_workers import result_of, wait_for_start, wait_until
from tests.machine import die_with_parent, free_port
from tests.torture.conftest import LEVEL

pytestmark = [pytest.mark.usefixtures("worker"), pytest.mark.vendor("postgresql", "mysql")]

PROCESSES, CALLS, BUSY_CALLS = (32, 10_000, 3_200) if LEVEL == "long" else (4, 400, 160)
"""Processes, calls while no worker is there, and calls while one is, which all compete."""
LIMIT = 600 if LEVEL == "long" else 90


def job() -> Job:
    return Job.objects.get()


def ids() -> list[str]:
    """The id of each run that has begun."""
    return [entry["id"] for entry in noted() if entry["event"] == "start"]


@contextmanager
def processes(number: int, *arguments: object, **environ: str) -> Iterator[list[Any]]:
    command = [sys.executable, "-m", "tests.contrib.enqueuers", *map(str, arguments)]
    running = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment(), **environ},
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )
        for _ in range(number)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait(10)
            process.stdout.close()  # type: ignore[union-attr]


def ran(number: int, *arguments: object, status: int = 0, **environ: str) -> list[str]:
    """Run processes to their end, and return the words that they printed."""
    with processes(number, *arguments, **environ) as running:
        said = [process.communicate(timeout=LIMIT)[0] for process in running]
        assert [process.returncode for process in running] == [status] * number
    return [word for text in said for word in text.split()]


def queue_length(name: str) -> int:
    with redis.Redis.from_url(f"{os.environ[celery_app.VARIABLE]}/0") as client:
        return int(client.llen(name))  # type: ignore[arg-type]


# -- as it should be -----------------------------------------------------------------------------


def test_what_is_queued_runs_once_and_frees_its_key() -> None:
    with transaction.atomic():
        first = enqueue_once(enqueued.import_feed, (7, 1.0), until="finish")
    wait_for_start()
    assert enqueue_once(enqueued.import_feed, (7, 1.0), until="finish") == (first.result, False)
    assert result_of(first.result) == "feed 7"
    again = enqueue_once(enqueued.import_feed, (7, 1.0), until="finish")
    assert again.created
    assert result_of(again.result) == "feed 7"
    assert ids() == [first.result.id, again.result.id]


def test_one_runs_and_one_waits_with_the_latest_arguments() -> None:
    def ask(feed: int) -> Any:
        return enqueue_once(enqueued.import_feed, (feed, 1.0), key="feed", replace=True)

    first = ask(1)
    wait_for_start()
    sent = [ask(feed) for feed in (2, 3, 4)]
    assert [one.created for one in sent] == [True, False, False]
    assert len({one.result.id for one in sent}) == 1
    assert result_of(first.result) == "feed 1"
    assert result_of(sent[0].result) == "feed 4"
    begun = [(entry["event"], entry["feed"]) for entry in noted()]
    assert begun == [("start", 1), ("end", 1), ("start", 4), ("end", 4)]
    assert job().state == "done"


def test_a_message_that_is_delivered_twice_runs_once() -> None:
    with transaction.atomic():
        sent = enqueue_once(enqueued.import_feed, (7, 1.0))
        row = job()
    for _ in range(2):
        publish(enqueued.import_feed, "default", row)
    assert result_of(sent.result) == "feed 7"
    wait_until(lambda: queue_length("celery") == 0)
    time.sleep(2.5)  # the copies have come again
    assert ids() == [sent.result.id]


def test_a_revoked_task_frees_its_key() -> None:
    sent = enqueue_once(enqueued.import_feed, (7,), countdown=3)
    wait_until(lambda: queue_length("celery") == 0)  # the worker has it, and waits
    celery_app.app.control.revoke(sent.result.id)
    wait_until(lambda: job().state == "done")
    assert enqueue_once(enqueued.import_feed, (7,)).created
    wait_until(lambda: job().state == "done")
    assert sent.result.id not in ids()


# -- a message that is lost ----------------------------------------------------------------------


def test_a_process_that_is_killed_between_commit_and_publish() -> None:
    (lost,) = ran(1, "die", status=-9)
    row = job()
    assert (row.task_id, row.state) == (lost, "queued")
    assert row.unpublished_since is not None
    assert enqueue_once(enqueued.import_feed, (7,)) == (AsyncResult(lost), False)
    call_command("resend_jobs", older_than=0)
    assert result_of(AsyncResult(lost)) == "feed 7"
    assert ids() == [lost]


def test_a_broker_that_is_down() -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    (lost,) = ran(1, "hammer", "start", 1, **{celery_app.BROKER: nowhere})
    assert job().unpublished_since is not None
    assert queue_length("hammered") == 0
    call_command("resend_jobs", older_than=0)
    assert queue_length("hammered") == 1
    message = celery_app.app.connection_for_read().channel().basic_get("hammered", no_ack=True)
    assert message is not None
    assert message.headers["id"] == lost


# -- a worker that is killed ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def mortal(start_worker: Callable[..., Worker]) -> Worker:
    """A worker whose locks last for two seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTLOCK_WORKER_TTL", "2")
        return start_worker("mortal", "-P", "prefork", "-c", "2", "-Q", "mortal")


def test_a_killed_task_that_is_delivered_again_runs_again(mortal: Worker) -> None:
    sent = enqueue_once(enqueued.crash_late, until="finish", queue="mortal")
    wait_for_start()
    assert result_of(sent.result) == "done"
    assert ids() == [sent.result.id] * 2
    assert (job().state, job().attempts) == ("done", 2)


def test_a_killed_task_that_is_lost_keeps_its_key_no_longer_than_its_lock(mortal: Worker) -> None:
    first = enqueue_once(enqueued.crash_early, until="finish", queue="mortal")
    wait_for_start()
    celery_app.app.backend.delete(f"celery-task-meta-{first.result.id}")  # type: ignore[attr-defined]

    def again() -> Any:
        sent = enqueue_once(enqueued.crash_early, until="finish", queue="mortal")
        return sent.result if sent.created else None

    since = time.monotonic()
    second = wait_until(again)
    assert time.monotonic() - since < 5
    assert result_of(second) == "done"
    assert ids() == [first.result.id, second.id]


# -- many processes ------------------------------------------------------------------------------


@pytest.mark.timeout(LIMIT + 60)
def test_many_callers_of_one_key_make_one_message_per_cycle(
    start_worker: Callable[..., Worker],
) -> None:
    (first,) = ran(PROCESSES, "hammer", "start", CALLS // PROCESSES)
    assert queue_length("hammered") == 1
    worker = start_worker("hammered", "-P", "prefork", "-c", "2", "-Q", "hammered")
    wait_until(lambda: ids() == [first])
    created = [first]
    created += ran(PROCESSES, "hammer", "either", BUSY_CALLS // PROCESSES)
    wait_until(lambda: job().state == "done")
    worker.stop()
    assert queue_length("hammered") == 0
    assert len(created) > 2  # so many cycles at least, however slow the worker is
    assert sorted(ids()) == sorted(created)
    assert starts() == len({*created})
