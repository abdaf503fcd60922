"""The command. What one batch does is the conformance suite's affair."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, connections
from django.test import override_settings

from distlock import lock
from distlock.backends import backend_for
from distlock.backends.base import TABLE
from tests.conformance.rows import (
    FAR,
    SECOND,
    execute,
    pinned,
    query,
    session,
    take,
    together,
    transaction,
    within,
    write,
)

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")

DAY = 24 * 3600 * SECOND


def purge(*arguments: str, **options: Any) -> str:
    """What the command says."""
    out = StringIO()
    call_command("purge_locks", *arguments, stdout=out, **options)
    return out.getvalue()


def names() -> list[str]:
    return [row[0] for row in query(f"SELECT name FROM {TABLE} WHERE name <> '' ORDER BY name")]


def seed(count: int, ago: int = DAY, **columns: Any) -> None:
    for number in range(count):
        write(f"n{number:03}", expires_at=-ago, **columns)


# -- what it deletes -------------------------------------------------------------------


def test_rows_that_ended_long_ago_are_deleted_and_counted() -> None:
    write("released", expires_at=-2 * DAY)
    write("expired", owner="dead", expires_at=-2 * DAY)
    write("recent", expires_at=-DAY // 2)
    write("kept by min_hold", expires_at=DAY)
    with lock("live"):
        assert purge("--older-than", "86400") == (
            "Deleted 2 locks whose lease ended at least 86400 s ago.\n"
            "Deleted 0 receipts that had expired.\n"
        )
        assert names() == ["kept by min_hold", "live", "recent"]
        assert purge("--older-than=0").startswith("Deleted 1 lock whose")
        assert names() == ["kept by min_hold", "live"]
    assert "Deleted 1 lock whose lease ended at least 0 s ago.\n" in purge(older_than=0)


def test_without_an_age_the_setting_decides_and_that_is_30_days() -> None:
    write("31 days", expires_at=-31 * DAY)
    write("29 days", expires_at=-29 * DAY)
    write("1 day", expires_at=-DAY)
    assert "Deleted 1 lock whose lease ended at least 2592000 s ago.\n" in purge()
    assert names() == ["1 day", "29 days"]
    with override_settings(DISTLOCK={"PURGE_AFTER": 2 * 24 * 3600}):
        assert "172800 s" in purge()
    assert names() == ["1 day"]


@pytest.mark.parametrize("size", [1, 4, 5, 7, 1000])
def test_batches_reach_every_row(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seed(5)
    seen: list[int] = []
    backend = backend_for(connection)
    real = backend.purge
    monkeypatch.setattr(backend, "purge", lambda *given: (seen.append(given[3]), real(*given))[1])
    assert purge("--older-than=0", f"--batch-size={size}").startswith("Deleted 5 locks")
    assert names() == []
    assert set(seen) == {size}
    assert len(seen) >= 5 / size


@pytest.mark.parametrize(("took", "rest"), [(0.004, 0.004), (5.0, 0.01)])
def test_after_each_batch_others_have_their_turn(
    took: float, rest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    moments = itertools.count()
    clock = SimpleNamespace(sleep=rests.append, perf_counter=lambda: next(moments) * took)
    monkeypatch.setattr("distlock.management.commands.purge_locks.time", clock)
    seed(4)
    assert purge("--older-than=0", "--batch-size=2").startswith("Deleted 4 locks")
    assert rests == [pytest.approx(rest)] * 2


@servers
@pytest.mark.parametrize("size", [1, 2, 1000])
def test_pinned_rows_are_kept_and_do_not_stand_in_the_way(size: int) -> None:
    seed(5)
    with pinned("n000"), pinned("n001"), pinned("n003"), within(2):
        assert purge(older_than=0, batch_size=size).startswith("Deleted 2 locks")
        assert names() == ["n000", "n001", "n003"]
    assert purge(older_than=0, batch_size=size).startswith("Deleted 3 locks")


@servers
def test_a_guarded_row_is_kept_though_its_lease_is_over() -> None:
    backend = backend_for(connection)
    held = take(backend)
    seed(2)
    write(expires_at=-DAY)
    with session() as other, transaction(other), within(2):
        assert backend.guard(other, held)
        assert purge(older_than=0).startswith("Deleted 2 locks")
        assert names() == ["n"]
    assert purge(older_than=0).startswith("Deleted 1 lock whose")


@pytest.mark.vendor("mysql")
def test_safe_updates_do_not_refuse_it_and_stay() -> None:
    if not getattr(connection, "mysql_is_mariadb", False):
        pytest.skip("a setting for one statement is a hint on MySQL")
    seed(5)
    execute("SET SESSION sql_safe_updates = 1")
    try:
        assert purge(older_than=0).startswith("Deleted 5 locks")
        assert query("SELECT @@sql_safe_updates") == [(1,)]
    finally:
        connection.close()


def test_an_empty_table_is_no_error() -> None:
    assert purge() == (
        "Deleted 0 locks whose lease ended at least 2592000 s ago.\n"
        "Deleted 0 receipts that had expired.\n"
    )


def test_a_dry_run_counts_and_deletes_nothing() -> None:
    seed(3)
    write("recent", expires_at=-SECOND)
    with lock("live"):
        assert purge("--dry-run", older_than=3600) == (
            "Would delete 3 locks whose lease ended at least 3600 s ago.\n"
            "Would delete 0 receipts that had expired.\n"
        )
        assert len(names()) == 5
        purge(older_than=3600)
        assert purge("--dry-run", older_than=0).startswith("Would delete 1 lock whose")


def test_a_token_goes_on_growing_though_the_clock_stands_behind() -> None:
    write("x", fencing_token=FAR, expires_at=-DAY)
    purge(older_than=0)
    assert names() == []
    with lock("x") as lease:
        assert lease.token > FAR
    assert "Would delete 1 lock" in purge("--dry-run", older_than=0)


def test_two_at_once_share_the_work() -> None:
    seed(60, fencing_token=FAR)

    def one() -> str:
        try:
            return purge(older_than=0, batch_size=4)
        finally:
            connections.close_all()

    said = together(one, one, one)
    counts = [int(re.findall(r"Deleted (\d+)", text)[0]) for text in said]
    purge(older_than=0)
    assert sum(counts) == 60  # a batch of another one's is passed over, and none counted twice
    assert names() == []
    assert query(f"SELECT fencing_token FROM {TABLE} WHERE name = ''") == [(FAR,)]


def test_the_alias_is_that_of_the_option_or_the_setting() -> None:
    for alias, name in (("default", "a"), ("other", "b"), ("other", "c")):
        execute(f"INSERT INTO {TABLE} (name) VALUES (%s)", [name], on=connections[alias])
    assert purge("--database", "other", "--dry-run").startswith("Would delete 2 locks")
    assert purge().startswith("Deleted 1 lock whose")
    with override_settings(DISTLOCK={"USING": "other"}):
        assert purge().startswith("Deleted 2 locks")


def test_verbosity_0_says_nothing() -> None:
    assert purge(verbosity=0) == ""


# -- what can go wrong -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named", "remedy"),
    [
        (["--older-than", "-5"], "--older-than", "0 to ten years.*'-5'"),
        (["--older-than", "30d"], "--older-than", "number of seconds.*'30d'"),
        (["--older-than", "nan"], "--older-than", "number of seconds"),
        (["--older-than", "1e12"], "--older-than", "ten years"),
        (["--batch-size", "0"], "--batch-size", "from 1 to 10000, not '0'"),
        (["--batch-size", "-1"], "--batch-size", "from 1"),
        (["--batch-size", "2.5"], "--batch-size", "whole number"),
        (["--batch-size", "10001"], "--batch-size", "to 10000"),
        (["--database", "nowhere"], "--database", "no database 'nowhere'.*default, other"),
    ],
)
def test_bad_input_is_an_error_that_names_it(arguments: list[str], named: str, remedy: str) -> None:
    seed(1)
    with pytest.raises(CommandError, match=f"^{named}.*{remedy}"):
        purge(*arguments)
    assert len(names()) == 1


@pytest.mark.parametrize("given", [{"older_than": -1}, {"older_than": True}, {"batch_size": 0}])
def test_bad_input_from_python_is_an_error_too(given: dict[str, Any]) -> None:
    with pytest.raises(CommandError, match="must be"):
        purge(**given)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_missing_table_says_to_migrate(dry_run: bool) -> None:
    with hidden_table(), pytest.raises(CommandError, match=r"run `manage\.py migrate distlock"):
        purge(dry_run=dry_run)


@contextmanager
def hidden_table() -> Iterator[None]:
    execute(f"ALTER TABLE {TABLE} RENAME TO hidden")
    try:
        yield
    finally:
        execute(f"ALTER TABLE hidden RENAME TO {TABLE}")


def test_a_database_that_cannot_be_reached_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    other = connections["other"]
    other.close()
    away = {"NAME": "/nowhere/at/all"} if other.vendor == "sqlite" else {"PORT": "1"}
    monkeypatch.setattr(other, "settings_dict", {**other.settings_dict, **away})
    try:
        with pytest.raises(CommandError, match="'other' cannot be asked"):
            purge(database="other")
    finally:
        other.close()


READ_ONLY = {
    "sqlite": ("PRAGMA query_only = 1", "PRAGMA query_only = 0"),
    "postgresql": (
        "SET default_transaction_read_only = on",
        "RESET default_transaction_read_only",
    ),
    "mysql": ("SET SESSION TRANSACTION READ ONLY", "SET SESSION TRANSACTION READ WRITE"),
}


def test_a_read_only_database_says_so(vendor: str) -> None:
    seed(1)
    forbid, allow = READ_ONLY[vendor]
    execute(forbid)
    try:
        with pytest.raises(CommandError, match=r"(?i)after deleting 0 locks.*read.?only"):
            purge(older_than=0)
    finally:
        execute(allow)
    assert len(names()) == 1
