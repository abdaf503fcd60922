"""The pages of the list: each begins behind the last row of the one before."""

from __future__ import annotations

import html
import json
import re
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import quote

import pytest
from django.contrib.messages import get_messages
from django.db import connection
from django.test import Client

from distlock.admin import DistributedLockAdmin, confirming, paging
from distlock.backends import backend_for
from distlock.backends.base import TABLE
from tests.conformance.rows import execute, write
from tests.test_admin import LIST, browser, hold, primary, table

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def client() -> Client:
    """A browser of somebody who may see the locks."""
    return browser("view_distributedlock", "force_release")


def walk(client: Client, relation: str, query: str = "") -> list[str]:
    """The names in the list from page to page, by the links of that relation."""
    found: list[str] = []
    for _ in range(20):
        found += table(client, query)
        body = client.get(LIST + query).content.decode()
        link = re.search(rf'href="(\?[^"]*)" rel="{relation}"', body)
        if link is None:
            return found
        query = html.unescape(link[1])
    raise AssertionError("it does not end")


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedLockAdmin, "list_per_page", 3)


@pytest.fixture
def eleven(small_pages: None) -> list[str]:
    """Eleven locks on four pages, some of one name."""
    for name in ("a", "b", "d", "é", "\N{SNOWMAN}'\"&", "\U0001f512"):
        hold(name)
    for slot in range(5):
        write("c", slot, host="")
    names = sorted(["a", "b", "d", "é", "\N{SNOWMAN}'\"&", "\U0001f512"])
    return [*names[:2], "c", "c [1]", "c [2]", "c [3]", "c [4]", *names[2:]]


def test_the_pages_follow_each_other_without_gaps(client: Client, eleven: list[str]) -> None:
    assert walk(client, "next") == eleven
    assert walk(client, "next", "?o=-1") == eleven[::-1]
    last = json.dumps(["\U0010fffd", 0])
    pages = walk(client, "prev", f"?before={quote(last)}")
    assert [pages[at : at + 3] for at in range(0, 9, 3)] == [
        eleven[8:11],
        eleven[5:8],
        eleven[2:5],
    ]
    assert pages[9:] == eleven[:2]


def test_a_page_keeps_search_and_filter(client: Client, eleven: list[str]) -> None:
    assert walk(client, "next", "?q=c") == eleven[2:7]
    assert walk(client, "next", "?state=free&q=c") == eleven[2:7]
    held = [name for name in eleven if not name.startswith("c")]
    assert walk(client, "next", "?state=held") == held
    after = quote(json.dumps(["c", 1]))
    body = client.get(f"{LIST}?after={after}").content.decode()
    assert 'href="?state=held"' in body  # a filter begins at the first page again
    assert "after" not in re.findall(r'<input type="hidden" name="(\w+)"', body)


def test_a_row_that_goes_meanwhile_shifts_nothing(client: Client, eleven: list[str]) -> None:
    body = client.get(LIST).content.decode()
    link = html.unescape(re.findall(r'href="(\?[^"]*)" rel="next"', body)[0])
    execute(f"DELETE FROM {TABLE} WHERE name IN ('a', 'c') AND slot = 0")
    hold("a0")
    assert list(table(client, link)) == eleven[3:6]


@pytest.mark.usefixtures("eleven")
def test_in_any_other_order_the_pages_are_numbered(client: Client) -> None:
    assert len(walk(client, "next", "?o=3")) == 11
    assert len(set(walk(client, "next", "?o=-4.1"))) == 11
    assert len(table(client, "?o=3&p=4")) == 2
    for number in (0, -1, 1001, 10**20):
        assert client.get(f"{LIST}?o=3&p={number}").status_code == 302


@pytest.mark.parametrize(
    "cursor",
    [
        *("", "x", "7", "null", "[]", '["a"]', '["a", 0, 1]', "[1, 0]", "[" * 20_000),
        *('["a", "0"]', '["a", true]', '["a", -1]', f'["a", {2**63}]'),
        *('["a\\u0000", 0]', '["\\ud800", 0]'),
    ],
)
def test_an_address_that_is_made_up_leads_to_the_first_page(client: Client, cursor: str) -> None:
    response = client.get(LIST, {"after": cursor})
    assert (response.status_code, response["Location"]) == (302, f"{LIST}?e=1")
    assert client.get(response["Location"]).status_code == 200


# -- what may read the whole table -------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "stopped"),
    [
        ("", False),
        ("?o=-1", False),
        ("?q=n", False),
        (f"?after={quote(json.dumps(['m', 0]))}", False),
        ("?q=n&in=all", True),
        ("?state=held", True),
        ("?host=web-1", True),
        ("?note__contains=x", True),
        ("?o=3", True),
    ],
)
def test_what_may_read_the_table_is_stopped_in_time(
    client: Client, monkeypatch: pytest.MonkeyPatch, query: str, stopped: bool
) -> None:
    backend, limits = backend_for(connection), []
    real = backend.patient

    def patient(on: Any, seconds: float) -> AbstractContextManager[None]:
        limits.append(seconds)
        return real(on, seconds)

    monkeypatch.setattr(backend, "patient", patient)
    hold(host="web-1", note="x")
    assert list(table(client, query)) == ["n"]
    assert limits == ([paging.PATIENCE] if stopped else [])


@pytest.mark.vendor("postgresql")
@pytest.mark.parametrize("atomic", [False, True])
def test_an_action_on_all_that_a_filter_finds_is_stopped_too(
    client: Client, monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", atomic)
    for module in (paging, confirming):
        monkeypatch.setattr(module, "PATIENCE", 0.2)
    hold(note="x")
    real = DistributedLockAdmin.get_queryset

    def slow(self: Any, request: Any) -> Any:
        return real(self, request).extra(where=["pg_sleep(20) IS NOT NULL"])

    monkeypatch.setattr(DistributedLockAdmin, "get_queryset", slow)
    post = {"action": "force_release", "_selected_action": [primary()], "select_across": "1"}
    response = client.post(f"{LIST}?note__contains=x", post)
    assert response.status_code == 302
    said = [str(message) for message in get_messages(response.wsgi_request)]
    assert said == [str(confirming.OVERDUE)]
