"""The group of a name: what it is, and that there are never too many."""

from __future__ import annotations

import logging
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings

from distlock import groups
from distlock.groups import MOST, default_group, group_of
from tests.support import LIMIT

pytestmark = pytest.mark.vendor("sqlite")

PAGE = Path(__file__).parent.parent / "docs" / "monitoring.md"


@pytest.fixture(autouse=True)
def no_groups_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(groups, "_known", set())
    monkeypatch.setattr(groups, "_complained", set())
    return


def of_first_word(name: str) -> str:
    return name.split()[0]


def fails(name: str) -> Any:
    return LIMIT if name == "number" else {}[name]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("invoice:42", "invoice"),
        ("invoice:42:send", "invoice"),
        ("invoice-42:send", "invoice"),
        ("invoice42", "invoice"),
        ("Rechnung Nr. 7", "Rechnung"),
        ("acme/invoice/42", "acme"),
        ("/invoice/42", "invoice"),
        ("profile jane", "profile"),
        ("jane.doe@example.com", "jane.doe"),
        ("once:charge/jane:x", "once:charge"),
        ("nightly-report", "nightly-report"),
        ("hourly-report@2026-11-21T17:00:00Z", "hourly-report"),
        ('proj.tasks.add:{"x":1}', "proj.tasks.add"),
        ("once:charge:42", "once:charge"),
        ("once:enqueue:proj.add:{}", "once:enqueue:proj.add"),
        ("once", "once"),
        ("once:", "once"),
        ("once:42", "once"),
        ("größe:1", "größe"),
        ("42:invoice", "other"),
        ("42", "other"),
        (":", "other"),
        ("6f9619ff-8b86-d011-b42d-00cf4fc964ff:invoice", "other"),
        ("abcdefab-abcd-abcd-abcd-abcdefabcdef", "other"),
        ("d41d8cd98f00b204e9800998ecf8427e", "other"),
        ("session-d41d8cd98f00b204", "session"),
        ("x" * 255, "x" * 64),
    ],
)
def test_a_group_is_the_first_part_of_a_name_without_ids(name: str, group: str) -> None:
    assert group_of(name) == group


def test_ids_at_the_front_make_no_groups() -> None:
    random.seed(1)
    names = [str(uuid.UUID(int=random.getrandbits(128))) for _ in range(2000)]
    names += [f"{random.getrandbits(64):x}:x" for _ in range(2000)]
    names += [f"{number}:x" for number in range(2000)]
    assert len({default_group(name) for name in names}) <= 3  # one in thousands has no digit


def test_there_are_never_more_than_so_many_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ["".join(random.choices("ghijklmnop", k=12)) for _ in range(3 * MOST)]
    found = [group_of(word) for word in words]
    assert found[:MOST] == words[:MOST]
    assert set(found[MOST:]) == {"other"}
    assert [group_of(word) for word in words] == found
    (said,) = caplog.records
    assert said.getMessage().startswith(f"too_many_groups group='{words[MOST]}'")
    assert said.levelno == logging.WARNING


@pytest.mark.parametrize("function", [of_first_word, "tests.test_groups.of_first_word"])
def test_the_setting_names_another_function(function: Any) -> None:
    with override_settings(DISTLOCK={"GROUP": function}):
        assert group_of("42 invoice") == "42"


def test_a_function_that_fails_costs_its_group_only(caplog: pytest.LogCaptureFixture) -> None:
    with override_settings(DISTLOCK={"GROUP": fails}):
        assert [group_of("x"), group_of("number"), group_of("x")] == ["other"] * 3
    assert [record.getMessage().split()[0] for record in caplog.records] == ["group_failed"] * 2


def test_the_page_tells_the_truth() -> None:
    section = PAGE.read_text().partition("\n### Groups\n")[2].partition("\nWhere your names")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if "`" in line]
    assert len(rows) == 5
    for names, group in rows:
        for name in names.partition(" (")[0].split(", "):
            assert group_of(name.strip("`")) == group.strip("`")
    assert f"at most {MOST} groups" in PAGE.read_text()
