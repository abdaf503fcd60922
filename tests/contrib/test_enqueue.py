"""`enqueue_once` and `@deduplicated` in one process, with a queue in memory served by hand."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery, Task, shared_task
from celery.exceptions import Ignore, Reject, Retry, WorkerLostError
from celery.signals import task_failure, task_revoked
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.db import DatabaseError, OperationalError, connection, transaction
from django.db.transaction import TransactionManagementError
from django.test import TestCase

from distlock import LockBusy, LockError, lock, orders, outbox
from distlock.backends import backend_for
from distlock.contrib.celery import deduplicated, enqueue_once, single_instance
from distlock.models import Job
from tests.contrib.in_memory import Private, Queue, broker_down
from tests.isolation import set_level, snap
from tests.support import eventually, in_thread, is_free, other_session
from tests.test_signals import receiving

# Only the tables of these apps are flushed, which is much faster than all.
transactional = pytest.mark.django_db(transaction=True, available_apps=["distlock", "tests.app"])
with_all_apps = pytest.mark.django_db(transaction=True)
servers = pytest.mark.vendor("postgresql", "mysql")  # SQLite has one writer at a time


@pytest.fixture
def sync(app: Celery, queue: Queue) -> Any:
    @app.task(name="sync")
    @deduplicated
    def sync(account: int, *, note: Any = None, during: Any = None) -> Any:
        queue.ran.append((account, note))
        if BODY:
            return BODY[-1]()
        return note

    return sync


BODY: list[Callable[[], Any]] = []


@pytest.fixture(autouse=True)
def no_body() -> Iterator[None]:
    yield
    BODY.clear()


def state() -> str:
    return Job.objects.get(key__startswith="enqueue:").state


def expire() -> None:
    Job.objects.update(expires_at=datetime(1971, 1, 1, tzinfo=timezone.utc))


# -- queueing ------------------------------------------------------------------------------------


@transactional
def test_a_duplicate_gets_the_result_of_the_first(sync: Any, queue: Queue) -> None:
    first = enqueue_once(sync, (1,))
    assert first.created
    result, created = enqueue_once(sync, kwargs={"account": 1})
    assert (result.id, created) == (first.result.id, False)
    other = enqueue_once(sync, [2])
    assert other.created
    assert queue.ids() == [first.result.id, other.result.id]


@transactional
def test_the_row_says_what_is_queued(sync: Any, queue: Queue) -> None:
    sent = enqueue_once(sync, (1,), {"note": "x"}, ttl=60, priority=3)
    job = Job.objects.get()
    assert job.key == 'enqueue:sync:{"account":1,"during":null,"note":"x"}'
    assert (job.state, job.task, job.task_id) == ("queued", "sync", sent.result.id)
    assert job.arguments == {
        "args": [1],
        "kwargs": {"note": "x"},
        "options": {"priority": 3},
        "ttl": 60.0,
    }
    assert job.expires_at - job.created_at == timedelta(seconds=60)
    assert job.unpublished_since is None


@transactional
def test_it_is_published_when_the_transaction_commits(sync: Any, queue: Queue) -> None:
    with transaction.atomic():
        sent = enqueue_once(sync, (1,))
        assert enqueue_once(sync, (1,)) == (sent.result, False)
        assert queue.ids() == []
        assert Job.objects.get().unpublished_since is not None
    assert queue.ids() == [sent.result.id]
    assert Job.objects.get().unpublished_since is None


@transactional
def test_a_rollback_leaves_neither_row_nor_message_nor_key(sync: Any, queue: Queue) -> None:
    with transaction.atomic():
        enqueue_once(sync, (1,))
        transaction.set_rollback(True)
    assert (Job.objects.count(), queue.ids()) == (0, [])
    with transaction.atomic():
        with pytest.raises(KeyError), transaction.atomic():
            enqueue_once(sync, (1,))
            raise KeyError
        sent = enqueue_once(sync, (1,))
        assert sent.created
    assert queue.ids() == [sent.result.id]


@servers
@transactional
@pytest.mark.parametrize("commits", [True, False])
def test_who_comes_meanwhile_waits_for_the_transaction(
    sync: Any, queue: Queue, commits: bool
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    sent: list[Any] = []

    def first() -> None:
        with transaction.atomic():
            sent.append(enqueue_once(sync, (1,)))
            begun.set()
            assert go_on.wait(20)
            transaction.set_rollback(not commits)

    thread = threading.Thread(target=in_thread, args=(first,))
    thread.start()
    assert begun.wait(10)
    threading.Timer(0.3, go_on.set).start()
    second = enqueue_once(sync, (1,))
    thread.join(20)
    assert second.created is not commits
    assert queue.ids() == [sent[0].result.id if commits else second.result.id]


@servers
@transactional
def test_that_wait_is_bounded(sync: Any, queue: Queue, settings: Any) -> None:
    settings.DISTLOCK = {"WAIT": 0.6}
    told: list[tuple[str, bool]] = []

    def tell(sender: Any, *, name: str, holder: Any, **_: Any) -> None:
        told.append((name, holder is None))

    # Keys that no test has deleted: on InnoDB an insert over a row that is deleted, and not yet
    # cleared away, locks the gap beside it.
    with transaction.atomic(), receiving("lock_busy", tell):
        enqueue_once(sync, (71,))
        with pytest.raises(LockBusy, match="sync") as raised:
            in_thread(lambda: enqueue_once(sync, (71,)))
        in_thread(lambda: enqueue_once(sync, (72,)))
    assert told == [(raised.value.name, False)]  # once, however often it looked
    assert raised.value.waited >= 0.6


@servers
@transactional
def test_who_waits_sees_that_somebody_has_queued_the_same(sync: Any, queue: Queue) -> None:
    key = 'enqueue:sync:{"account":81,"during":null,"note":null}'
    done: list[Any] = []
    with lock(key, ttl=60):
        waiting = threading.Thread(
            target=in_thread, args=(lambda: done.append(enqueue_once(sync, (81,))),)
        )
        waiting.start()
        time.sleep(0.2)
        assert done == []
        late = datetime(2100, 1, 1, tzinfo=timezone.utc)
        Job.objects.create(key=key, state="queued", task_id="theirs", expires_at=late)
        assert eventually(lambda: done)
    waiting.join(10)
    assert (done[0].result.id, done[0].created) == ("theirs", False)


class InTestCase(TestCase):
    """As users test."""

    def test_captured_callbacks_publish(self) -> None:
        app = Private("unit", broker="memory://", backend="cache+memory://", set_as_current=False)
        queue = Queue(app)

        @app.task(name="sync")
        @deduplicated
        def sync() -> None:
            queue.ran.append("sync")

        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            sent = enqueue_once(sync)
            assert sent.created
            assert not enqueue_once(sync).created
            assert queue.ids() == []
        assert len(callbacks) == 1
        message = queue.take()
        assert message.headers["id"] == sent.result.id
        queue.work(message)
        assert queue.ran == ["sync"]
        assert state() == "done"

    def test_an_eager_task_runs_in_the_callback(self) -> None:
        app = Private("unit", set_as_current=False)
        app.conf.task_always_eager = True
        ran = []

        @app.task
        @deduplicated
        def sync() -> None:
            ran.append("sync")

        with self.captureOnCommitCallbacks(execute=True):
            enqueue_once(sync)
            assert ran == []
        assert ran == ["sync"]


# -- a key of one's own, and newer arguments -----------------------------------------------------


@transactional
def test_a_key_counts_for_its_task(sync: Any, app: Celery, queue: Queue) -> None:
    @app.task(name="other")
    @deduplicated
    def other() -> None: ...

    assert enqueue_once(sync, (1,), key="k" * 255).created
    assert not enqueue_once(sync, (2,), key="k" * 255).created
    assert enqueue_once(sync, (2,), key="k" * 254).created
    assert enqueue_once(other, key="k" * 255).created
    assert len(queue.ids()) == 3


@transactional
def test_without_replace_the_first_arguments_count(sync: Any, queue: Queue) -> None:
    enqueue_once(sync, (1,), {"note": "old"}, key="k")
    enqueue_once(sync, (1,), {"note": "new"}, key="k")
    assert queue.work() == "old"


@transactional
def test_replace_runs_with_the_latest_arguments(sync: Any, queue: Queue) -> None:
    first = enqueue_once(sync, (1,), {"note": "old"}, key="k", replace=True)
    for note in ("newer", "newest"):
        again = enqueue_once(sync, kwargs={"account": 2, "note": note}, key="k", replace=True)
        assert (again.result.id, again.created) == (first.result.id, False)
    assert queue.work() == "newest"
    assert (queue.ran, queue.ids()) == ([(2, "newest")], [])


@transactional
def test_a_replacement_changes_neither_options_nor_how_long_the_message_may_wait(
    sync: Any, queue: Queue
) -> None:
    enqueue_once(sync, (1,), key="k", countdown=9000, ttl=60)
    before = Job.objects.get()
    enqueue_once(sync, (2,), key="k", replace=True, priority=7)
    after = Job.objects.get()
    assert after.arguments["args"] == [2]
    assert after.arguments["options"] == before.arguments["options"]
    assert after.expires_at == before.expires_at
    enqueue_once(sync, (3,), key="k", replace=True, ttl=20000)
    assert Job.objects.get().expires_at > before.expires_at


@transactional
def test_a_transaction_by_hand_is_refused_before_anything_is_written(sync: Any) -> None:
    transaction.set_autocommit(False)
    try:
        with pytest.raises(TransactionManagementError, match=r"atomic\(\)"):
            enqueue_once(sync, (1,))
        transaction.commit()
    finally:
        transaction.set_autocommit(True)
    assert not Job.objects.exists()


@transactional
def test_a_replacement_that_is_rolled_back_is_none(sync: Any, queue: Queue) -> None:
    enqueue_once(sync, (1,), {"note": "old"}, key="k")
    with transaction.atomic():
        enqueue_once(sync, (1,), {"note": "new"}, key="k", replace=True)
        transaction.set_rollback(True)
    assert queue.work() == "old"


@servers
@transactional
def test_a_worker_does_not_wait_for_who_replaces(sync: Any, queue: Queue) -> None:
    enqueue_once(sync, (1,), {"note": "old"}, key="k")
    with transaction.atomic():
        enqueue_once(sync, (1,), {"note": "new"}, key="k", replace=True)
        in_thread(queue.work)  # comes again
        assert queue.ran == []
    assert queue.work() == "new"


@servers
@transactional
def test_a_run_sees_what_a_caller_whose_call_was_a_duplicate_has_committed(
    sync: Any, queue: Queue
) -> None:
    enqueue_once(sync, (1,))
    BODY.append(lambda: Job.objects.filter(key="mine").exists())
    with transaction.atomic():
        Job.objects.create(key="mine")
        assert not enqueue_once(sync, (1,)).created
        in_thread(lambda: transaction.atomic()(enqueue_once)(sync, (1,)))  # nor waits for us
        in_thread(queue.work)  # comes again
        assert queue.ran == []
    assert queue.work() is True


@servers
@transactional
def test_a_run_that_begins_between_two_looks_is_none_to_count_on(
    sync: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, found = enqueue_once(sync, (1,)).result, orders.Order._is_taken

    def is_taken(order: Any, job: Job) -> bool:
        taken = found(order, job)
        monkeypatch.setattr(orders.Order, "_is_taken", found)
        in_thread(queue.work)
        return taken

    monkeypatch.setattr(orders.Order, "_is_taken", is_taken)
    with transaction.atomic():
        again = enqueue_once(sync, (1,))
    assert again.created
    assert queue.ids() == [again.result.id] != [first.id]


@servers
@transactional
def test_an_old_snapshot_is_not_asked(sync: Any, queue: Queue) -> None:
    enqueue_once(sync, (1,))
    with set_level("REPEATABLE READ"), transaction.atomic():
        snap()
        in_thread(queue.work)
        with pytest.raises(LockError, match="REPEATABLE READ"):
            enqueue_once(sync, (1,))


@servers
@pytest.mark.timeout(30)
@transactional
@pytest.mark.parametrize(
    ("level", "inside"),
    [("READ COMMITTED", True), ("READ COMMITTED", False), ("REPEATABLE READ", False)],
)
def test_a_run_that_ends_just_after_the_row_was_read_is_noticed(
    sync: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch, level: str, inside: bool
) -> None:
    with set_level(level):
        first, find = enqueue_once(sync, (1,)).result, orders.Order._find

        def find_and_run(order: Any, **how: Any) -> Job | None:
            found = find(order, **how)
            monkeypatch.setattr(orders.Order, "_find", find)
            in_thread(queue.work)
            return found

        monkeypatch.setattr(orders.Order, "_find", find_and_run)
        with transaction.atomic() if inside else nullcontext():
            again = enqueue_once(sync, (1,), replace=not inside)  # which looks in its turn only
        monkeypatch.undo()
        assert queue.ran == [(1, None)]
        assert again.created
        assert queue.ids() == [again.result.id] != [first.id]


@servers
@transactional
def test_a_row_that_is_shared_in_vain_stays_free(sync: Any) -> None:
    """Who waits for its turn with a lock on the row would be waited for by who has the turn."""
    enqueue_once(sync, (1,))
    job = Job.objects.get()
    backend, lock_now = backend_for(connection), Job.objects.select_for_update(nowait=True)

    def is_free() -> bool:
        try:
            with transaction.atomic():
                return lock_now.get() == job
        except DatabaseError:
            return False

    with transaction.atomic():
        assert not backend.share(connection, Job.objects.filter(state="running"), job.pk)
        assert in_thread(is_free)
        assert backend.share(connection, Job.objects.filter(state="queued"), job.pk)
        assert not in_thread(is_free)
    assert in_thread(is_free)


@servers
@transactional
def test_a_row_that_stays_locked_is_an_error_that_names_it(sync: Any, settings: Any) -> None:
    settings.DISTLOCK = {**getattr(settings, "DISTLOCK", {}), "WAIT": 0.3}
    enqueue_once(sync, (1,))
    with other_session() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT * FROM distlock_job FOR UPDATE")
        with pytest.raises(OperationalError, match=r"sync.*locked or written by others for 0\.3"):
            with transaction.atomic():
                enqueue_once(sync, (1,))
        cursor.execute("ROLLBACK")


@transactional
def test_what_is_no_json_but_celery_can_send_arrives_as_it_was(sync: Any, queue: Queue) -> None:
    note = [uuid.uuid4(), datetime(2024, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc)]
    enqueue_once(sync, (1,), {"note": note}, eta=datetime(2024, 1, 1, tzinfo=timezone.utc))
    assert queue.work() == note


# -- one at a time -------------------------------------------------------------------------------


@transactional
def test_the_key_is_free_after_the_run(sync: Any, queue: Queue) -> None:
    for _ in range(2):
        assert enqueue_once(sync, (1,)).created
        queue.work()
        assert state() == "done"
    assert len(queue.ran) == 2


@transactional
def test_until_start_a_call_during_the_run_queues_the_next(sync: Any, queue: Queue) -> None:
    sent: list[Any] = []
    BODY.append(lambda: sent.extend(enqueue_once(sync, (1,)) for _ in range(2)))
    first = enqueue_once(sync, (1,))
    queue.work()
    assert [one.created for one in sent] == [True, False]
    assert len({one.result.id for one in [first, *sent]}) == 2
    BODY.clear()
    assert state() == "queued"
    queue.work()
    assert (len(queue.ran), state(), queue.ids()) == (2, "done", [])


@transactional
def test_until_finish_a_call_during_the_run_is_a_duplicate(sync: Any, queue: Queue) -> None:
    sent: list[Any] = []
    BODY.append(lambda: sent.append(enqueue_once(sync, (1,), until="finish", replace=True)))
    first = enqueue_once(sync, (1,), until="finish")
    queue.work()
    assert sent == [(first.result, False)]
    assert (queue.ids(), state()) == ([], "done")


@transactional
@pytest.mark.parametrize("until", ["start", "finish"])
def test_a_copy_of_the_message_does_not_run(sync: Any, queue: Queue, until: Any) -> None:
    sent = enqueue_once(sync, (1,), until=until)
    message = queue.take()
    queue.work(message)
    stale = {"distlock": "duplicate", "lock": f"once:{Job.objects.get().key}"}
    assert queue.work(message) == stale | {"task_id": sent.result.id}
    enqueue_once(sync, (1,), until=until)
    assert queue.work(message)["distlock"] == "duplicate"
    Job.objects.all().delete()
    assert queue.work(message)["distlock"] == "duplicate"
    assert len(queue.ran) == 1


@transactional
def test_a_copy_that_comes_during_the_run_comes_again(sync: Any, queue: Queue) -> None:
    sent = enqueue_once(sync, (1,))
    message = queue.take()
    BODY.append(lambda: in_thread(lambda: queue.work(message)))
    queue.work(message)
    again = queue.take()
    assert again.headers["id"] == sent.result.id
    assert again.headers["eta"] is not None
    assert queue.work(again)["distlock"] == "duplicate"
    assert len(queue.ran) == 1


@transactional
def test_a_stale_copy_does_not_wait_for_the_run_of_another(sync: Any, queue: Queue) -> None:
    answers: list[Any] = []
    enqueue_once(sync, (1,))
    stale = queue.take()
    queue.work(stale)
    BODY.append(lambda: answers.append(in_thread(lambda: queue.work(stale))))
    enqueue_once(sync, (1,))
    queue.work()
    assert answers[0]["distlock"] == "duplicate"
    assert queue.ids() == []


@transactional
def test_the_next_run_waits_for_the_one_before(sync: Any, queue: Queue) -> None:
    def during() -> None:
        sent = enqueue_once(sync, (1,))
        in_thread(queue.work)  # is busy, and goes back
        assert enqueue_once(sync, (1,)) == (sent.result, False)

    BODY.append(during)
    enqueue_once(sync, (1,))
    queue.work()
    BODY.clear()
    assert len(queue.ran) == 1
    queue.work()
    assert (len(queue.ran), queue.ids()) == (2, [])


# -- what does not end well ----------------------------------------------------------------------


def fail() -> None:
    raise ValueError("no")


@transactional
def test_a_failure_frees_the_key(sync: Any, queue: Queue) -> None:
    BODY.append(fail)
    enqueue_once(sync, (1,), until="finish")
    assert isinstance(queue.work(), ValueError)
    assert state() == "done"


@transactional
@pytest.mark.parametrize("how", ["self.retry", "autoretry_for", "throw=False"])
def test_a_retry_keeps_the_id_and_the_key(app: Celery, queue: Queue, how: str) -> None:
    options = {"autoretry_for": (ValueError,)} if how == "autoretry_for" else {}

    @app.task(bind=True, default_retry_delay=100, **options)
    @deduplicated
    def flaky(self: Task[Any, Any]) -> str:
        queue.ran.append(self.request.retries)
        if self.request.retries == 0:
            if how == "autoretry_for":
                fail()
            self.retry(throw=how == "self.retry")
        return "done"

    # After throw=False the result says that it is over.
    until: Any = "start" if how == "throw=False" else "finish"
    sent = enqueue_once(flaky, until=until, ttl=50)
    queue.work()
    job = Job.objects.get()
    assert (job.state, job.attempts) == ("queued", 1)
    if how != "throw=False":
        assert 140 < (job.expires_at - job.started_at).total_seconds() < 160
    assert enqueue_once(flaky, until=until) == (sent.result, False)
    queue.work()
    assert (queue.ran, state(), queue.ids()) == ([0, 1], "done", [])


@transactional
def test_the_last_failure_of_a_retried_task_frees_the_key(app: Celery, queue: Queue) -> None:
    @app.task(autoretry_for=(ValueError,), max_retries=1)
    @deduplicated
    def failing() -> None:
        fail()

    enqueue_once(failing)
    queue.work()
    assert state() == "queued"
    queue.work()
    assert (state(), queue.ids()) == ("done", [])


@transactional
@pytest.mark.parametrize(
    ("error", "left"),
    [(Ignore(), "done"), (Reject(requeue=False), "done"), (Reject(requeue=True), "queued")],
    ids=["ignore", "reject", "requeue"],
)
def test_what_is_ignored_or_rejected(sync: Any, queue: Queue, error: Any, left: str) -> None:
    def body() -> None:
        raise error

    BODY.append(body)
    enqueue_once(sync, (1,))
    queue.work()
    assert state() == left


@transactional
def test_who_was_broken_off_is_delivered_again(sync: Any, queue: Queue) -> None:
    def broken() -> None:
        raise SystemExit

    BODY.append(broken)
    enqueue_once(sync, (1,), until="finish")
    message = queue.take()
    with pytest.raises(SystemExit):
        queue.work(message)
    assert state() == "running"
    BODY.clear()
    queue.work(message)
    assert (len(queue.ran), state()) == (2, "done")


@transactional
def test_nobody_waits_for_who_was_broken_off(sync: Any, queue: Queue) -> None:
    def broken() -> None:
        raise SystemExit

    BODY.append(broken)
    first = enqueue_once(sync, (1,), until="finish")
    message = queue.take()
    with pytest.raises(SystemExit):
        queue.work(message)
    second = enqueue_once(sync, (1,), until="finish")
    assert second.created
    assert second.result.id != first.result.id
    BODY.clear()
    assert queue.work(message)["distlock"] == "duplicate"
    queue.work()
    assert (len(queue.ran), state()) == (2, "done")


@transactional
def test_a_late_end_leaves_the_row_of_the_next_run_alone(sync: Any) -> None:
    enqueue_once(sync, (1,))
    job = Job.objects.get()
    first, second = (outbox.Run("default", job.key, job.task_id, token) for token in (1, 2))
    assert first.start()
    assert second.start()
    first.finish()
    first.wait(9)
    assert state() == "running"
    assert first.start() is None  # one that lost its lock before it began
    second.finish()
    assert state() == "done"


@transactional
def test_what_has_waited_too_long_is_sent_again_under_its_id(sync: Any, queue: Queue) -> None:
    first = enqueue_once(sync, (1,), {"note": "old"}, key="k")
    expire()
    again = enqueue_once(sync, (1,), {"note": "new"}, key="k")
    assert (again.result.id, again.created) == (first.result.id, True)
    assert queue.work() == "new"
    assert queue.work()["distlock"] == "duplicate"


@transactional
@pytest.mark.parametrize("until", ["start", "finish"])
def test_a_row_whose_result_says_that_it_is_over(sync: Any, queue: Queue, until: Any) -> None:
    first = enqueue_once(sync, (1,))
    sync.backend.store_result(first.result.id, None, "REVOKED")
    again = enqueue_once(sync, (1,), until=until)
    assert again.created is (until == "finish")
    expire()
    late = enqueue_once(sync, (1,), until=until)
    assert late.result.id != first.result.id


@transactional
def test_without_a_result_backend_nothing_is_over(app: Celery, queue: Queue) -> None:
    bare = Private("bare", broker="memory://", set_as_current=False)

    @bare.task
    @deduplicated
    def task() -> None: ...

    first = enqueue_once(task, until="finish")
    assert enqueue_once(task, until="finish") == (first.result, False)


@transactional
@pytest.mark.parametrize("terminated", [False, True])
def test_a_revoked_message_frees_its_key(sync: Any, queue: Queue, terminated: bool) -> None:
    sent = enqueue_once(sync, (1,))
    message = queue.take()

    class Request:
        id = sent.result.id
        headers = message.headers

    Request.id = "another"
    task_revoked.send(sync, request=Request, terminated=terminated, signum=None, expired=False)
    Request.id = sent.result.id
    Job.objects.update(state="running")
    task_revoked.send(sync, request=Request, terminated=terminated, signum=None, expired=False)
    if terminated:
        assert eventually(lambda: state() == "done")
    else:  # a copy was thrown away
        assert not eventually(lambda: state() == "done", within=0.3)
    Job.objects.filter(state="running").update(state="queued")
    task_revoked.send(sync, request=Request, terminated=terminated, signum=None, expired=False)
    assert eventually(lambda: state() == "done")
    assert enqueue_once(sync, (1,)).created


# -- lost messages -------------------------------------------------------------------------------


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("_deliveries", "_deduplicated"):
        monkeypatch.setattr(f"distlock.contrib.{module}.PAUSE", 0.02)


@pytest.fixture
def down(app: Celery) -> Iterator[pytest.MonkeyPatch]:
    with broker_down(app) as patch:
        yield patch


@with_all_apps
def test_a_message_that_could_not_be_sent_is_sent_later(
    sync: Any, queue: Queue, down: Any, caplog: Any, capsys: Any
) -> None:
    with transaction.atomic():
        sent = enqueue_once(sync, (1,), {"note": "x"}, countdown=0, headers={"own": 1})
    assert "job_unpublished" in caplog.text
    assert enqueue_once(sync, (1,), {"note": "x"}) == (sent.result, False)
    with pytest.raises(CommandError, match="the broker is down"):
        call_command("resend_jobs", "--older-than", "0")
    assert Job.objects.get().unpublished_since is not None
    down.undo()
    call_command("resend_jobs")  # not old enough
    call_command("resend_jobs", "--older-than", "0")
    call_command("resend_jobs", "--older-than", "0")
    assert capsys.readouterr().out.splitlines() == [
        "Published 0 jobs queued at least 60 s ago.",
        "Published 1 job queued at least 0 s ago.",
        "Published 0 jobs queued at least 0 s ago.",
    ]
    message = queue.take()
    assert (message.headers["id"], message.headers["own"]) == (sent.result.id, 1)
    assert queue.work(message) == "x"
    assert queue.ids() == []


# -- a message that fails before its job has started ----------------------------------------------


def fail_at_the_start(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def start(run: Any) -> None:
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(outbox.Run, "start", start)


@transactional
def test_a_database_that_does_not_answer_at_the_start_is_asked_again(
    sync: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = enqueue_once(sync, (1,), {"note": "x"})
    fail_at_the_start(monkeypatch, OperationalError("the server is starting up"))
    assert isinstance(queue.work(), Retry)
    assert (state(), queue.ran) == ("queued", [])
    message = queue.take()
    assert message.headers["id"] == sent.result.id
    assert queue.work(message) == "x"


@transactional
def test_a_message_that_fails_before_the_start_frees_its_key(
    sync: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue_once(sync, (1,))
    fail_at_the_start(monkeypatch, ZeroDivisionError())
    assert isinstance(queue.work(), ZeroDivisionError)
    assert state() == "done"
    assert enqueue_once(sync, (1,)).created


@with_all_apps
def test_a_message_that_cannot_go_back_to_the_queue_is_left_to_resend_jobs(
    sync: Any, queue: Queue, app: Celery, caplog: Any
) -> None:
    sent = enqueue_once(sync, (1,), {"note": "x"})
    job = Job.objects.get()
    with lock(f"once:{job.key}"), broker_down(app):
        in_thread(queue.work)
    assert "left to resend_jobs" in caplog.text
    job.refresh_from_db()
    assert (job.state, job.task_id, queue.ids()) == ("queued", sent.result.id, [])
    assert job.unpublished_since is not None
    call_command("resend_jobs", older_than=0)
    assert queue.work() == "x"


@pytest.mark.vendor("postgresql")  # on InnoDB the row cannot say so while somebody shares it
@with_all_apps
def test_a_run_that_a_transaction_counts_on_is_left_to_resend_jobs(
    sync: Any, queue: Queue, app: Celery
) -> None:
    sent = enqueue_once(sync, (1,), {"note": "x"})
    with transaction.atomic():
        assert not enqueue_once(sync, (1,), {"note": "x"}).created
        with broker_down(app):
            in_thread(queue.work)
    assert (state(), queue.ids()) == ("queued", [])
    call_command("resend_jobs", older_than=0)
    message = queue.take()
    assert message.headers["id"] == sent.result.id
    assert queue.work(message) == "x"


@pytest.mark.vendor("mysql")
@with_all_apps
def test_a_worker_goes_on_until_the_row_can_say_that_its_message_was_not_sent(
    sync: Any, queue: Queue, app: Celery, short_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, unsent = [], outbox.unsent

    def count(*which: Any) -> bool:
        tries.append(which)
        return unsent(*which)

    enqueue_once(sync, (1,), {"note": "x"})
    monkeypatch.setattr(outbox, "unsent", count)
    with ThreadPoolExecutor(1) as pool, broker_down(app):
        with transaction.atomic():
            assert not enqueue_once(sync, (1,), {"note": "x"}).created
            worker = pool.submit(in_thread, queue.work)
            assert eventually(lambda: len(tries) >= 2)
            assert not worker.done()
            assert in_thread(lambda: is_free(f"once:{tries[0][1]}")), "nobody is kept out"
        worker.result(30)
    assert (state(), queue.ids()) == ("queued", [])
    call_command("resend_jobs", older_than=0)
    assert queue.work() == "x"


@with_all_apps
def test_a_database_that_is_down_with_the_broker_is_asked_again(
    sync: Any, queue: Queue, app: Celery, short_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsent = outbox.unsent

    def gone(*args: Any) -> bool:
        monkeypatch.setattr(outbox, "unsent", unsent)
        raise OperationalError("the server has gone away")

    enqueue_once(sync, (1,), {"note": "x"})
    monkeypatch.setattr(outbox, "unsent", gone)
    with lock(f"once:{Job.objects.get().key}"), broker_down(app):
        in_thread(queue.work)
    assert outbox.unsent is unsent
    assert Job.objects.get().unpublished_since is not None


@transactional
def test_a_message_is_given_back_where_the_database_is_down_with_the_broker(
    sync: Any, queue: Queue, app: Celery, short_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: Any) -> bool:
        raise OperationalError("the server has gone away")

    enqueue_once(sync, (1,))
    monkeypatch.setattr(sync, "acks_late", True)
    monkeypatch.setattr(outbox, "unsent", gone)
    with lock(f"once:{Job.objects.get().key}"), broker_down(app):
        assert isinstance(in_thread(queue.work), Reject)
    assert state() == "queued"


@transactional
def test_what_nobody_can_be_told_of_keeps_its_key(
    sync: Any, queue: Queue, app: Celery, short_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody may count on the run: the next call sends it again, after the ttl."""
    monkeypatch.setattr("distlock.contrib._deduplicated.PERSISTENCE", 0.1)
    monkeypatch.setattr(outbox, "unsent", lambda *_: False)
    enqueue_once(sync, (1,), {"note": "x"})
    with lock(f"once:{Job.objects.get().key}"), broker_down(app):
        assert isinstance(in_thread(queue.work), ConnectionRefusedError)
    assert state() == "queued"


@transactional
def test_a_redelivery_that_cannot_be_sent_again_is_given_back_to_the_broker(
    sync: Any, queue: Queue, app: Celery, short_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row says that it runs: so it did in the process that was killed."""
    monkeypatch.setattr(sync, "acks_late", True)
    enqueue_once(sync, (1,), {"note": "x"})
    message, job = queue.take(), Job.objects.get()
    with lock(f"once:{job.key}") as lease:
        assert outbox.Run("default", job.key, job.task_id, lease.token).start()
        with broker_down(app):
            given_back = in_thread(lambda: queue.work(message))
    assert isinstance(given_back, Reject)
    assert given_back.requeue
    assert state() == "running"
    assert queue.work(message) == "x"


@with_all_apps
def test_a_run_that_cannot_be_sent_again_by_single_instance_is_left_to_resend_jobs_too(
    app: Celery, queue: Queue
) -> None:
    @app.task(name="single")
    @deduplicated
    @single_instance("account", on_busy="retry")
    def single() -> str:
        return "done"

    sent = enqueue_once(single)
    with lock("account"), broker_down(app):
        assert isinstance(in_thread(queue.work), Ignore)
    assert (state(), queue.ids()) == ("queued", [])
    call_command("resend_jobs", older_than=0)
    message = queue.take()
    assert message.headers["id"] == sent.result.id
    assert queue.work(message) == "done"


@transactional
def test_a_message_that_is_not_wanted_any_more_is_not_kept(
    sync: Any, queue: Queue, app: Celery, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    enqueue_once(sync, (1,))
    job = Job.objects.get()
    monkeypatch.setattr(sync, "acks_late", True)
    asked = outbox.is_wanted

    def ask(*which: Any) -> bool:
        wanted = asked(*which)
        outbox.free(*which)
        return wanted

    monkeypatch.setattr(outbox, "is_wanted", ask)
    with lock(f"once:{job.key}"), broker_down(app):
        assert isinstance(in_thread(queue.work), Ignore)
    assert "left to resend_jobs" not in caplog.text
    assert state() == "done"


@transactional
def test_a_database_that_goes_away_under_a_busy_lock_is_asked_again(
    sync: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: Any) -> bool:
        monkeypatch.undo()
        raise OperationalError("the server has gone away")

    enqueue_once(sync, (1,), {"note": "x"})
    monkeypatch.setattr(outbox, "is_wanted", gone)
    with lock(f"once:{Job.objects.get().key}"):
        assert isinstance(in_thread(queue.work), Retry)
    assert state() == "queued"
    assert queue.work() == "x"


@transactional
def test_a_worker_that_was_killed_frees_nothing(sync: Any, queue: Queue) -> None:
    """Its message may be in the queue again; and this is said in the worker's main process."""
    enqueue_once(sync, (1,))
    message = queue.take()
    sync.push_request(id=message.headers["id"], headers=message.headers)
    try:
        task_failure.send(sender=sync, task_id=message.headers["id"], exception=WorkerLostError())
    finally:
        sync.pop_request()
    assert state() == "queued"


@with_all_apps
def test_a_task_that_this_app_does_not_have_is_left_to_those_who_do(
    sync: Any, queue: Queue, down: Any
) -> None:
    enqueue_once(sync, (1,))
    Job.objects.update(task="of.another.app")
    before = Job.objects.get().unpublished_since
    down.undo()
    with pytest.raises(CommandError, match=r"of\.another\.app"):
        call_command("resend_jobs", older_than=0)
    assert Job.objects.get().unpublished_since == before


@pytest.mark.vendor("mysql")  # on PostgreSQL who shares a row is in nobody's way
@transactional
def test_who_replaces_waits_no_longer_for_a_shared_row_than_it_wants(
    sync: Any, queue: Queue, settings: Any
) -> None:
    settings.DISTLOCK = {**getattr(settings, "DISTLOCK", {}), "WAIT": 0.3}
    enqueue_once(sync, (1,), key="k")

    def replace() -> float:
        since = time.monotonic()
        with pytest.raises(OperationalError, match="locked or written by others"):
            enqueue_once(sync, (2,), key="k", replace=True)
        return time.monotonic() - since

    with transaction.atomic():
        assert not enqueue_once(sync, (1,), key="k").created
        assert in_thread(replace) < 5
    assert not enqueue_once(sync, (2,), key="k", replace=True).created


@transactional
def test_each_lost_message_is_sent_by_one_of_those_who_look(sync: Any, down: Any) -> None:
    for account in range(4):
        enqueue_once(sync, (account,))
    ours = outbox.unpublished("default", 0)
    mine = [next(ours).pk]
    theirs = outbox.unpublished("default", 0)
    mine += [job.pk for job in ours]
    assert len(mine) == 4
    assert len({*mine}) == 4
    again = {job.pk for job in theirs}
    assert again <= {*mine}


@transactional
def test_a_claim_of_a_lost_message_is_a_compare_and_set(
    sync: Any, down: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue_once(sync, (1,))
    found, ours = outbox.unchanged, []

    def somebody_was_faster(alias: str, job: Job) -> Any:
        monkeypatch.setattr(outbox, "unchanged", found)
        ours.extend(outbox.unpublished("default", 0))
        return found(alias, job)

    monkeypatch.setattr(outbox, "unchanged", somebody_was_faster)
    assert [*outbox.unpublished("default", 0)] == []
    assert len(ours) == 1


@transactional
def test_a_publisher_that_is_late_does_not_unmark_the_next_message(sync: Any, down: Any) -> None:
    enqueue_once(sync, (1,))
    job = Job.objects.get()
    expire()
    enqueue_once(sync, (1,))
    outbox.published("default", job)
    assert Job.objects.get().unpublished_since is not None
    outbox.published("default", Job.objects.get())
    assert Job.objects.get().unpublished_since is None


@servers
@transactional
def test_nobody_waits_for_a_row_that_a_transaction_has_locked(
    sync: Any, queue: Queue, down: Any
) -> None:
    enqueue_once(sync, (1,), key="k")
    job = Job.objects.get()
    with transaction.atomic():
        enqueue_once(sync, (2,), key="k", replace=True)
        in_thread(lambda: outbox.published("default", job))
        assert in_thread(lambda: [*outbox.unpublished("default", 0)]) == []
    assert [each.pk for each in outbox.unpublished("default", 0)] == [job.pk]


@with_all_apps
def test_a_job_that_cannot_be_sent_keeps_nobody_waiting(
    sync: Any, queue: Queue, down: Any, caplog: Any
) -> None:
    bad, good = enqueue_once(sync, (1,)).result, enqueue_once(sync, (2,)).result
    job = Job.objects.get(task_id=bad.id)
    Job.objects.filter(pk=job.pk).update(arguments={**job.arguments, "args": [1, 2, 3]})
    down.undo()
    with pytest.raises(CommandError, match="3 were given"):
        call_command("resend_jobs", older_than=0)
    assert queue.ids() == [good.id]
    assert job.key in caplog.text


@transactional
def test_a_message_that_has_started_a_run_is_not_lost(
    sync: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(outbox, "published", lambda *_: None)  # its process was killed
        enqueue_once(sync, (1,))
    job = Job.objects.get()
    run = outbox.Run("default", job.key, job.task_id, 1)
    assert run.start()
    run.wait(60)  # its retry is in the queue
    assert [*outbox.unpublished("default", 0)] == []


@transactional
def test_the_beat_job_resends(sync: Any, app: Celery, queue: Queue, down: Any) -> None:
    enqueue_once(sync, (1,))
    down.undo()
    assert app.tasks["distlock.resend_jobs"](older_than=0) == 1
    assert len(queue.ids()) == 1


@with_all_apps
def test_resend_jobs_names_what_is_wrong(sync: Any, down: Any) -> None:
    enqueue_once(sync, (1,))
    Job.objects.update(task="gone")
    with pytest.raises(CommandError, match="no task gone"):
        call_command("resend_jobs", older_than=0)
    with pytest.raises(CommandError, match="--older-than"):
        call_command("resend_jobs", older_than="x")
    with pytest.raises(CommandError, match="nowhere"):
        call_command("resend_jobs", database="nowhere")


# -- time ----------------------------------------------------------------------------------------


@transactional
@pytest.mark.parametrize(
    "options",
    [{"countdown": 100}, {"expires": 100}, {"eta": 100}, {"countdown": 50, "expires": 100}],
)
def test_the_ttl_counts_beyond_what_the_message_waits(
    sync: Any, queue: Queue, options: dict[str, Any]
) -> None:
    if "eta" in options:
        options = {"eta": datetime.now(timezone.utc) + timedelta(seconds=options["eta"])}
    enqueue_once(sync, (1,), ttl=10, **options)
    job = Job.objects.get()
    assert 105 < (job.expires_at - job.created_at).total_seconds() < 115
    headers = queue.take().headers
    assert bool(headers["eta"]) is ("expires" not in options or "countdown" in options)
    assert bool(headers["expires"]) is ("expires" in options)


# -- without a worker ----------------------------------------------------------------------------


@pytest.fixture
def eager(app: Celery) -> Celery:
    app.conf.task_always_eager = True
    return app


@transactional
def test_an_eager_task_runs_at_once_and_frees_its_key(sync: Any, queue: Queue, eager: Any) -> None:
    for _ in range(2):
        sent = enqueue_once(sync, (1,), {"note": "x"})
        assert (sent.result.get(), sent.created) == ("x", True)
    with transaction.atomic():
        enqueue_once(sync, (1,), {"note": "x"})
        assert len(queue.ran) == 2
    assert (len(queue.ran), state()) == (3, "done")


@transactional
def test_an_eager_failure_is_told_as_celery_tells_it(sync: Any, queue: Queue, eager: Any) -> None:
    BODY.append(fail)
    sent = enqueue_once(sync, (1,))
    assert sent.result.state == "FAILURE"
    assert state() == "done"
    eager.conf.task_eager_propagates = True
    with pytest.raises(ValueError, match="no"):
        enqueue_once(sync, (1,), until="finish")
    BODY.clear()
    assert enqueue_once(sync, (1,), until="finish").created


@transactional
def test_an_eager_task_that_queues_itself_does_not_recur(
    sync: Any, queue: Queue, eager: Any
) -> None:
    sent: list[Any] = []
    BODY.append(lambda: sent.append(enqueue_once(sync, (1,))))
    enqueue_once(sync, (1,))
    assert sent[0].result.get()["reason"] == "busy"
    assert (len(queue.ran), state()) == (1, "done")


@transactional
def test_an_eager_retry_runs_again(app: Celery, queue: Queue, eager: Any) -> None:
    @app.task(bind=True)
    @deduplicated
    def flaky(self: Task[Any, Any]) -> int:
        if self.request.retries < 2:
            raise self.retry()
        return self.request.retries

    assert enqueue_once(flaky).result.get() == 2
    assert state() == "done"


@transactional
def test_what_is_called_or_sent_with_delay_just_runs(sync: Any, queue: Queue) -> None:
    assert sync(1, note="x") == "x"
    sync.delay(1, note="y")
    assert queue.work() == "y"
    assert Job.objects.count() == 0


@transactional
@pytest.mark.parametrize(
    "order", [(deduplicated, single_instance), (single_instance, deduplicated)]
)
def test_together_with_single_instance(app: Celery, queue: Queue, order: Any) -> None:
    def both(account: int) -> str:
        queue.ran.append(lock('once:enqueue:both:{"account":1}').holder())
        return "done"

    outer, inner = order
    task = app.task(name="both")(outer(inner(both)))
    for _ in range(2):
        enqueue_once(task, (1,))
        assert queue.work() == "done"
    assert (state(), len(queue.ran)) == ("done", 2)
    assert queue.ran[0].thread.startswith("task both[")


@transactional
def test_a_transaction_around_the_run_is_refused(app: Celery, queue: Queue) -> None:
    @app.task
    @single_instance(atomic=True)
    @deduplicated
    def task() -> None: ...

    enqueue_once(task)
    assert isinstance(error := queue.work(), ImproperlyConfigured)
    assert "Put @deduplicated above" in str(error)


# -- wrong uses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"args": (object(),)}, TypeError, r"args\[0\] of enqueue_once\(sync\)"),
        ({"args": (float("nan"),)}, TypeError, r"args\[0\].*NaN"),
        ({"kwargs": {"account": 1, "note": {1, 2}}}, TypeError, "note of enqueue_once"),
        ({"args": (1,), "producer": object()}, TypeError, "producer"),
        ({"args": (1,), "task_id": "x"}, TypeError, "task_id"),
        ({"args": (1, 2)}, TypeError, "positional"),
        ({"args": (1, 2), "key": "k"}, TypeError, "positional"),
        ({}, TypeError, "account"),
        ({"args": "x"}, TypeError, "args"),
        ({"args": (1,), "key": "{account}"}, ValueError, "{account}.*f-string"),
        ({"args": (1,), "key": ""}, ValueError, "key"),
        ({"args": (1,), "key": 3}, TypeError, "key"),
        ({"args": (1,), "until": "end"}, ValueError, "until"),
        ({"args": (1,), "ttl": 0}, ValueError, "ttl"),
        ({"args": (1,), "ttl": "1"}, TypeError, "ttl"),
        ({"args": (1,), "replace": 1}, TypeError, "replace"),
        ({"args": (1,), "using": "nowhere"}, ValueError, "using"),
        ({"args": (1,), "countdown": -1}, ValueError, "countdown"),
    ],
)
def test_wrong_arguments_are_named(
    sync: Any, call: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        enqueue_once(sync, **call)


def test_tasks_that_are_not_decorated_are_refused(app: Celery) -> None:
    @app.task
    def plain() -> None: ...

    with pytest.raises(ImproperlyConfigured, match="@shared_task\n    @deduplicated"):
        enqueue_once(plain)
    with pytest.raises(TypeError, match="Celery tasks"):
        enqueue_once(lambda: None)


def test_the_decorator_stands_under_that_of_celery(app: Celery) -> None:
    with pytest.raises(ImproperlyConfigured, match="goes under"):

        @deduplicated
        @shared_task
        def one() -> None: ...

    async def coroutine() -> None: ...

    for wrong in (coroutine, int, 3):
        with pytest.raises(TypeError, match=r"deduplicated|async"):
            deduplicated(wrong)  # type: ignore[type-var, arg-type]
