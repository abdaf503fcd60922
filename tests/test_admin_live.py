"""What the script asks for every few seconds, and what is known of who waits."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from distlock.admin import DistributedLockAdmin
from distlock.backends import backend_for, tickets
from tests.conformance.rows import MINUTE, SECOND, write
from tests.test_admin import HOUR, LIST, browser, hold, primary, seed, table, text

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def client() -> Client:
    """A browser of somebody who may see the locks."""
    return browser("view_distributedlock", "force_release")


def live(client: Client, *names: str, more: str = "") -> Any:
    keys = "&".join(f"pk={primary(name)}" for name in names)
    return client.get(f"{LIST}live/?{keys}{more}")


def test_it_says_what_has_changed_on_the_page_and_nothing_else(client: Client) -> None:
    seed()
    body = client.get(LIST).content.decode()
    assert re.findall(r'data-distlock-pk="(\d+)"', body) == [
        str(primary(name)) for name in ("a held", "b kept", "c expired", "d free", "e long")
    ]
    said = live(client, "a held", "d free")
    assert "no-store" in said["Cache-Control"]
    rows = said.json()["rows"]
    assert set(rows) == {str(primary("a held")), str(primary("d free"))}
    one = rows[str(primary("a held"))]
    assert one["token"] == "7"
    assert set(one["cells"]) == set(DistributedLockAdmin.live_in_list)
    for column, cell in one["cells"].items():
        # The page says the same, but for the moment.
        without = re.sub(r">[^<]* (s|ms)<|width=\"[\d.]+\"", "", cell)
        assert without in re.sub(r">[^<]* (s|ms)<|width=\"[\d.]+\"", "", body), column
    assert abs(said.json()["now"] - backend_for(connection).clock(connection)) < 60 * SECOND


def test_it_is_cheap(client: Client) -> None:
    for number in range(50):
        hold(f"n{number}")
    names = [f"n{number}" for number in range(50)]
    keys = "&".join(f"pk={primary(name)}" for name in names)
    with CaptureQueriesContext(connection) as sent:
        assert len(client.get(f"{LIST}live/?{keys}").json()["rows"]) == 50
    assert len(sent) <= 7  # session, user, permissions, clock, rows, lines


def test_it_is_for_those_who_may_see_the_page() -> None:
    hold()
    assert live(Client(), "n").status_code == 302
    assert live(browser("force_release", "view_job"), "n").status_code == 403


@pytest.mark.parametrize("given", ["pk=x", "pk=-1", f"pk={10**19}", "&".join(["pk=1"] * 201)])
def test_it_takes_primary_keys_and_not_too_many(client: Client, given: str) -> None:
    assert client.get(f"{LIST}live/?{given}").status_code == 400


def test_what_it_shows_of_the_detail_view_is_there(client: Client) -> None:
    hold(ttl=2 * MINUTE)
    body = client.get(f"{LIST}{primary()}/change/").content.decode()
    cells = live(client, "n", more="&detail=1").json()["rows"][str(primary())]["cells"]
    assert set(cells) == set(DistributedLockAdmin.live_in_detail)
    for column in cells:
        assert f"field-{column}" in body


def test_a_plain_text_of_a_derived_class_is_escaped_as_in_the_page(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DistributedLockAdmin, "holder", lambda self, row: f"<b>{row.note}&</b>")
    hold(note="why")
    said = live(client, "n").json()["rows"][str(primary())]["cells"]["holder"]
    assert said == "&lt;b&gt;why&amp;&lt;/b&gt;"
    assert said in client.get(LIST).content.decode()


def test_what_a_derived_class_does_not_show_is_not_told(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold()
    shown = ("lock_and_token", "badge", "time_left")
    monkeypatch.setattr(DistributedLockAdmin, "get_list_display", lambda self, request: shown)
    assert set(live(client, "n").json()["rows"][str(primary())]["cells"]) == {"badge", "time_left"}
    fields = [(None, {"fields": ["lock", ("state_shown", "token")]})]
    monkeypatch.setattr(DistributedLockAdmin, "get_fieldsets", lambda self, request, obj: fields)
    one = live(client, "n", more="&detail=1").json()["rows"][str(primary())]
    assert set(one["cells"]) == {"state_shown"}


# -- who waits -------------------------------------------------------------------------


def test_who_waits_in_line_is_counted(client: Client) -> None:
    hold()
    hold("other")
    for number in range(3):
        tickets.draw(connection, "n", 0, f"w{number}", HOUR)
    tickets.draw(connection, "n", 0, "dead", 0)
    tickets.draw(connection, "n", 1, "of another slot", HOUR)
    assert table(client)["n"]["badge"] == "held 3 wait in line"
    assert "Waiting: 3 wait in line" in text(client.get(f"{LIST}{primary()}/change/"))
    assert table(client)["other"]["badge"] == "held"


def test_whether_anybody_else_waits_is_said_as_far_as_it_is_known(
    client: Client, vendor: str
) -> None:
    hold()
    write(wanted_until=MINUTE)
    said = text(client.get(f"{LIST}{primary()}/change/"))
    if vendor != "postgresql":
        assert "Waiting: not known: this database notes only" in said
        assert table(client)["n"]["badge"] == "held"
        return
    assert "Waiting: somebody waits" in said
    assert table(client)["n"]["badge"] == "held somebody waits"
    write(wanted_until=-SECOND)
    assert "Waiting: nobody" in text(client.get(f"{LIST}{primary()}/change/"))
    write(wanted_until=MINUTE, expires_at=-SECOND)
    assert table(client)["n"]["badge"] == "expired"
