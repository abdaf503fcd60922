"""The system checks: which there are, when they run, and where they lead."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core import checks
from django.core.management import call_command, load_command_class
from django.core.management.base import BaseCommand
from django.db import connection, connections
from django.db.backends.dummy.base import DatabaseWrapper as Dummy
from django.test import override_settings

from distlock.backends.base import TABLE
from distlock.doctor import settings_findings
from distlock.findings import Code, Finding
from tests.torture.workers import ROOT, environment

PAGE = Path(__file__).parent.parent / "docs" / "checks.md"
sqlite = pytest.mark.vendor("sqlite")
servers = pytest.mark.vendor("postgresql", "mysql")


def told(*databases: str) -> dict[str, checks.CheckMessage]:
    """What `manage.py check` says, by id; with `--database` for each that is named."""
    found = checks.run_checks(databases=databases or None)
    return {str(each.id): each for each in found if str(each.id).startswith("distlock.")}


# -- static: no database is asked ---------------------------------------------------------------


def test_a_plain_check_sends_no_statement() -> None:
    told()  # pytest-django would refuse one


@sqlite
@pytest.mark.parametrize(("debug", "ids"), [(True, set()), (False, {"distlock.W002"})])
def test_sqlite_is_a_warning_where_debug_is_off(debug: bool, ids: set[str]) -> None:
    with override_settings(DEBUG=debug):
        assert set(told()) == ids


@sqlite
def test_sqlite_in_memory_is_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections["default"].settings_dict, "NAME", ":memory:")
    assert told() == {}


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An alias for `connections["other"]` to be the replica of, and a project in DEBUG."""
    test = connections["other"].settings_dict["TEST"]
    monkeypatch.setitem(test, "MIRROR", None)
    with override_settings(DEBUG=True):
        yield test


class Primary:
    """Sends reads to "other" and writes to "default", as the docs of Django have it."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "other"

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "default"


class Silent:
    """Has no opinion."""

    def db_for_write(self, model: Any, **hints: Any) -> None:
        return None


class Elsewhere:
    """Keeps the tables of all apps out of "other"."""

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool:
        return db != "other"


@pytest.mark.parametrize(
    ("using", "routers", "mirror", "said"),
    [
        ("default", [], None, ""),
        ("other", [], None, ""),
        ("other", [Silent()], None, ""),
        ("default", [Silent(), Primary()], None, ""),
        ("other", [Silent(), Primary()], None, "send the writes of this app to 'default'"),
        ("other", [Elsewhere()], None, "allow no table"),
        ("default", [Elsewhere()], None, ""),
        ("other", [], "default", "a replica of 'default' by its TEST MIRROR"),
        ("default", [], "default", ""),
    ],
)
def test_an_alias_that_is_a_replica_is_a_warning(
    replica: Any, using: str, routers: list[Any], mirror: str | None, said: str
) -> None:
    replica["MIRROR"] = mirror
    with override_settings(DISTLOCK={"USING": using}, DATABASE_ROUTERS=routers):
        found = told()
    assert set(found) == ({"distlock.W001"} if said else set())
    assert said in str([each.msg for each in found.values()])


@pytest.mark.vendor("postgresql")
def test_a_pool_of_one_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    options = connections["default"].settings_dict["OPTIONS"]
    monkeypatch.setitem(options, "pool", {"min_size": 1, "max_size": 1})
    assert set(told()) == {"distlock.W006"}
    monkeypatch.setitem(options, "pool", {"min_size": 1, "max_size": 2})
    assert told() == {}


@sqlite
def test_a_database_without_row_locks_is_an_error() -> None:
    connections["odd"] = Dummy({**connection.settings_dict}, "odd")
    try:
        [finding] = settings_findings("odd")
    finally:
        del connections["odd"]
    assert finding.code is Code.UNSUPPORTED


# -- asked of the database ----------------------------------------------------------------------

FORGETFUL = {
    "postgresql": ("SET synchronous_commit = off", "SET synchronous_commit = on"),
    "mysql": (
        "SET GLOBAL innodb_flush_log_at_trx_commit = 2",
        "SET GLOBAL innodb_flush_log_at_trx_commit = 0",
    ),
}


@servers
@pytest.mark.django_db(databases=["default", "other"])
def test_a_server_that_forgets_commits_is_a_warning(vendor: str) -> None:
    wrong, usual = FORGETFUL[vendor]
    with connection.cursor() as cursor:
        cursor.execute(wrong)
        try:
            assert "distlock.W003" not in told()
            found = told("default")
        finally:
            cursor.execute(usual)
    message = found["distlock.W003"]
    assert message.level == checks.WARNING
    assert message.hint
    assert "docs/checks.md#distlockw003" in message.hint
    with override_settings(DISTLOCK={"USING": "other"}):
        assert told("default") == {}
        assert set(told("other")) <= {
            "distlock.W003",
            "distlock.W004",
        }  # as the suite's servers are


@servers
@pytest.mark.django_db
def test_what_a_project_may_want_so_is_for_the_doctor_only() -> None:
    """Time limits, tables and clocks would be told before each migrate."""
    assert set(told("default")) <= {"distlock.W003", "distlock.W004"}


READ_ONLY = {
    "postgresql": (
        "SET default_transaction_read_only = on",
        "SET default_transaction_read_only = off",
    ),
    "mysql": ("SET SESSION TRANSACTION READ ONLY", "SET SESSION TRANSACTION READ WRITE"),
    "sqlite": ("PRAGMA query_only = 1", "PRAGMA query_only = 0"),
}


@pytest.mark.django_db(transaction=True)
def test_a_replica_is_an_error(vendor: str) -> None:
    wrong, usual = READ_ONLY[vendor]
    with connection.cursor() as cursor:
        cursor.execute(wrong)
        try:
            found = told("default")
        finally:
            cursor.execute(usual)
    assert found["distlock.E006"].level == checks.ERROR


@pytest.mark.django_db(transaction=True)
def test_a_missing_table_does_not_keep_migrate_from_making_it() -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {TABLE} RENAME TO hidden")
        try:
            assert not [found for found in told("default").values() if found.is_serious()]
        finally:
            cursor.execute(f"ALTER TABLE hidden RENAME TO {TABLE}")


def test_a_database_that_does_not_answer_is_left_to_who_needs_it(
    monkeypatch: pytest.MonkeyPatch, django_db_blocker: Any
) -> None:
    from distlock.checks import check_database

    other = connections["other"]
    away = {"NAME": "/nowhere/at/all"} if other.vendor == "sqlite" else {"PORT": "1"}
    monkeypatch.setattr(other, "settings_dict", {**other.settings_dict, **away})
    other.close()
    with override_settings(DISTLOCK={"USING": "other"}), django_db_blocker.unblock():
        assert check_database(None, databases=["other"]) == []
        assert check_database(None, databases=None) == []
    with override_settings(DISTLOCK={"USING": "nowhere"}):
        assert check_database(None, databases=["other"]) == []


@pytest.mark.django_db(transaction=True)
def test_migrate_shows_them(capsys: pytest.CaptureFixture[str], vendor: str) -> None:
    wrong, usual = READ_ONLY[vendor]
    with connection.cursor() as cursor:
        cursor.execute(wrong)
        try:
            with pytest.raises(Exception, match=r"distlock\.E006"):
                call_command("migrate", skip_checks=False, verbosity=0)
        finally:
            cursor.execute(usual)


# -- the app -------------------------------------------------------------------------------------

WITHOUT_THE_APP = """
import django
from django.conf import settings
sqlite = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
settings.configure(INSTALLED_APPS=["django.contrib.contenttypes"], DATABASES={"default": sqlite})
django.setup()
import distlock
from django.core.exceptions import ImproperlyConfigured

@distlock.lock("decorated", ttl=5, wait=0, renew=False, crash_safe=True, using="default")
def decorated(): ...

with_a_block = distlock.lock("x", ttl=5, wait=0, renew=False, crash_safe=True, using="default")
for use in (distlock.lock("x").acquire, with_a_block.try_acquire, with_a_block.holder, decorated):
    try:
        use()
    except ImproperlyConfigured as error:
        assert 'add "distlock" to INSTALLED_APPS' in str(error)
    else:
        raise AssertionError(use)
"""


@sqlite
def test_without_the_app_the_first_use_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_THE_APP],
        cwd=ROOT,
        env=environment("sqlite:///unused"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- the docs ------------------------------------------------------------------------------------


@sqlite
def test_each_code_has_a_heading_that_its_link_leads_to() -> None:
    text = PAGE.read_text()
    headings = re.findall(r"^### (\S+)", text, re.MULTILINE)
    assert headings == [code.value for code in Code]
    links = {Finding(code, "").link for code in Code}
    # As GitHub makes anchors: of the whole heading, small, without dots.
    lines = re.findall(r"^### (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}
    assert {link.partition("#")[2] for link in links} == anchors
    assert {link.partition("#")[0] for link in links} == {"docs/checks.md"}


@sqlite
@pytest.mark.parametrize("name", ["locks", "release_lock", "purge_locks", "lock_doctor"])
def test_the_page_of_a_command_has_each_option_and_only_such_lines_as_it_takes(name: str) -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    section = page.partition(f"## `manage.py {name}`")[2].partition("\n## ")[0]
    command = load_command_class("distlock", name)
    parser = command.create_parser("manage.py", name)
    mine = {option for option in parser._option_string_actions if option.startswith("--")}
    mine -= set(BaseCommand().create_parser("manage.py", name)._option_string_actions)
    assert set(re.findall(r"--[a-z][a-z-]+", section)) == mine
    for line in re.findall(rf"^manage\.py {name}(.*)$", section, re.MULTILINE):
        parser.parse_args(shlex.split(line, comments=True))


@sqlite
def test_an_error_is_one_by_its_letter() -> None:
    assert {Finding(code, "").is_error for code in Code if code.value[9] == "E"} == {True}
    assert {Finding(code, "").is_error for code in Code if code.value[9] == "W"} == {False}
