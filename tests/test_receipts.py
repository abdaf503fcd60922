"""The rows of jobs: what counts as a receipt, who may write one, and what is purged."""

from __future__ import annotations

from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import call_command
from django.core.serializers import deserialize, serialize
from django.db import IntegrityError, connection, connections, transaction
from django.db.models import QuerySet

from distlock import LockLost, lock, once, receipts
from distlock.backends import backend_for
from distlock.backends.base import moment_of
from distlock.models import DistributedLock, Job
from tests.conformance.rows import execute, query, session, within
from tests.conformance.rows import transaction as open_transaction

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")

TABLE = "distlock_job"
SECOND = timedelta(seconds=1)


def now() -> Any:
    return moment_of(backend_for(connection).clock(connection))


def run(token: int = 7, key: str = "k", keep: float = 60, alias: str = "default") -> receipts.Run:
    return receipts.Run(alias, key, token, now(), "task", keep)


def write(key: str = "k", *, left: timedelta = SECOND, **columns: Any) -> Job:
    """A row as others may have left it, that expires in `left`."""
    return Job.objects.create(key=key, **{"state": "done", "expires_at": now() + left, **columns})


# -- the table ---------------------------------------------------------------------------


def test_every_column_has_a_default_in_the_database_or_may_be_null() -> None:
    quoted = connection.ops.quote_name("key")
    execute(f"INSERT INTO {TABLE} ({quoted}) VALUES ('k')")
    job = Job.objects.get()
    assert (job.state, job.task, job.task_id, job.token, job.attempts) == ("queued", "", "", 0, 0)
    assert (job.arguments, job.result, job.created_at, job.started_at) == (None,) * 4
    assert job.expires_at == moment_of(0)


def test_keys_are_unique_and_exact() -> None:
    for key in ("Key", "key", "key ", "k\u00e9y"):
        write(key)
    with pytest.raises(IntegrityError), transaction.atomic():
        write("key")


def test_only_what_a_row_is_found_by_is_indexed() -> None:
    with connection.cursor() as cursor:
        found = connection.introspection.get_constraints(cursor, TABLE)
    indexed = [tuple(one["columns"]) for one in found.values() if one["index"] or one["unique"]]
    assert set(indexed) - {("id",)} == {("key",), ("task_id",), ("unpublished_since",)}
    assert indexed.count(("key",)) == 1, "PostgreSQL has one for LIKE besides"


VALUES = [
    None,
    True,
    "",
    "null",
    "\0 \ud800 \u00e9 \U0001f600 \\ \" '",
    12345678901234567890123456789,
    0.1,
    1.0,
    [],
    {"b": 1, "a": {"": [None]}},
]


@pytest.mark.parametrize("value", VALUES, ids=ascii)
def test_a_value_is_kept_to_the_letter(value: Any) -> None:
    write(result=value, arguments=[value])
    job = Job.objects.get()
    assert (job.result, job.arguments) == (value, [value])
    if isinstance(value, dict):
        assert list(job.result) == ["b", "a"]
        assert query(f"SELECT result FROM {TABLE}") == [('{"b": 1, "a": {"": [null]}}',)]
    for copy in deserialize("json", serialize("json", [job])):
        copy.save()
    assert Job.objects.get().result == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1j}])
def test_what_json_cannot_express_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        write(result=value)
    assert not Job.objects.exists()


# -- what counts -------------------------------------------------------------------------


@pytest.mark.usetz
def test_a_receipt_counts_until_it_expires() -> None:
    write("there")
    write("past", left=-SECOND)
    write("queued", state="queued")
    write("running", state="running")
    found = {key: receipts.find("default", key) for key in ("there", "past", "queued", "running")}
    assert [key for key, job in found.items() if job] == ["there"]


@servers
def test_the_clock_goes_on_within_a_transaction() -> None:
    with transaction.atomic():
        write(left=SECOND)
        assert receipts.find("default", "k")
        with connection.cursor() as cursor:
            sleep = {"postgresql": "pg_sleep", "mysql": "SLEEP"}[connection.vendor]
            cursor.execute(f"SELECT {sleep}(1.1)")
        assert receipts.find("default", "k") is None


def test_a_receipt_is_looked_for_in_one_statement(django_assert_num_queries: Any) -> None:
    once("k").run(int)
    with django_assert_num_queries(1):
        once("k").run(int)


# -- who may write -----------------------------------------------------------------------


@pytest.mark.parametrize("state", ["running", "done"])
@pytest.mark.parametrize("finish", [True, False])
def test_a_newer_token_is_never_overwritten(state: str, finish: bool) -> None:
    write(token=8, state=state, result="newer", left=-SECOND)
    with pytest.raises(LockLost, match="'k'") as caught:
        if finish:
            receipts.finish(run(7), '"older"', begun=True)
        else:
            receipts.begin(run(7))
    assert (caught.value.name, caught.value.token) == ("once:k", 7)
    job = Job.objects.get()
    assert (job.state, job.token, job.result, job.attempts) == (state, 8, "newer", 0)


def test_a_swallowed_loss_cannot_commit() -> None:
    write(token=8)
    with pytest.raises(transaction.TransactionManagementError), transaction.atomic():
        write("other")
        with pytest.raises(LockLost):
            receipts.finish(run(7), "1", begun=True)
        Job.objects.count()
    assert Job.objects.count() == 1


def test_a_queued_row_keeps_its_task_id_and_arguments() -> None:
    write(state="queued", task_id="abc", arguments=[1, 2])
    receipts.begin(run(7))
    job = Job.objects.get()
    assert (job.state, job.attempts, job.finished_at) == ("running", 1, None)
    receipts.finish(run(7), "3", begun=True)
    job = Job.objects.get()
    assert (job.state, job.attempts, job.result) == ("done", 1, 3)
    assert (job.task_id, job.arguments, job.task) == ("abc", [1, 2], "task")


def test_a_row_that_is_purged_in_between_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    write(left=-SECOND)
    real = QuerySet.update
    purged: list[Any] = []

    def update(self: Any, **values: Any) -> int:
        if not purged:
            purged.append(receipts.purge("default", 0, 10))
        return real(self, **values)

    monkeypatch.setattr(QuerySet, "update", update)
    receipts.finish(run(7), "1", begun=False)
    assert purged[0][0] == 1
    assert receipts.find("default", "k")


@pytest.mark.parametrize("supported", [True, False])
def test_a_receipt_without_a_result_is_written_over_one_that_has_expired(
    monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    if not supported:
        monkeypatch.setattr(type(connection.features), "supports_update_conflicts", False)
    write(left=-SECOND, token=6, result=1, task_id="old", attempts=1)
    done = run()
    with transaction.atomic():
        receipts.add(done, "new", done.started + SECOND)
    job = Job.objects.get()
    assert (job.state, job.task, job.token, job.result) == ("done", "task", 7, None)
    assert receipts.find("default", "k") == job
    if supported:
        assert (job.task_id, job.attempts, job.started_at) == ("new", 1, done.started)
        assert job.expires_at - job.finished_at == timedelta(seconds=60)


def test_a_receipt_without_a_result_is_one_statement(django_assert_num_queries: Any) -> None:
    done = run()
    with transaction.atomic(), django_assert_num_queries(1):
        receipts.add(done, "id", done.started)


# -- purge_locks -------------------------------------------------------------------------


def purge(*arguments: str) -> str:
    out = StringIO()
    call_command("purge_locks", *arguments, stdout=out)
    return out.getvalue().splitlines()[1]


def keys(alias: str = "default") -> list[str]:
    return sorted(Job.objects.using(alias).values_list("key", flat=True))


def test_what_has_expired_is_purged_and_nothing_else() -> None:
    write("there", left=60 * SECOND)
    write("past", left=-SECOND)
    write("queued", left=-SECOND, state="queued")
    write("running", left=60 * SECOND, state="running")
    write("still running", left=-SECOND, state="running")
    write("broken off", left=-SECOND, state="running")
    with lock("once:still running"):
        assert purge("--dry-run") == "Would delete 2 receipts that had expired."
        assert len(keys()) == 6
        assert purge() == "Deleted 2 receipts that had expired."
        assert keys() == ["queued", "running", "still running", "there"]
    assert purge() == "Deleted 1 receipt that had expired."


@pytest.mark.parametrize("size", [1, 4, 5, 1000])
def test_batches_reach_every_receipt(size: int) -> None:
    for number in range(5):
        write(f"past {number}", left=-SECOND)
        write(f"there {number}", left=60 * SECOND)
    assert purge(f"--batch-size={size}") == "Deleted 5 receipts that had expired."
    assert keys() == [f"there {number}" for number in range(5)]


def test_the_alias_is_that_of_the_option() -> None:
    write(left=-SECOND)
    Job.objects.using("other").create(key="x", state="done")
    assert purge("--database=other") == "Deleted 1 receipt that had expired."
    assert (keys(), keys("other")) == (["k"], [])


@servers
def test_a_receipt_that_is_written_anew_is_passed_over() -> None:
    write("a", left=-SECOND)
    write("b", left=-SECOND)
    with session() as other, open_transaction(other), within(5):
        quoted = connection.ops.quote_name("key")
        assert execute(f"UPDATE {TABLE} SET token = 1 WHERE {quoted} = 'a'", on=other)
        assert purge() == "Deleted 1 receipt that had expired."
    assert keys() == ["a"]


def test_a_receipt_that_was_written_anew_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    write("a", left=-SECOND)
    write("b", left=-SECOND)
    real = QuerySet.select_for_update

    def meanwhile(self: Any, **more: Any) -> Any:
        receipts.finish(run(7, "a"), "1", begun=False)
        return real(self, **more)

    monkeypatch.setattr(QuerySet, "select_for_update", meanwhile)
    assert purge() == "Deleted 1 receipt that had expired."
    assert keys() == ["a"]


@servers
def test_most_are_deleted_past_one_that_is_locked() -> None:
    """MariaDB would read the whole table for such a list, and wait."""
    for number in range(5):
        write(f"past {number}", left=-SECOND)
    quoted = connection.ops.quote_name("key")
    ids = Job.objects.exclude(key="past 1").values_list("pk", flat=True)
    with session() as other, open_transaction(other), within(10):
        assert execute(f"UPDATE {TABLE} SET token = 1 WHERE {quoted} = 'past 1'", on=other)
        with transaction.atomic():
            backend_for(connection).delete(connection, TABLE, list(ids))
    assert keys() == ["past 1"]


def test_without_its_table_it_names_the_remedy() -> None:
    execute(f"ALTER TABLE {TABLE} RENAME TO hidden")
    try:
        with pytest.raises(Exception, match="migrate distlock"):
            purge()
    finally:
        execute(f"ALTER TABLE hidden RENAME TO {TABLE}")


def test_a_lock_of_a_job_is_purged_like_any_other() -> None:
    once("k", using="other").run(int)
    call_command("purge_locks", "--older-than=0", "--database=other", stdout=StringIO())
    assert keys("other") == ["k"]
    assert not DistributedLock.objects.using("other").exclude(name="").exists()
    assert once("k", using="other").run(lambda: "again") == 0
    assert connections["other"].alias == "other"
