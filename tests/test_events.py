"""Log records: each has a stable event and fields, of which docs/monitoring.md has the list."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.db import OperationalError
from pythonjsonlogger.json import JsonFormatter

import distlock
from distlock import LockBusy, lock
from distlock.events import log
from tests.support import eventually, in_thread

PACKAGE = Path(distlock.__file__).parent
PAGE = PACKAGE.parent / "docs" / "monitoring.md"
NOT_A_FIELD = {"exc_info"}
sqlite = pytest.mark.vendor("sqlite")


def calls() -> Iterator[tuple[str, str, str, set[str]]]:
    """Each call of `log`: where it is, the level, the event, the fields."""
    for path in sorted(PACKAGE.rglob("*.py")):
        functions = ast.walk(ast.parse(path.read_text()))
        for function in (node for node in functions if isinstance(node, ast.FunctionDef)):
            texts = {}
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                    texts |= {ast.unparse(target): node.value for target in node.targets}
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "log":
                    level, text = node.args
                    where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                    if function.name == "_complain":  # whose callers pass the text
                        continue
                    constant = text if isinstance(text, ast.Constant) else texts[ast.unparse(text)]
                    fields = [str(keyword.arg) for keyword in node.keywords]
                    assert isinstance(constant.value, str), where
                    yield (
                        where,
                        ast.unparse(level).removeprefix("logging.").lower(),
                        constant.value,
                        set(fields) - NOT_A_FIELD,
                    )


def documented() -> dict[str, tuple[set[str], set[str]]]:
    """By event: its levels and its fields."""
    rows = re.findall(r"^\| `(\w+)` \| ([a-z, ]+) \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    return {
        event: (set(levels.split(", ")), set(re.findall(r"`(\w+)`", fields)))
        for event, levels, fields in rows
    }


@sqlite
def test_the_page_has_every_event_with_its_levels_and_fields() -> None:
    levels, fields, told = defaultdict(set), defaultdict(set), documented()
    for where, level, text, named in calls():
        event = re.match(r"[a-z]+(_[a-z]+)+(?=[ :])|locks_disabled", text)
        assert event, f"{where}: a text begins with the name of the event, not {text!r}"
        assert len(re.findall(r"(?<!%)%(?!%)", text)) == len(named), where
        levels[event[0]].add(level)
        fields[event[0]] |= named
        assert named == told.get(event[0], ("", set()))[1], f"{where}: each record has all fields"
    for event in ("group_failed", "too_many_groups"):  # by `_complain` in groups.py
        levels[event], fields[event] = {"warning"}, {"group"}
    assert told == {event: (levels[event], fields[event]) for event in levels}


@sqlite
def test_nobody_logs_in_another_way() -> None:
    for path in PACKAGE.rglob("*.py"):
        name = str(path.relative_to(PACKAGE))
        if name != "events.py":
            assert "getLogger" not in path.read_text(), name


@sqlite
def test_no_field_is_called_as_something_else_of_a_record_is() -> None:
    record = logging.makeLogRecord({"message": "", "asctime": ""})
    for where, _, _, fields in calls():
        assert not fields & (vars(record).keys() | {"event"}), where


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What a JSON formatter writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("%(levelname)s %(funcName)s %(message)s"))
    logger = logging.getLogger("distlock")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield stream
    logger.setLevel(before)
    logger.removeHandler(handler)


def written(stream: io.StringIO, about: str) -> list[dict[str, object]]:
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [line for line in found if line.get("lock") == about]


@pytest.mark.django_db(transaction=True)
def test_a_json_formatter_has_the_fields_and_the_text_is_as_ever(lines: io.StringIO) -> None:
    with lock("logged") as lease:
        assert in_thread(lambda: lock("logged").try_acquire()) is None
        with pytest.raises(LockBusy) as busy:
            in_thread(lock("logged", wait=0).acquire)
    acquired, tried, gave_up, released = written(lines, "logged")
    assert acquired["event"] == "lock_acquired"
    assert acquired["token"] == lease.token
    assert acquired["message"] == f"lock_acquired name='logged' token={lease.token} waited=0.000"
    assert (tried["event"], tried["holder"], tried["levelname"]) == ("lock_busy", None, "INFO")
    assert str(tried["message"]).endswith(" holder=-")
    assert gave_up["holder"] == str(busy.value.holder)
    assert released["event"] == "lock_released"
    assert 0 <= float(str(released["held"])) < 60


@pytest.mark.django_db(transaction=True)
def test_a_dropped_lease_is_told(lines: io.StringIO) -> None:
    with pytest.warns(ResourceWarning, match="dropped"):
        lock("dropped", ttl=0.9).acquire()
    assert eventually(lambda: len(written(lines, "dropped")) > 1, within=30)
    _, told = written(lines, "dropped")
    assert (told["event"], told["levelname"]) == ("lock_dropped", "WARNING")


@sqlite
def test_fields_are_plain_whatever_they_were(lines: io.StringIO) -> None:
    log(
        logging.WARNING, "some_event: %s %s %s", error=OperationalError("gone"), no=None, it=[1, {}]
    )
    (line,) = map(json.loads, lines.getvalue().splitlines())
    assert line["message"] == "some_event: gone - [1, {}]"
    assert line["funcName"] == "test_fields_are_plain_whatever_they_were"
    assert (line["event"], line["error"], line["no"]) == ("some_event", "gone", None)
    assert line["it"] == [1, "{}"]
