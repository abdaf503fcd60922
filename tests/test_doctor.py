"""lock_doctor on a server of its own, which is sane until a test seeds one thing that is wrong."""

from __future__ import annotations

import glob
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import StringIO
from typing import Any

import pytest
from django.apps import apps
from django.core.management import CommandError, call_command
from django.db import OperationalError, connection, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.test import override_settings

from distlock import Lock, lock
from distlock.backends import backend_for
from distlock.backends.base import TABLE
from distlock.backends.examine import postgresql as of_postgresql
from distlock.backends.tickets import TICKETS
from distlock.doctor import SAMPLE, diagnose
from distlock.findings import Code
from tests.databases import query, settings_for
from tests.private_server import Server
from tests.servers import SERVERS
from tests.support import eventually
from tests.torture.workers import ROOT, environment, migrate

servers = pytest.mark.vendor("postgresql", "mysql")
on_postgresql = pytest.mark.vendor("postgresql")
on_mysql = pytest.mark.vendor("mysql")

ALIAS = "other"
ROLE = "distlock"
POSTGRESQL = connection.vendor == "postgresql"
FAKETIME = "/usr/lib/*/faketime/libfaketime.so.1"
DAY = 24 * 3600

PAGES = ROOT / "docs" / "databases"


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page."""
    text = (PAGES / f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def recommended() -> list[str]:
    """What the pages tell to set, for the role of the tests."""
    if not POSTGRESQL:
        return ["SET GLOBAL wait_timeout = 60"]
    [sql] = blocks("postgresql", "sql")
    return [line.replace(" app ", f" {ROLE} ") for line in sql.splitlines()]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A durable server with the settings that the docs recommend, and our tables."""
    product = {"mysql": "mariadb"}.get(connection.vendor, connection.vendor)
    with SERVERS[product](durable=True) as started:
        migrate(started.url)
        for sql in recommended():
            query(started.url, sql)
        yield started


@pytest.fixture
def sane(server: Server, django_db_blocker: Any) -> Iterator[BaseDatabaseWrapper]:
    """The alias "other", which leads to that server. The usual databases are not touched."""
    with django_db_blocker.unblock(), pointed(**at(server)) as there:
        yield there


def at(server: Server) -> dict[str, Any]:
    given = settings_for(server.url)
    return {key: given[key] for key in ("NAME", "HOST", "PORT", "USER", "PASSWORD")}


@contextmanager
def pointed(**to: Any) -> Iterator[BaseDatabaseWrapper]:
    """Change the settings of the alias for a while, and connect anew on both sides of it."""
    there, usual = connections[ALIAS], dict(connections.settings[ALIAS])
    there.close()
    there.settings_dict.update(to)
    try:
        yield there
    finally:
        there.close()
        there.settings_dict.update(usual)


@contextmanager
def seeded(server: Server, wrong: list[str], right: list[str]) -> Iterator[None]:
    """Run statements on the server, and others that undo them; sessions begin anew."""
    connections[ALIAS].close()
    try:
        for sql in wrong:
            query(server.url, sql)
        yield
    finally:
        connections[ALIAS].close()
        for sql in right:
            query(server.url, sql)


def codes(**how: Any) -> list[Code]:
    return [finding.code for finding in diagnose(ALIAS, **how)]


def doctor(*arguments: str) -> tuple[str, int]:
    """What the command says, and its exit status."""
    out = StringIO()
    try:
        call_command("lock_doctor", *arguments, stdout=out)
    except SystemExit as end:
        return out.getvalue(), int(str(end.code))
    return out.getvalue(), 0


# -- sane -------------------------------------------------------------------------------------


@servers
def test_nothing_is_found_on_a_sane_server(sane: BaseDatabaseWrapper) -> None:
    assert diagnose(ALIAS) == []
    assert doctor("--database", ALIAS) == ("Nothing is wrong.\n", 0)
    said, status = doctor("--database", ALIAS, "--json")
    assert (json.loads(said), status) == ({"ok": True, "findings": []}, 0)


@servers
def test_locks_that_are_used_are_nothing_wrong(sane: BaseDatabaseWrapper) -> None:
    write(sane, "held", acquired=-5, expires=25)
    write(sane, "idle for a month", acquired=-31 * DAY, expires=-30 * DAY)
    try:
        assert diagnose(ALIAS) == []
    finally:
        clear(sane)


def settings_of(page: str) -> dict[str, Any]:
    """What the first Python block of a page has for the alias "default"."""
    names: dict[str, Any] = {}
    exec(blocks(page, "python")[0], names)
    given: dict[str, Any] = names["DATABASES"]["default"]
    return given


@on_mysql
def test_the_settings_of_the_page_are_enough(server: Server, sane: BaseDatabaseWrapper) -> None:
    given = settings_of("mysql")
    assert given["ENGINE"] == sane.settings_dict["ENGINE"]
    with seeded(server, *variable("wait_timeout", "28800", "60")):
        assert codes() == [Code.DEAD_SESSIONS]
        with pointed(OPTIONS=given["OPTIONS"]):
            assert codes() == []
            with lock("x", using=ALIAS), transaction.atomic(using=ALIAS), lock("y", using=ALIAS):
                pass  # on the private connection, too
    clear(sane)


@pytest.mark.vendor("sqlite")
@pytest.mark.django_db(transaction=True, databases=["other"])
def test_the_settings_of_the_page_are_good_for_locks() -> None:
    given = settings_of("sqlite")
    with pointed(OPTIONS=given["OPTIONS"]) as there, override_settings(DEBUG=True):
        assert codes() == []
        with lock("x", using=ALIAS), transaction.atomic(using=ALIAS):
            pass
        with there.cursor() as cursor:
            cursor.execute("PRAGMA journal_mode = DELETE")


@on_postgresql
def test_a_thread_that_waits_for_a_lock_keeps_its_connection(sane: BaseDatabaseWrapper) -> None:
    """Why a pool needs one for each thread."""
    write(sane, "x", acquired=0, expires=3, owner="me")
    pool = {"min_size": 1, "max_size": 1, "timeout": 0.5}
    with pointed(OPTIONS={"pool": pool}), ThreadPoolExecutor(1) as other:
        try:
            waits = other.submit(lambda: closing(lock("x", using=ALIAS, wait=10)))
            assert eventually(lambda: sane.pool.get_stats().get("requests_num") == 1)  # type: ignore[attr-defined]
            with pytest.raises(OperationalError, match="couldn't get a connection"):
                sane.ensure_connection()
            waits.result(20)
        finally:
            sane.close()
            sane.close_pool()  # type: ignore[attr-defined]
    clear(sane)


def closing(wanted: Lock) -> None:
    try:
        with wanted:
            pass
    finally:
        connections[ALIAS].close()


# -- seeded: PostgreSQL ---------------------------------------------------------------------


def role(setting: str, value: str, usual: str = "") -> tuple[list[str], list[str]]:
    back = f"SET {setting} = {usual}" if usual else f"RESET {setting}"
    return (
        [f"ALTER ROLE {ROLE} SET {setting} = {value}"],
        [f"SET transaction_read_only = off; ALTER ROLE {ROLE} {back}"],
    )


def system(setting: str, value: str) -> tuple[list[str], list[str]]:
    reload = "SELECT pg_reload_conf()"
    return (
        [f"ALTER SYSTEM SET {setting} = {value}", reload],
        [f"ALTER SYSTEM RESET {setting}", reload],
    )


def renamed(table: str) -> tuple[list[str], list[str]]:
    return [f"ALTER TABLE {table} RENAME TO hidden"], [f"ALTER TABLE hidden RENAME TO {table}"]


def without_note() -> tuple[list[str], list[str]]:
    return (
        [f"ALTER TABLE {TABLE} RENAME COLUMN note TO other"],
        [f"ALTER TABLE {TABLE} RENAME COLUMN other TO note"],
    )


TICKETS_INDEX = "distlock_ticket_name (name, slot)"
AUTOVACUUM = f"ALTER TABLE {TICKETS} "


@on_postgresql
@pytest.mark.parametrize(
    ("seed", "code", "said"),
    [
        (role("synchronous_commit", "off"), Code.FORGETFUL, "synchronous_commit is off"),
        (system("fsync", "off"), Code.CORRUPTIBLE, "fsync is off"),
        (system("full_page_writes", "off"), Code.CORRUPTIBLE, "full_page_writes is off"),
        (role("default_transaction_read_only", "on"), Code.READ_ONLY, "read-only"),
        (
            role("default_transaction_isolation", "'repeatable read'"),
            Code.SNAPSHOTS,
            "no lock can be taken",
        ),
        (role("tcp_keepalives_idle", "7200", "15"), Code.KEEPALIVES, "after 7215 s"),
        (
            role("idle_in_transaction_session_timeout", "0", "'60s'"),
            Code.DEAD_SESSIONS,
            "stay open for ever",
        ),
        (
            role("idle_in_transaction_session_timeout", "'11min'", "'60s'"),
            Code.DEAD_SESSIONS,
            "stay open for 660 s",
        ),
        (role("idle_session_timeout", "'5s'"), Code.SHORT_SESSIONS, "idle sessions after 5 s"),
        (system("autovacuum", "off"), Code.NOT_VACUUMED, "on this server is off"),
        (
            (
                [AUTOVACUUM + "SET (autovacuum_enabled = off)"],
                [AUTOVACUUM + "RESET (autovacuum_enabled)"],
            ),
            Code.NOT_VACUUMED,
            f"of {TICKETS} is off",
        ),
        (renamed(TABLE), Code.NO_TABLE, f"The table {TABLE} is missing"),
        (renamed(TICKETS), Code.NO_TABLE, f"The table {TICKETS} is missing"),
        (without_note(), Code.NO_TABLE, f"The table {TABLE} has no column note"),
    ],
    ids=lambda value: value.name if isinstance(value, Code) else "",
)
def test_what_is_wrong_on_postgresql_is_found_and_nothing_else(
    server: Server,
    sane: BaseDatabaseWrapper,
    seed: tuple[list[str], list[str]],
    code: Code,
    said: str,
) -> None:
    finds_just(code, said, server, seed)


def until(check: Callable[[], bool]) -> bool:
    """Whether it becomes true: a running server reads its files again in its own time."""
    deadline = time.monotonic() + 5
    while not check() and time.monotonic() < deadline:
        connections[ALIAS].close()
        time.sleep(0.05)
    return check()


def finds_just(code: Code, said: str, server: Server, seed: tuple[list[str], list[str]]) -> None:
    """One finding while the server is like that, and none afterwards."""
    with seeded(server, *seed):
        assert until(lambda: [said in finding.message for finding in diagnose(ALIAS)] == [True])
        [finding] = diagnose(ALIAS)
        assert finding.code is code
        assert finding.remedy
    assert until(lambda: diagnose(ALIAS) == [])


@on_postgresql
def test_a_standby_is_found(server: Server, sane: BaseDatabaseWrapper) -> None:
    sane.close()
    mark = server.data / "standby.signal"
    mark.touch()
    server.restart()
    try:
        [finding] = diagnose(ALIAS)
        assert finding.code is Code.READ_ONLY
        assert "replica (pg_is_in_recovery)" in finding.message
        assert doctor("--database", ALIAS)[1] == 1
    finally:
        sane.close()
        mark.unlink()
        server.restart()
    assert diagnose(ALIAS) == []


@on_postgresql
def test_a_session_in_another_zone_is_found(sane: BaseDatabaseWrapper) -> None:
    with sane.cursor() as cursor:
        cursor.execute("SET TIME ZONE 'Asia/Tokyo'")
    assert codes() == [Code.TIME_ZONE]


@on_postgresql
@pytest.mark.parametrize(
    ("pool", "threads", "found"),
    [
        ({"max_size": 1, "min_size": 1}, 2, [Code.SMALL_POOL]),
        ({"min_size": 1}, 2, [Code.SMALL_POOL]),
        ({"max_size": 1, "min_size": 1}, 1, []),
        ({"max_size": 2, "min_size": 1}, 2, []),
        (True, 4, []),
        (True, 5, [Code.SMALL_POOL]),
        (False, 5, []),
    ],
)
def test_a_pool_that_is_too_small_is_found(
    sane: BaseDatabaseWrapper, pool: Any, threads: int, found: list[Code]
) -> None:
    with pointed(OPTIONS={"pool": pool}):
        try:
            assert codes(threads=threads) == found
        finally:
            sane.close()
            sane.close_pool()  # type: ignore[attr-defined]


@on_postgresql
@pytest.mark.parametrize(
    ("attributes", "found"),
    [(None, [Code.ROUTED_ELSEWHERE]), ("any", [Code.ROUTED_ELSEWHERE]), ("read-write", [])],
)
def test_several_hosts_of_which_any_may_answer_are_found(
    server: Server, sane: BaseDatabaseWrapper, attributes: str | None, found: list[Code]
) -> None:
    options = {"target_session_attrs": attributes} if attributes else {}
    with pointed(HOST="127.0.0.1,127.0.0.1", PORT=f"{server.port},{server.port}", OPTIONS=options):
        assert codes() == found


# -- seeded: MariaDB --------------------------------------------------------------------------


def variable(name: str, wrong: str, right: str) -> tuple[list[str], list[str]]:
    return [f"SET GLOBAL {name} = {wrong}"], [f"SET GLOBAL {name} = {right}"]


@on_mysql
@pytest.mark.parametrize(
    ("seed", "code", "said"),
    [
        (
            variable("innodb_flush_log_at_trx_commit", "2", "1"),
            Code.FORGETFUL,
            "innodb_flush_log_at_trx_commit is 2",
        ),
        (
            (
                [f"ALTER TABLE {TICKETS} DROP INDEX distlock_ticket_name, ENGINE = MyISAM"],
                [f"ALTER TABLE {TICKETS} ENGINE = InnoDB, ADD INDEX {TICKETS_INDEX}"],
            ),
            Code.NO_TRANSACTIONS,
            f"{TICKETS} is kept by MyISAM",
        ),
        (
            variable("default_storage_engine", "MyISAM", "InnoDB"),
            Code.NO_TRANSACTIONS,
            "default_storage_engine",
        ),
        (variable("read_only", "1", "0"), Code.READ_ONLY, "(read_only)"),
        (variable("tx_read_only", "1", "0"), Code.READ_ONLY, "(tx_read_only)"),
        (variable("wait_timeout", "28800", "60"), Code.DEAD_SESSIONS, "for 28800 s"),
        (variable("wait_timeout", "5", "60"), Code.SHORT_SESSIONS, "idle sessions after 5 s"),
        (renamed(TABLE), Code.NO_TABLE, f"The table {TABLE} is missing"),
        (without_note(), Code.NO_TABLE, f"The table {TABLE} has no column note"),
    ],
    ids=lambda value: value.name if isinstance(value, Code) else "",
)
def test_what_is_wrong_on_mariadb_is_found_and_nothing_else(
    server: Server,
    sane: BaseDatabaseWrapper,
    seed: tuple[list[str], list[str]],
    code: Code,
    said: str,
) -> None:
    finds_just(code, said, server, seed)


@on_mysql
def test_a_limit_on_idle_transactions_is_enough(server: Server, sane: BaseDatabaseWrapper) -> None:
    wrong, right = variable("wait_timeout", "28800", "60")
    more = variable("idle_transaction_timeout", "60", "0")
    with seeded(server, wrong + more[0], right + more[1]):
        assert diagnose(ALIAS) == []


@on_mysql
def test_a_level_with_snapshots_is_found(sane: BaseDatabaseWrapper) -> None:
    with pointed(OPTIONS={**sane.settings_dict["OPTIONS"], "isolation_level": "repeatable read"}):
        sane.__dict__.pop("isolation_level", None)
        assert codes() == [Code.SNAPSHOTS]


@on_mysql
def test_a_server_that_loses_pages_or_its_binary_log_is_found(
    server: Server, sane: BaseDatabaseWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    sane.close()
    usual = server.command()
    more = ["--skip-innodb-doublewrite", "--log-bin=log", "--server-id=1", "--sync-binlog=0"]
    with monkeypatch.context() as patch:
        patch.setattr(server, "command", lambda: [*usual, *more, "--wait-timeout=60"])
        server.restart()
        assert codes() == [Code.CORRUPTIBLE, Code.BINARY_LOG]
        sane.close()
    server.restart()
    query(server.url, *recommended())
    assert codes() == []


# -- seeded: both -----------------------------------------------------------------------------

MODELS = apps.get_app_config("distlock").get_models()
OTHERS = sorted({model._meta.db_table for model in MODELS} - {TICKETS})
MAKE = {
    "postgresql": ("CREATE ROLE app LOGIN PASSWORD 'app'", "GRANT {} ON {} TO app"),
    "mysql": (
        "CREATE USER app@'127.0.0.1' IDENTIFIED BY 'app'",
        "GRANT {} ON distlock.{} TO app@'127.0.0.1'",
    ),
}
GONE = {
    "postgresql": ["DROP OWNED BY app", "DROP ROLE app"],
    "mysql": ["DROP USER app@'127.0.0.1'"],
}


@servers
def test_privileges_that_are_missing_are_named(
    server: Server, sane: BaseDatabaseWrapper, vendor: str
) -> None:
    make, grant = MAKE[vendor]
    grants = [grant.format("SELECT, INSERT, UPDATE, DELETE", table) for table in OTHERS]
    grants.append(grant.format("SELECT, UPDATE", TICKETS))
    if POSTGRESQL:
        grants += blocks("postgresql", "sql")
    user = {"USER": "app", "PASSWORD": "app"}
    with seeded(server, [make, *grants], GONE[vendor]), pointed(**user):
        [finding] = diagnose(ALIAS)
        assert finding.code is Code.NO_PRIVILEGE
        assert finding.message.startswith(f"INSERT, DELETE on the table {TICKETS} is refused: ")


def write(
    to: BaseDatabaseWrapper, name: str, *, acquired: float, expires: float, owner: str = ""
) -> None:
    """Write a row with these times, in seconds from now."""
    moment = (
        "clock_timestamp() + %s * interval '1 second'"
        if POSTGRESQL
        else "UTC_TIMESTAMP(6) + INTERVAL %s SECOND"
    )
    with to.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {TABLE} (name, slot, owner, acquired_at, expires_at) "
            f"VALUES (%s, 0, %s, {moment}, {moment})",
            [name, owner, acquired, expires],
        )


def query_of(on: BaseDatabaseWrapper, sql: str) -> list[Any]:
    with on.cursor() as cursor:
        cursor.execute(sql)
        return list(cursor.fetchall())


def clear(of: BaseDatabaseWrapper) -> None:
    with of.cursor() as cursor:
        cursor.execute(f"DELETE FROM {TABLE}")


@servers
@pytest.mark.parametrize(
    ("times", "found"),
    [
        ({"acquired": 60, "expires": 90}, [Code.CLOCK_SET_BACK]),
        ({"acquired": 1, "expires": 90}, []),
        ({"acquired": -50 * DAY, "expires": -38 * DAY}, [Code.NOT_PURGED]),
        ({"acquired": -50 * DAY, "expires": -36 * DAY}, []),
    ],
    ids=str,
)
def test_rows_tell_of_a_clock_that_was_set_back_and_of_a_purge_that_does_not_run(
    sane: BaseDatabaseWrapper, times: dict[str, float], found: list[Code]
) -> None:
    write(sane, "n", **times)
    try:
        assert codes() == found
    finally:
        clear(sane)


@servers
def test_of_a_large_table_only_a_part_is_looked_at(
    sane: BaseDatabaseWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SAMPLE >= 1_000
    monkeypatch.setattr("distlock.doctor.SAMPLE", 3)
    for name in "abc":
        write(sane, name, acquired=-50 * DAY, expires=-50 * DAY)
    write(sane, "future", acquired=60, expires=90)
    try:
        assert codes() == [Code.CLOCK_SET_BACK, Code.NOT_PURGED]
        for name in "defg":
            write(sane, name, acquired=-1, expires=-1)
        [finding] = diagnose(ALIAS)
        assert finding.code is Code.NOT_PURGED
        assert "Leases of the 3 oldest ended more than 37 d ago: 3." in finding.message
    finally:
        clear(sane)


@servers
@pytest.mark.parametrize(
    ("offset", "said"),
    [
        ("+1h", "is (59 min 5[0-9] s|1 h 0 min) behind this host's.*keep local time as if"),
        ("-40s", "is (39|40) s ahead of this host's.*time server"),
    ],
)
def test_a_clock_that_is_wrong_is_found(server: Server, offset: str, said: str) -> None:
    libraries = glob.glob(FAKETIME)
    assert libraries, "libfaketime is not installed (Debian: faketime)"
    fake = {"LD_PRELOAD": libraries[0], "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    done = subprocess.run(
        [sys.executable, "manage.py", "lock_doctor", "--json"],
        cwd=ROOT,
        env={**environment(server.url), **fake, "DJANGO_SETTINGS_MODULE": "tests.settings"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    [finding] = json.loads(done.stdout)["findings"]
    assert (finding["id"], finding["severity"]) == ("distlock.W008", "warning")
    assert re.search(said, f"{finding['message']} {finding['remedy']}"), finding


@servers
def test_a_server_that_is_too_old_is_found(
    sane: BaseDatabaseWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_postgresql, "VERSION", (99,))
    monkeypatch.setattr(type(backend_for(sane)), "minimum_version", (99, 1), raising=False)
    [finding] = diagnose(ALIAS)
    assert finding.code is Code.OLD_VERSION
    assert "need 99" in finding.message
    monkeypatch.setattr(sane.features, "minimum_database_version", (98,))
    monkeypatch.setattr("django.db.backends.base.base.RAN_DB_VERSION_CHECK", set())
    sane.close()
    [finding] = diagnose(ALIAS)
    assert finding.code is Code.OLD_VERSION
    assert "98 or later is required" in finding.message


@servers
def test_a_server_that_does_not_answer_is_found(sane: BaseDatabaseWrapper) -> None:
    with pointed(PORT="1"):
        said, status = doctor("--database", ALIAS)
    assert status == 1
    assert "distlock.E009: The database 'other' cannot be asked. It says: " in said


@servers
def test_a_server_that_says_nothing_of_itself_is_a_warning(
    sane: BaseDatabaseWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> Any:
        with sane.cursor() as cursor:
            cursor.execute("SELECT no_such_thing")

    monkeypatch.setattr(type(backend_for(sane)), "examine", refuse)
    [finding] = diagnose(ALIAS)
    assert finding.code is Code.NOT_EXAMINED
    assert "no_such_thing" in finding.message


# -- SQLite ---------------------------------------------------------------------------------


@pytest.mark.vendor("sqlite")
@pytest.mark.django_db(transaction=True, databases=["other"])
@pytest.mark.parametrize(
    ("pragma", "usual", "code"),
    [
        ("query_only = 1", "query_only = 0", Code.READ_ONLY),
        ("synchronous = OFF", "synchronous = FULL", Code.CORRUPTIBLE),
    ],
)
def test_what_is_wrong_on_sqlite_is_found(pragma: str, usual: str, code: Code) -> None:
    with override_settings(DEBUG=True):
        assert codes() == []
        with connections[ALIAS].cursor() as cursor:
            cursor.execute(f"PRAGMA {pragma}")
            try:
                assert codes() == [code]
            finally:
                cursor.execute(f"PRAGMA {usual}")


@pytest.mark.vendor("sqlite")
@pytest.mark.django_db
def test_sqlite_in_production_is_found_and_may_be_silenced() -> None:
    said, status = doctor()
    assert status == 0
    assert said.startswith("distlock.W002: Locks are kept in SQLite, and DEBUG is off.")
    assert said.endswith("1 warning.\n")
    assert "    See docs/checks.md#distlockw002\n" in said
    with override_settings(SILENCED_SYSTEM_CHECKS=["distlock.W002"]):
        assert doctor() == ("Nothing is wrong.\n", 0)


# -- the command --------------------------------------------------------------------------------


def test_settings_that_are_wrong_are_told_and_end_with_status_1() -> None:
    with override_settings(DISTLOCK={"TTL": 0, "NOPE": 1}):
        said, status = doctor("--json")
        assert status == 1
        told = json.loads(said)
        assert [finding["id"] for finding in told["findings"]] == ["distlock.E001", "distlock.E002"]
        assert told["ok"] is False
        assert doctor()[0].endswith("2 errors.\n")
        assert len(diagnose(ALIAS)) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--database", "nowhere"], "no database 'nowhere'"),
        (["--threads", "0"], "--threads must be a whole number from 1"),
    ],
)
def test_bad_input_is_an_error_that_names_it(arguments: list[str], said: str) -> None:
    with pytest.raises(CommandError, match=said):
        doctor(*arguments)


@servers
def test_it_examines_inside_a_transaction_and_leaves_it_as_it_was(
    sane: BaseDatabaseWrapper,
) -> None:
    with transaction.atomic(using=ALIAS):
        write(sane, "mine", acquired=-1, expires=1)
        assert diagnose(ALIAS) == []
        transaction.set_rollback(True, using=ALIAS)
    assert query_of(sane, f"SELECT count(*) FROM {TABLE}") == [(0,)]
