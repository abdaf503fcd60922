"""What the admin may do with jobs that `enqueue_once` has queued: free the key, run again."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery
from django.contrib.admin.models import LogEntry
from django.contrib.messages import get_messages
from django.db import connection, transaction
from django.test import Client
from django.urls import reverse

from distlock import lock, outbox, reruns
from distlock.backends.base import moment_of
from distlock.contrib.celery import deduplicated, enqueue_once
from distlock.models import DistributedLock, Job
from distlock.states import microseconds
from tests.conformance.rows import query, session
from tests.contrib.in_memory import Queue
from tests.support import eventually
from tests.test_admin import browser, text

pytestmark = pytest.mark.django_db(transaction=True)
servers = pytest.mark.vendor("postgresql", "mysql")

LIST = "/admin/distlock/job/"


@pytest.fixture
def sync(app: Celery, queue: Queue) -> Any:
    @app.task(name="sync")
    @deduplicated
    def sync(account: int) -> int:
        queue.ran.append(account)
        return account

    return sync


@pytest.fixture
def client() -> Client:
    """A browser of somebody who may do all that can be done with jobs."""
    return browser("view_job", "free_job", "rerun_job")


def the_job() -> Any:
    return Job.objects.get(key__startswith="enqueue:")


def ask(client: Client, action: str, *jobs: Job) -> Any:
    post = {"action": action, "_selected_action": [job.pk for job in jobs or [the_job()]]}
    return client.post(LIST, post)


def shown(page: Any) -> list[str]:
    """What a confirmation would post."""
    assert page.status_code == 200, page.status_code
    return [
        html.unescape(value)
        for value in re.findall(r'name="chosen" value="(.*?)"', page.content.decode())
    ]


def said(response: Any) -> list[str]:
    assert response.status_code == 302, response.status_code
    return [str(message) for message in get_messages(response.wsgi_request)]


def confirm(client: Client, action: str, chosen: list[str]) -> list[str]:
    """Say yes to what was shown."""
    post = {"action": action, "_selected_action": ["1"], "chosen": chosen}
    return said(client.post(LIST, post))


def do(client: Client, action: str) -> list[str]:
    return confirm(client, action, shown(ask(client, action)))


def broken(sync: Any, queue: Queue) -> Job:
    """A job whose worker was killed: it says that it runs, and nobody holds its lock."""
    enqueue_once(sync, (1,))
    [task_id] = queue.ids()
    with lock(f"once:{the_job().key}") as lease:
        assert outbox.Run("default", the_job().key, task_id, lease.token).start()
    return the_job()


# -- free ----------------------------------------------------------------------------------------


def test_a_job_that_is_freed_is_queued_anew_and_its_old_message_does_not_run(
    client: Client, sync: Any, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = enqueue_once(sync, (1,))
    page = ask(client, "free")
    assert "Free the keys of these jobs?" in text(page)
    assert the_job().key in text(page)
    assert the_job().state == "queued"
    told = confirm(client, "free", shown(page))
    assert told == [f"The key of the job {the_job().key!r} is free."]
    assert the_job().state == "done"
    entry = LogEntry.objects.get()
    assert (entry.object_repr, entry.user.username) == (the_job().key, "ann<script>")
    assert f"Freed: it was queued, task id {first.id}" in entry.get_change_message()
    said = f"key={the_job().key!r} task_id={first.id!r} change='freed' by='ann<script>'"
    assert f"job_changed {said}" in caplog.text
    assert queue.work()["distlock"] == "duplicate"
    assert queue.ran == []
    second, created = enqueue_once(sync, (1,))
    assert created
    assert second.id != first.id
    assert queue.work() == 1


def test_what_was_broken_off_can_be_freed(client: Client, sync: Any, queue: Queue) -> None:
    broken(sync, queue)
    assert "broken off" in text(ask(client, "free"))
    assert "is free" in do(client, "free")[0]
    assert the_job().state == "done"


def changes(sync: Any, queue: Queue) -> dict[str, Any]:
    """What may happen to a job that waits, between the question and the answer."""

    def run() -> None:
        queue.work()

    def start() -> None:
        with lock(f"once:{the_job().key}") as lease:
            assert outbox.Run("default", the_job().key, the_job().task_id, lease.token).start()

    def start_and_wait() -> None:
        with lock(f"once:{the_job().key}") as lease:
            started = outbox.Run("default", the_job().key, the_job().task_id, lease.token)
            assert started.start()
            started.wait(60)

    def queue_anew() -> None:
        Job.objects.update(expires_at=datetime(1971, 1, 1, tzinfo=timezone.utc))
        before = the_job()
        assert enqueue_once(sync, (1,)).created
        assert (the_job().task_id, the_job().token) == (before.task_id, before.token)

    def purge() -> None:
        Job.objects.all().delete()

    return {each.__name__: each for each in (run, start, start_and_wait, queue_anew, purge)}


@pytest.mark.parametrize("change", ["run", "start", "start_and_wait", "queue_anew", "purge"])
@pytest.mark.parametrize("action", ["free", "rerun"])
def test_a_job_that_has_changed_is_left_alone(
    client: Client, sync: Any, queue: Queue, action: str, change: str
) -> None:
    enqueue_once(sync, (1,))
    key = the_job().key
    chosen = shown(ask(client, action))
    changes(sync, queue)[change]()
    queue.ids()
    before = list(Job.objects.values())
    told = confirm(client, action, chosen)
    assert len(told) == 1
    assert told[0].startswith(f"The job {key!r} was left alone: it has changed, its lock is held,")
    assert list(Job.objects.values()) == before
    assert queue.ids() == []
    assert not LogEntry.objects.exists()


@pytest.mark.parametrize("action", ["free", "rerun"])
def test_a_job_whose_lock_is_held_is_left_alone(
    client: Client, sync: Any, queue: Queue, action: str
) -> None:
    enqueue_once(sync, (1,))
    queue.ids()
    chosen = shown(ask(client, action))
    before = list(Job.objects.values())
    with lock(f"once:{the_job().key}"):
        assert "was left alone" in confirm(client, action, chosen)[0]
    assert list(Job.objects.values()) == before
    assert queue.ids() == []


def test_a_job_that_runs_is_not_offered(client: Client, sync: Any, queue: Queue) -> None:
    job = broken(sync, queue)
    with lock(f"once:{job.key}"):
        page = text(client.get(f"{LIST}{job.pk}/change/"))
        assert "It runs: its lock is held." in page
        assert "Free the key" not in page
        assert "Run again" not in page
        for action in ("free", "rerun"):
            assert set(said(ask(client, action))) == {
                "There is nothing to do for the selected jobs."
            }


@contextmanager
def row_locked(job: Job) -> Iterator[None]:
    """Another session's transaction that has the row."""
    with session() as other:
        other.set_autocommit(False)
        try:
            assert query("SELECT 1 FROM distlock_job WHERE id = %s FOR UPDATE", [job.pk], on=other)
            yield
        finally:
            other.rollback()
            other.set_autocommit(True)


@servers
@pytest.mark.parametrize("action", ["free", "rerun"])
def test_a_row_that_a_transaction_has_is_not_waited_for(
    client: Client, sync: Any, queue: Queue, action: str
) -> None:
    enqueue_once(sync, (1,))
    queue.ids()
    chosen = shown(ask(client, action))
    with row_locked(the_job()):
        assert "was left alone" in confirm(client, action, chosen)[0]
    assert queue.ids() == []


# -- run again -----------------------------------------------------------------------------------


def test_a_lost_message_is_published_again_under_its_id(
    client: Client, sync: Any, queue: Queue
) -> None:
    first, _ = enqueue_once(sync, (1,))
    assert queue.ids() == [first.id]
    page = ask(client, "rerun")
    assert "published once more, under the same task id" in text(page)
    assert queue.ids() == []
    told = confirm(client, "rerun", shown(page))
    assert told == [f"The job {the_job().key!r} is queued."]
    assert the_job().unpublished_since is None
    assert queue.work() == 1
    assert queue.ran == [1]
    assert f"Queued again as {first.id}" in LogEntry.objects.get().get_change_message()


@pytest.mark.usetz
@pytest.mark.parametrize("form", ["datetime", "text"])
def test_an_expires_that_has_passed_does_not_throw_the_message_away(
    client: Client, sync: Any, queue: Queue, form: str
) -> None:
    moment = datetime.now(timezone.utc) + timedelta(seconds=1)
    given: Any = moment if form == "datetime" else moment.isoformat()
    enqueue_once(sync, (1,), expires=given, priority=3)
    queue.ids()
    chosen = shown(ask(client, "rerun"))
    assert "is queued" in confirm(client, "rerun", chosen)[0]
    message = queue.take()
    assert message.headers["expires"] is not None  # it has not passed
    assert eventually(lambda: datetime.now(timezone.utc) > moment + timedelta(seconds=0.1), 20)
    do(client, "rerun")
    message = queue.take()
    assert message.headers["expires"] is None
    assert the_job().arguments["options"].keys() == {"priority"}
    assert queue.work(message) == 1


def test_what_is_published_without_its_expires_has_the_latest_arguments(
    sync: Any, queue: Queue
) -> None:
    """Somebody has replaced them, with a ttl that was over sooner, since the page was shown."""
    enqueue_once(sync, (1,), expires=datetime.now(timezone.utc) + timedelta(seconds=60))
    job = the_job()
    job.arguments["options"]["expires"] = "1971-01-01T00:00:00Z"
    job.save()
    Job.objects.update(arguments={**job.arguments, "args": [2]})
    with transaction.atomic():
        queued = reruns.again("default", job, reruns.Way.PUBLISH)
    assert queued is not None
    assert queued.arguments["args"] == the_job().arguments["args"] == [2]
    assert "expires" not in the_job().arguments["options"]


def test_a_lock_that_a_task_holds_leads_to_its_job(sync: Any, app: Celery, queue: Queue) -> None:
    client, pages = browser("view_job", "view_distributedlock"), []

    @app.task(name="inner")
    @deduplicated
    def inner() -> None:
        with lock("account"):
            row = DistributedLock.objects.get(name="account")
            there = reverse("admin:distlock_distributedlock_change", args=[row.pk])
            pages.append(client.get(there).content.decode())

    enqueue_once(inner)
    job = the_job()
    queue.work()
    there = reverse("admin:distlock_job_change", args=[job.pk])
    assert f'<a href="{there}">{job.key}</a>' in pages[0]


def test_what_the_database_says_of_one_job_is_told_and_the_others_stand(
    client: Client, sync: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distlock.admin import JobAdmin

    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)
    for number in (1, 2, 3):
        enqueue_once(sync, (number,))
    jobs = list(Job.objects.order_by("pk"))
    real = JobAdmin.log_change

    def fail(self: Any, request: Any, job: Any, message: Any) -> Any:
        if job.pk == jobs[1].pk:
            query("SELECT no_such_column")
        return real(self, request, job, message)

    monkeypatch.setattr(JobAdmin, "log_change", fail)
    told = confirm(client, "free", shown(ask(client, "free", *jobs)))
    assert sum(" is free." in each for each in told) == 2
    [refused] = [each for each in told if "no_such_column" in each]
    assert refused.startswith(f"The job {jobs[1].key!r} was left alone. The database says: ")
    states = Job.objects.order_by("pk").values_list("state", flat=True)
    assert list(states) == ["done", "queued", "done"]
    assert LogEntry.objects.count() == 2


def test_a_copy_too_many_does_no_harm(client: Client, sync: Any, queue: Queue) -> None:
    enqueue_once(sync, (1,))
    do(client, "rerun")
    assert queue.work() == 1
    assert queue.work()["distlock"] == "duplicate"
    assert queue.ran == [1]


@pytest.mark.parametrize("state", ["done", "broken off"])
def test_what_is_over_is_queued_with_its_arguments_under_a_new_id(
    client: Client, sync: Any, queue: Queue, state: str
) -> None:
    if state == "done":
        enqueue_once(sync, (1,), expires=timedelta(hours=1))
        queue.work()
    else:
        broken(sync, queue)
    old = the_job()
    page = ask(client, "rerun")
    assert "queued with the arguments that are stored, under a new task id" in text(page)
    assert "is queued" in confirm(client, "rerun", shown(page))[0]
    new = the_job()
    assert (new.state, new.attempts, new.finished_at) == ("queued", 0, None)
    assert new.task_id != old.task_id
    assert new.arguments["args"] == [1]
    assert "expires" not in new.arguments["options"]
    assert not enqueue_once(sync, (1,)).created
    # A redelivery of the old message finds another id in the row.
    assert not outbox.is_wanted("default", new.key, old.task_id)
    assert queue.work() == 1
    assert the_job().state == "done"


def test_what_cannot_be_sent_is_left_to_resend_jobs(
    client: Client, sync: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue_once(sync, (1,))
    queue.ids()
    with monkeypatch.context() as patch:

        def down(*args: Any, **options: Any) -> None:
            raise OSError("the broker is down")

        patch.setattr(sync, "apply_async", down)
        told = do(client, "rerun")
    assert f"The message of {the_job().key!r} could not be sent: it is left to resend_jobs." in told
    assert the_job().unpublished_since is not None
    assert queue.ids() == []
    from distlock.contrib._enqueue import resend

    assert resend("default", 0)[0] == 1
    assert queue.work() == 1


def test_a_task_that_the_app_does_not_have_is_left_alone(
    client: Client, sync: Any, queue: Queue
) -> None:
    enqueue_once(sync, (1,))
    Job.objects.update(task="gone.task")
    before = list(Job.objects.values())
    assert "has no task gone.task" in do(client, "rerun")[0]
    assert list(Job.objects.values()) == before


def test_without_celery_it_is_not_offered(
    client: Client, sync: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue_once(sync, (1,))
    monkeypatch.setattr("distlock.admin.rerunning._has_celery", lambda: False)
    page = text(client.get(f"{LIST}{the_job().pk}/change/"))
    assert "Run again…" not in page
    assert "Free the key…" in page
    assert said(ask(client, "rerun")) == ["There is nothing to do for the selected jobs."]


def test_the_button_leads_to_the_question(client: Client, sync: Any) -> None:
    enqueue_once(sync, (1,))
    body = client.get(f"{LIST}{the_job().pk}/change/").content.decode()
    forms = re.findall(r'(?s)<form method="post" action="(.*?)">(.*?)</form>', body)
    asked = []
    for action, inner in forms:
        if action == LIST:
            post = dict(re.findall(r'name="(\w+)" value="(.*?)"', inner))
            asked.append(re.findall(r"<h1>(.*?)</h1>", client.post(LIST, post).content.decode()))
    assert asked == [["Free the keys of these jobs?"], ["Let these jobs run again?"]]


@pytest.mark.parametrize("autocommit", [True, False])
def test_a_request_that_fails_sends_nothing(
    client: Client, sync: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch, autocommit: bool
) -> None:
    enqueue_once(sync, (1,))
    queue.ids()
    chosen = shown(ask(client, "rerun"))
    before = list(Job.objects.values())
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", not autocommit)

    def fail(*given: Any) -> None:
        raise ZeroDivisionError

    from distlock.admin import JobAdmin

    monkeypatch.setattr(JobAdmin, "log_change", fail)
    with pytest.raises(ZeroDivisionError):
        confirm(client, "rerun", chosen)
    assert list(Job.objects.values()) == before
    assert queue.ids() == []


# -- who may -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("permission", "action"), [("free_job", "rerun"), ("rerun_job", "free")])
def test_each_has_a_permission_of_its_own(
    sync: Any, queue: Queue, permission: str, action: str
) -> None:
    enqueue_once(sync, (1,))
    queue.ids()
    job = the_job()
    chosen = json.dumps(
        [job.pk, job.key, job.task_id, "queued", job.token, microseconds(job.expires_at)]
    )
    before = list(Job.objects.values())
    client = browser("view_job", permission)
    page = client.get(f"{LIST}{job.pk}/change/").content.decode()
    assert f'value="{action}"' not in page
    assert page.count('name="_selected_action"') == 1
    client.post(LIST, {"action": action, "_selected_action": ["1"], "chosen": [chosen]})
    assert list(Job.objects.values()) == before
    assert queue.ids() == []


@pytest.mark.parametrize("chosen", ["", "x", "[]", "[1]", '["1", "k", "i", "queued", 0, 0]', "{}"])
def test_what_nobody_was_asked_is_refused(client: Client, chosen: str) -> None:
    post = {"action": "free", "_selected_action": ["1"], "chosen": [chosen]}
    assert client.post(LIST, post).status_code == 400


# -- receipts ------------------------------------------------------------------------------------


def test_a_receipt_can_be_forgotten_and_the_next_call_runs(client: Client) -> None:
    from distlock import once

    ran: list[int] = []
    job = once("charge:42", keep=3600)
    for _ in range(2):
        job.run(lambda: ran.append(1))
    assert ran == [1]
    row = Job.objects.get()
    page = ask(client, "rerun", row)
    assert "Its receipt is forgotten. Nothing runs now" in text(page)
    assert confirm(client, "rerun", shown(page)) == [
        "The receipt of 'charge:42' is forgotten: the next call runs it."
    ]
    assert ran == [1]
    shown_now = text(client.get(f"{LIST}{row.pk}/change/"))
    assert "The next call runs it. It cannot be run from here" in shown_now
    assert said(ask(client, "rerun", row)) == ["There is nothing to do for the selected jobs."]
    job.run(lambda: ran.append(2))
    assert ran == [1, 2]
    assert "Receipt forgotten" in LogEntry.objects.get().get_change_message()


def test_a_receipt_that_is_new_meanwhile_is_not_forgotten(client: Client) -> None:
    from distlock import once

    once("charge:42").run(int)
    row = Job.objects.get()
    chosen = shown(ask(client, "rerun", row))
    Job.objects.update(expires_at=moment_of(0))
    once("charge:42").run(int)
    assert "was left alone" in confirm(client, "rerun", chosen)[0]
    assert once("charge:42", on_duplicate="skip").run(lambda: 1) is None


def test_inside_a_transaction_of_the_request_it_takes_effect_too(
    client: Client, sync: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue_once(sync, (1,))
    queue.ids()
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)
    assert "is queued" in do(client, "rerun")[0]
    assert not transaction.get_connection().in_atomic_block
    assert queue.work() == 1
