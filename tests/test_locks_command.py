"""`manage.py locks` and `release_lock`, and the bar of `purge_locks`."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, connections
from django.test import override_settings

from distlock import LockLost, lock
from distlock.backends import backend_for
from distlock.backends.base import TABLE
from distlock.listing import STRIDE, TAKEN, _strides, listing, with_prefix
from distlock.management.commands.release_lock import Command
from distlock.management.table import columns_of, table
from distlock.models import DistributedLock
from distlock.states import state_at
from tests.commands import LIMIT, MANAGE, environ
from tests.conformance import rows
from tests.conformance.rows import MINUTE, SECOND, execute, pinned, query
from tests.support import eventually, in_thread
from tests.waiters import Waiter

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")
DAY = 24 * 60 * MINUTE
LAST = "\U0010ffff"


def write(name: str = "n", **columns: Any) -> None:
    rows.write(name, **{"pid": 1, **columns})


def locks(*arguments: str, **options: Any) -> str:
    out = StringIO()
    call_command("locks", *arguments, stdout=out, **options)
    return out.getvalue()


def told(*arguments: str) -> list[str]:
    """The names that `--json` has."""
    return [each["name"] for each in json.loads(locks("--json", *arguments))["locks"]]


def release(*arguments: str) -> tuple[int, str]:
    """The exit status of `release_lock`, and what it said."""
    out = StringIO()
    try:
        call_command("release_lock", *arguments, stdout=out, stderr=out)
    except SystemExit as end:
        return int(str(end.code)), out.getvalue()
    return 0, out.getvalue()


# -- the list ------------------------------------------------------------------------------------


def test_an_empty_table() -> None:
    assert locks() == "There are none.\n"
    assert json.loads(locks("--json", "--held"))["locks"] == []


def test_a_table_says_who_holds_what() -> None:
    write("free", expires_at=-SECOND)
    with lock("held", note="nightly", ttl=60), lock("kept", min_hold=30) as kept:
        kept.release()
        lines = locks().splitlines()
    assert lines[0].split() == [
        "LOCK",
        "STATE",
        "HOLDER",
        "HELD",
        "FOR",
        "TIME",
        "LEFT",
        "TOKEN",
        "NOTE",
    ]
    assert re.match(r"free +free +\d", lines[1])
    assert re.match(
        rf"held +held +MainThread, {os.getpid()} on \S+ +\S+ m?s +(59 s|1 min 0 s) +\d+ +nightly$",
        lines[2],
    )
    assert re.match(r"kept +kept +(29|30) s +\d+$", lines[3])
    assert len(lines) == 4


def test_json_has_the_same_for_programs() -> None:
    write("n", owner="dead", expires_at=-SECOND, fencing_token=7)
    with lock("x", note="n") as lease:
        found = json.loads(locks("--json"))
    gone, held = found["locks"]
    assert (gone["name"], gone["state"], gone["token"], gone["holder"]) == ("n", "expired", 7, None)
    assert (gone["held_for"], gone["time_left"]) == (None, 0)
    assert held["state"] == "held"
    assert (held["slot"], held["token"]) == (0, lease.token)
    assert held["holder"].items() >= {"pid": os.getpid(), "note": "n"}.items()
    assert 0 <= held["held_for"] < 20
    assert 10 < held["time_left"] <= 30
    assert abs(found["now"] - time.time()) < 60
    assert found["cut_off"] is None


def counted() -> None:
    """A lock that was taken four times, twice after a wait, and lost once; and one that is new."""
    write(
        "busy",
        owner="",
        acquisitions=4,
        waits=2,
        losses=1,
        lost_at=-DAY,
        total_hold=6 * SECOND,
        longest_hold=3 * SECOND,
        total_wait=8 * MINUTE,
        longest_wait=5 * MINUTE,
    )
    write("new", owner="me", acquisitions=1, expires_at=MINUTE)


def test_stats_are_a_table_of_their_own() -> None:
    assert locks("--stats") == "There are none.\n"
    counted()
    header, busy, new = locks("--stats").splitlines()
    assert re.split("  +", header) == [
        *("LOCK", "GRANTS", "WAITED FOR", "MEAN WAIT", "LONGEST WAIT"),
        *("MEAN HOLD", "LONGEST HOLD", "LOSSES", "LAST LOSS"),
    ]
    assert re.match(r"busy +4 +50% +2 min +5 min +2\.0 s +3\.0 s +1 +\d{4}-\d\d-\d\d ", busy)
    assert re.match(r"new +1 +0% +0$", new)
    assert [line.split()[0] for line in locks("--stats", "--held").splitlines()[1:]] == ["new"]


def test_json_has_the_stats() -> None:
    counted()
    found = json.loads(locks("--json"))
    busy, new = (each["stats"] for each in found["locks"])
    assert found["now"] - busy.pop("last_lost_at") == pytest.approx(86400, abs=60)
    assert busy == {
        "acquisitions": 4,
        "waits": 2,
        "share_waited": 0.5,
        "total_waited": 480.0,
        "mean_waited": 120.0,
        "longest_waited": 300.0,
        "releases": 3,
        "total_held": 6.0,
        "mean_held": 2.0,
        "longest_held": 3.0,
        "losses": 1,
    }
    assert (new["releases"], new["mean_held"], new["last_lost_at"]) == (0, 0.0, None)
    stats = lock("busy").stats()
    assert stats is not None
    assert busy.items() <= {**vars(stats), **{key: getattr(stats, key) for key in busy}}.items()


@servers
def test_that_somebody_waits_is_told_where_the_row_says_so(vendor: str) -> None:
    with lock("x") as lease:
        [before] = json.loads(locks("--json"))["locks"]
        waiter = Waiter("x")
        if vendor == "postgresql":
            assert before["wanted"] is False
            assert eventually(lambda: json.loads(locks("--json"))["locks"][0]["wanted"] is True)
            assert "held, wanted" in locks()
        else:
            assert before["wanted"] is None
        lease.release()
        waiter.result()


def test_held_and_name_choose() -> None:
    for name in ("a", "b", "ba", "B", "c"):
        write(name, expires_at=-SECOND)
    with lock("bb"), lock("d"), lock("kept", min_hold=30) as kept:
        kept.release()
        assert told("--held") == ["bb", "d", "kept"]
        assert told("--name", "b") == ["b", "ba", "bb"]
        assert told("--held", "--name", "b") == ["bb"]
        assert told("--name", "zz") == []
        assert len(told()) == 8


@pytest.mark.parametrize(
    ("prefix", "inside", "outside"),
    [
        ("a%", ["a%", "a%b"], ["a", "ab", "a&"]),
        ("a_", ["a_", "a_b"], ["a", "ab"]),
        ("\ud7ff", ["\ud7ff", "\ud7ffx"], ["\ud7fe", "\ue000"]),
        (f"a{LAST}", [f"a{LAST}", f"a{LAST}b"], ["a", "b"]),
        (LAST, [LAST, LAST + LAST], ["z"]),
        ("é", ["é", "éa"], ["e", "É"]),
        (" ", [" ", "  a"], ["a", "!"]),
    ],
)
def test_a_prefix_is_compared_exactly(prefix: str, inside: list[str], outside: list[str]) -> None:
    for name in inside + outside:
        write(name)
    assert told("--name", prefix) == sorted(inside)


def test_slots_of_a_name_are_told_apart() -> None:
    write("n", slot=1)
    write("n", slot=0)
    assert [line.split()[0] for line in locks().splitlines()[1:]] == ["n", "n"]
    assert "n [1]" in locks()


def test_what_cannot_be_printed_does_not_act_on_the_terminal() -> None:
    with lock("evil\x1b[2J", note="two\nlines"), lock(" blank "):
        said = locks()
    assert "'evil\\x1b[2J'" in said
    assert "'two\\nlines'" in said
    assert "' blank '" in said
    assert "\x1b" not in said
    assert len(said.splitlines()) == 3


def test_the_alias_is_that_of_the_option_or_the_setting() -> None:
    execute(f"INSERT INTO {TABLE} (name) VALUES ('there')", on=connections["other"])
    assert told() == []
    assert told("--database", "other") == ["there"]
    with override_settings(DISTLOCK={"USING": "other"}):
        assert told() == ["there"]


# -- many ----------------------------------------------------------------------------------------


def test_a_limit_says_that_there_are_more() -> None:
    for number in range(5):
        write(f"n{number}", expires_at=MINUTE, owner="me")
    for which in ([], ["--held"]):
        assert told("--limit", "5", *which) == ["n0", "n1", "n2", "n3", "n4"]
        assert "There are more" not in locks("--limit", "5", *which)
        assert locks("--limit", "2", *which).splitlines()[-1] == "There are more than 2."
        found = json.loads(locks("--json", "--limit", "2", *which))
        assert [each["name"] for each in found["locks"]] == ["n0", "n1"]
        assert found["cut_off"] == "There are more than 2."


@pytest.mark.parametrize("stride", [1, 2, 3, 100])
def test_those_that_are_held_are_found_in_strides(
    stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert STRIDE >= 1_000
    monkeypatch.setattr("distlock.listing.STRIDE", stride)
    keys = [("a", 0), ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("d", 0), ("e", 0)]
    held = [("b", 0), ("b", 2), ("e", 0)]
    for name, slot in keys:
        ends = MINUTE if (name, slot) in held else -MINUTE
        write(name, slot=slot, owner="me", expires_at=ends)

    def found(limit: int = 100, prefix: str = "") -> list[tuple[str, int]]:
        got = listing("default", held=True, prefix=prefix, limit=limit, patience=60).rows
        return [(row.name, row.slot) for row in got]

    assert found() == held
    assert found(limit=2) == held[:2]
    assert found(prefix="b") == held[:2]


def test_a_late_stride_asks_no_more_than_an_early_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlock.listing.STRIDE", 1)
    for name in "abcdef":
        write(name)
    every = DistributedLock.objects.order_by("name", "slot")
    asked = [str(stride.query) for stride, _ in _strides(every, patience=60)]
    assert len(asked) == 6
    assert len(set(map(len, asked[1:-1]))) == 1


def test_when_time_is_up_it_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlock.listing.STRIDE", 2)
    monkeypatch.setattr("distlock.management.commands.locks.PATIENCE", 0.0)
    for name in "abcd":
        write(name, owner="me", expires_at=MINUTE)
    assert locks("--held").splitlines()[-1] == "Time was up after the names before 'c'."
    assert told("--held") == ["a", "b"]
    assert told() == ["a", "b", "c", "d"]


MANY = {
    "postgresql": "INSERT INTO {} (name) SELECT 'n' || n FROM generate_series(1, 20000) n",
    "mysql": "INSERT INTO {} (name) SELECT CONCAT('n', seq) FROM seq_1_to_20000",
}


@servers
def test_the_plain_list_and_a_prefix_use_the_key(
    vendor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each stride of `--held`: no plan reads the whole table, or sorts it."""
    execute(MANY[vendor].format(TABLE))
    execute(f"ANALYZE {TABLE}" if vendor == "postgresql" else f"ANALYZE TABLE {TABLE}")
    every = DistributedLock.objects.exclude(name="").order_by("name", "slot")
    every = every.annotate(state=state_at(0))
    edge = every.values_list("name", "slot")[STRIDE : STRIDE + 1]
    sorts = {"postgresql": "Sort", "mysql": "filesort"}[vendor]
    for some in (every[:101], every.filter(with_prefix("n77"))[:101], edge):
        plan = some.explain()
        assert "distlock_name_slot" in plan, plan
        assert not re.search("Seq Scan| ALL ", plan), plan
    monkeypatch.setattr("distlock.listing.STRIDE", 1_000)
    _, (stride, _), *_ = _strides(every, patience=60)
    plan = stride.filter(state__in=TAKEN).explain()
    assert re.search("Index Cond:.* <= " if vendor == "postgresql" else "range", plan), plan
    assert sorts not in every[:101].explain()
    assert sorts not in edge.explain()


def test_a_list_is_two_statements(django_assert_num_queries: Any) -> None:
    for number in range(30):
        write(f"n{number}")
    with django_assert_num_queries(2):
        assert len(told("--limit", "30")) == 30
    with django_assert_num_queries(3):
        told("--held")


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--limit", "0"], "^--limit must be a whole number from 1 to 10000, not '0'"),
        (["--name", "x" * 256], "^--name: name must have 1 to 255 characters"),
        (["--name", "\0"], "^--name: .*NUL"),
        (["--watch", "0"], "^--watch must be a number of seconds greater than 0, not '0'"),
        (["--watch", "soon"], "^--watch must be"),
        (["--watch"], "^--watch needs a terminal"),
        (["--watch", "--json"], "choose one"),
        (["--database", "nowhere"], "^--database: there is no database 'nowhere'"),
    ],
)
def test_bad_input_is_an_error_that_names_it(arguments: list[str], said: str) -> None:
    with pytest.raises(CommandError, match=said):
        locks(*arguments)


@contextmanager
def hidden() -> Iterator[None]:
    execute(f"ALTER TABLE {TABLE} RENAME TO hidden")
    try:
        yield
    finally:
        execute(f"ALTER TABLE hidden RENAME TO {TABLE}")


def test_a_missing_table_says_to_migrate() -> None:
    with hidden():
        for command in (["locks"], ["locks", "--held"], ["release_lock", "x", "--yes"]):
            with pytest.raises(CommandError, match=r"run `manage\.py migrate distlock"):
                call_command(*command, stdout=StringIO())


def test_a_database_that_cannot_be_reached_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    other = connections["other"]
    other.close()
    away = {"NAME": "/nowhere/at/all"} if other.vendor == "sqlite" else {"PORT": "1"}
    monkeypatch.setattr(other, "settings_dict", {**other.settings_dict, **away})
    try:
        for command in (["locks"], ["release_lock", "x", "--yes"]):
            with pytest.raises(CommandError, match="'other' cannot be asked"):
                call_command(*command, "--database=other", stdout=StringIO())
    finally:
        other.close()


# -- columns -------------------------------------------------------------------------------------


def test_columns_are_as_wide_as_they_look() -> None:
    rows = [["NAME", "X"], ["한국어", "1"], ["e\u0301te", "2"]]
    lines = table(rows)
    assert [columns_of(line) for line in lines] == [9, 9, 9]
    assert lines[1] == "한국어" + "  " + "1"


def test_on_a_narrow_terminal_the_widest_columns_give() -> None:
    lines = table([["n" * 60, "held", "한" * 30]], width=60)
    assert columns_of(lines[0]) <= 60
    assert " held " in lines[0]
    assert lines[0].count("\N{HORIZONTAL ELLIPSIS}") == 2


# -- release_lock --------------------------------------------------------------------------------


def test_a_lock_is_taken_from_its_holder_and_the_token_grows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lease = lock("x", note="stuck", renew=False).acquire()
    status, said = release("x", "--yes")
    assert status == 0
    assert re.match(rf"The lock 'x' is held by MainThread of process {os.getpid()} on ", said)
    assert ", stuck, since 20" in said
    assert f", token {lease.token}." in said
    assert [record.levelname for record in caplog.records if "force_released" in record.msg] == [
        "WARNING"
    ]
    raised = re.search(r"is free\. Its token is (\d+) now", said)
    assert raised
    assert int(raised[1]) > lease.token

    def next_token() -> int:
        with lock("x", wait=0) as taken:
            return taken.token

    assert in_thread(next_token) > int(raised[1])
    with pytest.raises(LockLost):
        lease.release()


def test_nobody_holds_it() -> None:
    assert release("x", "--yes") == (3, "Nobody holds the lock 'x'.\n")
    write("x", owner="dead", expires_at=-SECOND)
    assert release("x", "--yes")[0] == 3


def test_only_with_the_token_that_was_seen() -> None:
    with lock("x", renew=False) as lease:
        before = query(f"SELECT owner, fencing_token FROM {TABLE}")
        status, said = release("x", "--yes", "--token", str(lease.token - 1))
        assert status == 4
        assert f"its token is {lease.token}, not {lease.token - 1}." in said
        assert query(f"SELECT owner, fencing_token FROM {TABLE}") == before
        assert release("x", "--yes", "--token", str(lease.token))[0] == 0
        with pytest.raises(LockLost):
            lease.release()


def test_a_holder_who_came_meanwhile_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    write("x", owner="first", expires_at=MINUTE, fencing_token=5)
    backend = backend_for(connection)
    real = backend.force_release

    def late(*given: Any, **more: Any) -> Any:
        write_again = f"UPDATE {TABLE} SET owner = 'second', fencing_token = 6 WHERE name = 'x'"
        execute(write_again)
        return real(*given, **more)

    monkeypatch.setattr(backend, "force_release", late)
    status, said = release("x", "--yes")
    assert (status, "its holder has changed" in said) == (4, True)
    assert query(f"SELECT owner, fencing_token FROM {TABLE}") == [("second", 6)]


def test_a_holder_who_is_done_meanwhile_leaves_what_min_hold_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lease = lock("x", min_hold=60).acquire()
    token = str(lease.token)
    monkeypatch.setattr(Command, "_confirm", lambda *given: lease.release())
    status, said = release("x", "--token", token)
    assert (status, "its holder has changed or is done" in said) == (4, True)
    assert query(f"SELECT owner, fencing_token FROM {TABLE}") == [("", int(token))]
    monkeypatch.undo()
    assert release("x", "--yes", "--token", token)[0] == 0  # who is asked about that takes it


@servers
def test_a_row_in_a_running_transaction_is_not_waited_for() -> None:
    write("x", owner="me", expires_at=MINUTE)
    with pinned("x"):
        status, said = release("x", "--yes")
    assert (status, said.splitlines()[-1]) == (
        5,
        "The lock 'x' is in use by a running transaction.",
    )


def test_only_its_slot() -> None:
    for slot in (0, 1):
        write("x", slot=slot, owner="me", expires_at=MINUTE, fencing_token=5)
    assert release("x", "--slot", "1", "--yes")[0] == 0
    assert query(f"SELECT slot, owner FROM {TABLE} ORDER BY slot") == [(0, "me"), (1, "")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x" * 256], "name must have 1 to 255 characters"),
        ([""], "name must have 1 to 255 characters"),
        (["x", "--token", "-1"], "--token must be a whole number from 0"),
        (["x", "--slot", "one"], "--slot must be a whole number"),
    ],
)
def test_what_release_lock_refuses(arguments: list[str], said: str) -> None:
    with pytest.raises(CommandError, match=said):
        release(*arguments)


def test_without_a_terminal_it_wants_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("y\n"))
    with lock("x"), pytest.raises(CommandError, match="confirm with --yes"):
        release("x")


# -- on a terminal -------------------------------------------------------------------------------


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.said = ""
        variables = {**environ(), "TERM": "xterm"}
        command = [*MANAGE, *arguments]
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, variables)
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def until(self, pattern: str) -> str:
        """Read until that was said. Return what is new."""
        before = len(self.said)
        deadline = time.monotonic() + LIMIT
        while not re.search(pattern, self.said[before:]):
            assert self._read(deadline - time.monotonic()), f"not said: {pattern!r}\n{self.said}"
        return self.said[before:]

    def status(self) -> int:
        """Read to the end, and return the exit status."""
        deadline = time.monotonic() + LIMIT
        while self._read(deadline - time.monotonic()):
            pass
        os.close(self._end)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self, limit: float) -> bool:
        ready, _, _ = select.select([self._end], [], [], max(0.0, limit))
        assert ready, f"it hangs\n{self.said}"
        try:
            given = os.read(self._end, 4096)
        except OSError:  # how Linux tells that the other end is closed
            return False
        self.said += given.decode(errors="replace")
        return bool(given)


@servers
def test_watch_shows_what_changes_until_control_c() -> None:
    write("first", owner="me", expires_at=MINUTE)
    watching = Terminal("locks", "--held", "--watch", "0.2")
    watching.until(r"first +held")
    write("second", owner="me", expires_at=MINUTE)
    assert "\x1b[H" in watching.until(r"second +held")
    with hidden():
        watching.until(r"run `manage.py migrate")
    watching.until(r"second +held")
    watching.type("\x03")
    assert watching.status() == 0
    assert watching.said.startswith("\x1b[?1049h\x1b[?25l")
    assert watching.said.endswith("\x1b[?25h\x1b[?1049l")
    assert "Traceback" not in watching.said


@servers
@pytest.mark.parametrize(
    ("answer", "status", "owner"), [("y", 0, ""), ("", 6, "me"), ("n", 6, "me")]
)
def test_it_asks_on_a_terminal(answer: str, status: int, owner: str) -> None:
    write("x", owner="me", expires_at=MINUTE, host="web-1", pid=7, thread="T")
    asked = Terminal("release_lock", "x")
    assert "held by T of process 7 on web-1" in asked.until(r"\[y/N\]")
    asked.type(f"{answer}\n")
    assert asked.status() == status
    assert query(f"SELECT owner FROM {TABLE}") == [(owner,)]


@servers
def test_long_work_has_a_bar_on_a_terminal_and_short_work_none() -> None:
    from distlock.management.commands import purge_locks

    assert purge_locks.BATCH >= 100
    for number in range(40):
        write(f"n{number}", expires_at=-DAY)
    with blocked():
        long = Terminal("purge_locks", "--older-than=0", "--batch-size=10")
        assert long.status() == 0
    assert re.search(r"\d+%\|.*\d+ locks", long.said), long.said
    assert "Deleted 40 locks" in long.said
    write("n", expires_at=-DAY)
    write("m", expires_at=-DAY)
    short = Terminal("purge_locks", "--older-than=0")
    assert short.status() == 0
    assert "%|" not in short.said


@contextmanager
def blocked() -> Iterator[None]:
    """Let each batch of a purge take half a second."""
    if connection.vendor == "postgresql":
        execute(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END'"
        )
        execute(f"CREATE TRIGGER slow AFTER DELETE ON {TABLE} EXECUTE FUNCTION slow()")
        gone = [f"DROP TRIGGER slow ON {TABLE}", "DROP FUNCTION slow"]
    else:
        execute(
            f"CREATE TRIGGER slow BEFORE DELETE ON {TABLE} FOR EACH ROW SET @slept = SLEEP(0.05)"
        )
        gone = ["DROP TRIGGER slow"]
    try:
        yield
    finally:
        for sql in gone:
            execute(sql)


@pytest.mark.vendor("sqlite")
def test_the_bar_is_not_for_pipes_and_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from distlock.management import progress

    every = DistributedLock.objects.all()
    write("a")
    write("b")

    def bars(*, terminal: bool, quiet: bool = False) -> bool:
        monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
        with progress.progress(every, "locks", quiet=quiet) as tell:
            tell(1, 1)
            return "tell" in getattr(tell, "__name__", "")

    assert bars(terminal=True)
    assert not bars(terminal=False)
    assert not bars(terminal=True, quiet=True)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert not bars(terminal=True)


def test_in_another_thread_it_is_the_same_list() -> None:
    write("x")
    assert in_thread(told) == ["x"]
