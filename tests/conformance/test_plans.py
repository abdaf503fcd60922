"""A session that is used often has its statements planned once, on PostgreSQL and MariaDB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import DatabaseError, OperationalError, connection, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from distlock import LockError, lock
from distlock.backends.base import Backend, error_code
from distlock.backends.plans import THRESHOLD

from .rows import (
    SECOND,
    TABLE,
    Holding,
    claim,
    execute,
    expire,
    pinned,
    query,
    session,
    stored,
    take,
    within,
    write,
)

pytestmark = [
    pytest.mark.vendor("postgresql", "mysql"),
    pytest.mark.backends("PostgreSQL", "MariaDB"),
]
postgresql = pytest.mark.vendor("postgresql")
mariadb = pytest.mark.vendor("mysql")

NAMES = ("distlock_grant", "distlock_grant_async", "distlock_release")


@pytest.fixture
def planned(backend: Backend) -> Iterator[BaseDatabaseWrapper]:
    """A session of its own that has its plans."""
    with session() as one:
        for _ in range(THRESHOLD + 1):
            cycle(backend, one)
        assert plans(one) == {"distlock_grant", "distlock_release"}
        yield one


def cycle(backend: Backend, on: BaseDatabaseWrapper, **more: Any) -> Holding:
    held = take(backend, on=on, **more)
    assert backend.release(on, held, alone=True)
    return held


def plans(on: BaseDatabaseWrapper) -> set[str]:
    if on.vendor == "postgresql":
        return {name for (name,) in query("SELECT name FROM pg_prepared_statements", on=on)}
    return {name for name in NAMES if _is_known_to_mariadb(name, on)}


def _is_known_to_mariadb(name: str, on: BaseDatabaseWrapper) -> bool:
    with pytest.raises(DatabaseError) as caught:  # it has too few values, or is not there
        execute(f"EXECUTE {name}", on=on)
    assert error_code(caught.value) in (1210, 1243)
    return error_code(caught.value) == 1210


UNPLANNED = {"postgresql": ["WITH", "UPDATE"], "mysql": ["SET", "UPDATE"]}


@contextmanager
def sent(on: BaseDatabaseWrapper) -> Iterator[list[str]]:
    statements: list[str] = []

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        first, second, *_ = sql.split()
        statements.append(second if first == "EXECUTE" else first)
        return execute(sql, params, many, context)

    with on.execute_wrapper(note):
        yield statements


def test_a_session_that_is_used_once_or_twice_has_no_plans(backend: Backend) -> None:
    with session() as one:
        for _ in range(THRESHOLD // 2 - 1):
            cycle(backend, one)
        assert plans(one) == set()


def test_plans_are_used(backend: Backend, planned: BaseDatabaseWrapper) -> None:
    with sent(planned) as statements:
        first = cycle(backend, planned)
        second = cycle(backend, planned, durable=False)
    asynchronous = ["distlock_grant"]
    if planned.vendor == "postgresql":
        asynchronous = ["PREPARE", "distlock_grant_async"]
    released = "distlock_release"
    assert statements == ["distlock_grant", released, *asynchronous, released]
    assert second.token > first.token


def test_values_are_kept_apart_from_the_statement(
    backend: Backend, planned: BaseDatabaseWrapper
) -> None:
    hostile = "%s %(owner)s '; DROP TABLE x; -- \\ $1 näme"
    cycle(backend, planned, name=hostile)
    held = take(backend, on=planned, name=hostile, note=hostile, min_hold=5, ttl=7_000_000)
    row = stored(hostile)
    assert (row.note, row.ttl, row.owner) == (hostile, 7_000_000, "me")
    assert backend.release(planned, held, alone=True)


def test_a_transaction_is_not_put_at_risk(backend: Backend, planned: BaseDatabaseWrapper) -> None:
    planned.set_autocommit(False)
    with sent(planned) as statements:
        held = take(backend, on=planned)
        assert backend.release(planned, held, alone=False)
        planned.rollback()
        take(backend, on=planned)
    planned.rollback()
    planned.set_autocommit(True)
    assert not set(NAMES) & set(statements)


def reset(how: str, on: BaseDatabaseWrapper) -> None:
    """What a pooler or a user may do to a session."""
    if how == "change_user":
        at = on.settings_dict
        on.connection.change_user(at["USER"], at["PASSWORD"], at["NAME"])
        return
    execute(how, on=on)


@pytest.mark.parametrize(
    "how",
    [
        *(
            pytest.param(how, marks=postgresql)
            for how in ("DISCARD ALL", "DEALLOCATE ALL", "DEALLOCATE distlock_release")
        ),
        *(
            pytest.param(how, marks=mariadb)
            for how in ("change_user", "DEALLOCATE PREPARE distlock_release")
        ),
    ],
)
def test_plans_that_are_gone_are_done_without(
    backend: Backend, planned: BaseDatabaseWrapper, how: str
) -> None:
    reset(how, planned)
    for _ in range(THRESHOLD + 2):
        cycle(backend, planned)
    with sent(planned) as statements:
        cycle(backend, planned)
    assert statements == UNPLANNED[planned.vendor]


@mariadb
def test_a_server_that_has_plans_enough_is_asked_for_none(backend: Backend) -> None:
    execute("SET GLOBAL max_prepared_stmt_count = 0")
    try:
        with session() as one:
            for _ in range(THRESHOLD + 2):
                cycle(backend, one)
            with sent(one) as statements:
                cycle(backend, one)
    finally:
        execute("SET GLOBAL max_prepared_stmt_count = DEFAULT")
    assert statements == UNPLANNED["mysql"]


@postgresql
def test_plans_outlive_changes_of_the_table(backend: Backend, planned: BaseDatabaseWrapper) -> None:
    execute(f"ALTER TABLE {TABLE} ADD COLUMN later integer DEFAULT 7")
    try:
        cycle(backend, planned)
        execute(f"ALTER TABLE {TABLE} DROP COLUMN later")
        cycle(backend, planned)
        execute(f"ALTER TABLE {TABLE} ALTER COLUMN fencing_token TYPE numeric")
        assert cycle(backend, planned).token
    finally:
        execute(f"ALTER TABLE {TABLE} DROP COLUMN IF EXISTS later")
        execute(f"ALTER TABLE {TABLE} ALTER COLUMN fencing_token TYPE bigint")


@mariadb
def test_plans_outlive_changes_of_mariadbs_table(
    backend: Backend, planned: BaseDatabaseWrapper
) -> None:
    execute(f"ALTER TABLE {TABLE} ADD COLUMN later integer DEFAULT 7")
    try:
        cycle(backend, planned)
        execute(f"ALTER TABLE {TABLE} ADD INDEX later (note)")
        cycle(backend, planned)
    finally:
        execute(f"ALTER TABLE {TABLE} DROP COLUMN later, DROP INDEX IF EXISTS later")
    with sent(planned) as statements:
        cycle(backend, planned)
    assert statements == ["distlock_grant", "distlock_release"]


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """Another database, with a lock table of its own."""
    execute("CREATE DATABASE distlock_elsewhere")
    execute(f"CREATE TABLE distlock_elsewhere.{TABLE} LIKE {TABLE}")
    yield "distlock_elsewhere"
    execute("DROP DATABASE distlock_elsewhere")


@mariadb
def test_a_plan_is_of_the_database_of_the_settings(backend: Backend, elsewhere: str) -> None:
    """Whichever was current when it was made, or is now; what comes back says which that is."""
    with session() as one:
        home = backend.identity(one)
        execute(f"USE {elsewhere}", on=one)
        held = Holding()
        for _ in range(THRESHOLD):  # the first plan comes between a grant and its release
            grant = backend.grant(one, claim(), 0)
            assert grant is not None
            assert grant.table == elsewhere
            held = Holding(token=grant.token)
            backend.release(one, held, alone=True)
        assert plans(one) == {"distlock_grant", "distlock_release"}
        assert stored().owner == ""
        grant = backend.grant(one, claim(), 0)
        assert stored().owner == "me"
        execute(f"USE {home}", on=one)
        assert grant is not None
        assert backend.release(one, Holding(token=grant.token), alone=True)
        grant = backend.grant(one, claim(), 0)
        assert grant is not None
        assert grant.table == home


@mariadb
def test_what_is_refused_after_use_is_given_back(elsewhere: str) -> None:
    """A session that has released inside transactions only has no plan of a release yet."""
    connection.close()
    for _ in range(THRESHOLD):
        with lock("n", atomic=True):
            pass
    execute(f"USE {elsewhere}")
    try:
        with pytest.raises(LockError, match="another table"):
            lock("n", wait=0).acquire()
    finally:
        connection.close()
    assert stored().owner == ""
    lock("n", wait=0).acquire().release()


@mariadb
def test_a_plan_that_fits_no_more_is_done_without(
    backend: Backend, planned: BaseDatabaseWrapper
) -> None:
    """The server makes it anew by itself, but not for ever: its cache may be too small."""
    failed: list[str] = []

    def fail(run: Any, sql: str, *rest: Any) -> Any:
        if sql.startswith("EXECUTE"):
            failed.append(sql)
            raise OperationalError(1615, "Prepared statement needs to be re-prepared")
        return run(sql, *rest)

    with planned.execute_wrapper(fail):
        cycle(backend, planned)
        cycle(backend, planned)
    assert len(failed) == 1


@mariadb
def test_a_session_that_is_not_the_drivers_gets_no_plans(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a proxy; the server's id is as the driver has it otherwise."""
    with session() as one:
        one.ensure_connection()
        physical = one.connection
        monkeypatch.setattr(one, "connection", Elsewhere(physical))
        for _ in range(THRESHOLD):
            cycle(backend, one)
        assert plans(one) == set()
        monkeypatch.setattr(one, "connection", physical)


class Elsewhere:
    """A driver's connection that was told another id."""

    def __init__(self, physical: Any) -> None:
        self.physical = physical

    def thread_id(self) -> int:
        return -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.physical, name)


def test_a_planned_grant_of_a_pinned_row_does_not_wait(
    backend: Backend, planned: BaseDatabaseWrapper
) -> None:
    def patience() -> Any:
        if planned.vendor == "postgresql":
            return query("SELECT current_setting('lock_timeout')", on=planned)
        return query("SELECT @@innodb_lock_wait_timeout", on=planned)

    own = patience()
    write(expires_at=-SECOND)
    with pinned("n"), within(0.5), sent(planned) as statements:
        assert backend.grant(planned, claim(), 0) is None
    assert statements[0] == "distlock_grant"
    assert patience() == own  # the session is its user's
    cycle(backend, planned)
    assert patience() == own


@postgresql
def test_plans_follow_the_search_path(backend: Backend, planned: BaseDatabaseWrapper) -> None:
    """Two tenants with one name, on one session: each has its own row."""
    execute("CREATE SCHEMA tenant")
    execute(f"CREATE TABLE tenant.{TABLE} (LIKE {TABLE} INCLUDING ALL)")
    try:
        here = backend.grant(planned, claim(), 0)
        execute("SET search_path TO tenant", on=planned)
        with sent(planned) as statements:
            there = backend.grant(planned, claim("you"), 0)
        assert statements == ["distlock_grant"]
        assert here is not None
        assert there is not None
        assert there.table == backend.identity(planned) != here.table
        assert query(f"SELECT owner FROM tenant.{TABLE}") == [("you",)]
        assert stored().owner == "me"
    finally:
        planned.close()
        execute("DROP SCHEMA tenant CASCADE")


def test_an_error_of_the_statement_is_an_error(
    backend: Backend, planned: BaseDatabaseWrapper
) -> None:
    execute(f"ALTER TABLE {TABLE} RENAME TO elsewhere")
    try:
        with pytest.raises(DatabaseError, match=r"does(n't| not) exist"):
            cycle(backend, planned)
    finally:
        execute(f"ALTER TABLE elsewhere RENAME TO {TABLE}")
    cycle(backend, planned)


def test_another_session_has_plans_of_its_own(
    backend: Backend, planned: BaseDatabaseWrapper
) -> None:
    planned.close()
    for _ in range(THRESHOLD + 2):
        cycle(backend, planned)
    assert plans(planned)


def test_a_guard_stops_a_planned_grant(backend: Backend, planned: BaseDatabaseWrapper) -> None:
    held = take(backend, "you", on=planned)
    expire()
    with transaction.atomic(), within(0.5):
        assert backend.guard(connection, held)
        assert backend.grant(planned, claim(), 0) is None


@pytest.mark.vendor("pgbouncer")
def test_a_session_that_a_pooler_shares_out_gets_no_plans(backend: Backend) -> None:
    with session() as one:
        for _ in range(THRESHOLD + 2):
            cycle(backend, one)
        with sent(one) as statements:
            cycle(backend, one)
    assert statements == UNPLANNED["postgresql"]
