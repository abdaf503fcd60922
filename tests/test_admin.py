"""The admin: what it shows, to whom, and the forced release."""

from __future__ import annotations

import html
import json
import logging
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.contrib.messages import get_messages
from django.db import connection, connections
from django.http import HttpResponse
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from distlock import LockLost, lock, once
from distlock.admin import DistributedLockAdmin
from distlock.backends import backend_for, tickets
from distlock.backends.base import TABLE
from distlock.contexts import caller
from distlock.models import DistributedLock, Job
from distlock.states import duration, microseconds
from tests.conformance.rows import (
    FAR,
    MINUTE,
    SECOND,
    execute,
    pinned,
    stored,
    take,
    within,
    write,
)
from tests.support import eventually, is_free

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")

LIST = "/admin/distlock/distributedlock/"
HOUR = 60 * MINUTE


def user(*permissions: str, superuser: bool = False) -> Any:
    """A user of the admin with these permissions."""
    made = get_user_model().objects.create(
        username="ann<script>", is_staff=True, is_superuser=superuser
    )
    made.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    assert made.user_permissions.count() == len(permissions)
    return made


def browser(*permissions: str, superuser: bool = False) -> Client:
    client = Client()
    client.force_login(user(*permissions, superuser=superuser))
    return client


@pytest.fixture
def client() -> Client:
    """A browser of somebody who may see the locks and release them."""
    return browser("view_distributedlock", "force_release")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, "distlock"):
        yield caplog


def hold(name: str = "n", **columns: Any) -> None:
    """A row that somebody holds."""
    given = {"owner": "me", "acquired_at": -SECOND, "expires_at": MINUTE, "fencing_token": 7}
    write(name, **{**given, **columns})


def seed() -> None:
    """One lock in each state."""
    hold("a held", host="web-1", pid=4711, thread="shop.tasks.sync[1]", note="month end")
    hold("b kept", owner="", ttl=MINUTE, host="web-2", pid=4712, thread="MainThread")
    hold("c expired", expires_at=-2 * HOUR, acquired_at=-3 * HOUR, host="web-3", pid=4713)
    hold("d free", owner="", expires_at=-HOUR, host="web-4", pid=4714)
    hold("e long", acquired_at=-2 * HOUR, host="web-5", pid=4715)


def text(response: HttpResponse) -> str:
    """What a person reads, without markup."""
    assert response.status_code == 200, response.status_code
    shown = re.sub(r"(?s)<(style|script)\b.*?</\1>", " ", response.content.decode())
    shown = re.sub(r'<span class="distlock-label.*?</span>', " ", shown)  # on narrow pages only
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", shown)).split())


def table(client: Client, query: str = "") -> dict[str, dict[str, str]]:
    """The list: the cells of each row by column, by the name of the lock."""
    found = client.get(LIST + query)
    assert found.status_code == 200, found.status_code
    body = re.sub(r'<span class="distlock-label.*?</span>', " ", found.content.decode())
    rows = re.findall(r"(?s)<tr>(<td.*?)</tr>", body)
    cells = [
        {
            column: " ".join(html.unescape(re.sub(r"<[^>]*>", " ", cell)).split())
            for column, cell in re.findall(r'(?s)<t[dh] class="field-(\w+)[^>]*>(.*?)</t[dh]>', row)
        }
        for row in rows
    ]
    return {re.sub(r" \d+$", "", row["lock_and_token"]): row for row in cells}


def chosen(name: str = "n", token: int = 7, slot: int = 0, owner: str | None = None) -> str:
    """What is confirmed of a lock: by default, of its owner at this time."""
    if owner is None:
        found = DistributedLock.objects.filter(name=name, slot=slot).first()
        owner = found.owner if found else "me"
    return json.dumps([name, slot, token, owner])


def primary(name: str = "n") -> int:
    return DistributedLock.objects.get(name=name).pk


def ask(client: Client, *names: str, **more: Any) -> HttpResponse:
    """Choose the action for some locks."""
    post = {"action": "force_release", "_selected_action": [primary(name) for name in names]}
    return client.post(LIST, {**post, **more})


def confirm(client: Client, *locks: str) -> list[str]:
    """Confirm a forced release; what the user is told."""
    post = {"action": "force_release", "_selected_action": ["1"], "chosen": locks}
    response = client.post(LIST, post)
    assert response.status_code == 302, response.status_code
    return [str(message) for message in get_messages(response.wsgi_request)]


# -- the list --------------------------------------------------------------------------


@pytest.mark.usetz
def test_it_shows_state_holder_times_and_token(client: Client) -> None:
    seed()
    rows = table(client)
    assert [rows[name]["badge"] for name in sorted(rows)] == [
        "held",
        "kept",
        "expired",
        "free",
        "held",
    ]
    held = rows["a held"]
    assert held["lock_and_token"] == "a held 7"
    assert held["holder"] == "shop.tasks.sync[1] process 4711 on web-1 month end"
    assert re.match(r"[12]\.\d s \d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", held["held_since"])
    assert re.match(r"5\d s$", held["time_left"])
    assert rows["b kept"]["holder"] == "last: MainThread process 4712 on web-2"
    assert rows["b kept"]["held_since"] == "\N{EN DASH}"
    assert re.match(r"5\d s$", rows["b kept"]["time_left"])
    assert rows["c expired"]["holder"].endswith("process 4713 on web-3")
    assert rows["c expired"]["held_since"].startswith("3 h ")
    assert rows["c expired"]["time_left"].startswith("over for 2 h")
    assert rows["d free"]["holder"].startswith("last:")
    assert rows["d free"]["held_since"] == rows["d free"]["time_left"] == "\N{EN DASH}"
    assert rows["e long"]["held_since"].startswith("2 h")


def test_a_real_lock_is_shown_while_it_is_held(client: Client) -> None:
    token = caller.set("shop.tasks.sync[1]")
    with lock("x", note="why", ttl=90) as lease:
        row = table(client)["x"]
        assert row["badge"] == "held"
        assert row["lock_and_token"] == f"x {lease.token}"
        assert row["holder"].startswith("shop.tasks.sync[1] process")
        assert row["holder"].endswith("why")
        assert row["time_left"].startswith("1 min 2")
    caller.reset(token)
    assert table(client)["x"]["badge"] == "free"


def test_the_clock_is_the_databases_and_is_read_once(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed()
    backend, calls = backend_for(connection), []
    real = backend.clock
    monkeypatch.setattr(backend, "clock", lambda on: (calls.append(on), real(on) + HOUR)[1])
    rows = table(client, "?held_for=3600")
    assert rows == {}
    assert len(calls) == 1
    rows = table(client)
    assert rows["a held"]["badge"] == "expired"
    assert rows["a held"]["time_left"].startswith("over for 59 min")


def test_the_reserved_row_is_never_shown(client: Client) -> None:
    hold("old", expires_at=-HOUR, fencing_token=FAR)
    assert backend_for(connection).purge(connection, 0, 0, 10)
    mark = DistributedLock.objects.get(name="").pk
    assert table(client) == {}
    assert table(client, "?q=") == {}
    assert client.get(f"{LIST}{mark}/change/").status_code == 302
    assert client.get(f"{LIST}{mark}/history/").status_code == 302
    post = {"action": "force_release", "_selected_action": [mark]}
    assert client.post(LIST, post).status_code == 302


def test_it_can_be_searched_and_filtered(client: Client, vendor: str) -> None:
    seed()
    everything = ["a held", "b kept", "c expired", "d free", "e long"]
    for query, found in {
        "": everything,
        "?state=held": ["a held", "e long"],
        "?state=kept": ["b kept"],
        "?state=expired": ["c expired"],
        "?state=free": ["d free"],
        "?state=nonsense": [],
        "?held_for=60": ["e long"],
        "?held_for=86400": [],
        "?held_for=1": everything,
        "?q=b": ["b kept"],
        "?q=b+k": ["b kept"],
        "?q=kept": [],
        "?q=B": [],
        "?q=web-1": [],
        "?q=\U0010ffff": [],
        "?state=held&q=web-1&in=all": ["a held"],
        "?in=all": everything,
        "?q=kept&in=all": ["b kept"],
        "?q=web-3&in=all": ["c expired"],
        "?q=4714&in=all": ["d free"],
        "?q=sync&in=all": ["a held"],
        "?q=month&in=all": ["a held"],
        "?q=nobody&in=all": [],
    }.items():
        assert sorted(table(client, query)) == found, query
    if vendor != "mysql":  # there the exact collation makes LIKE exact, too
        assert list(table(client, "?q=KEPT&in=all")) == ["b kept"]


def test_it_can_be_ordered_by_each_column(client: Client) -> None:
    seed()
    for column in range(1, 8):
        assert len(table(client, f"?o={column}")) == len(table(client, f"?o=-{column}")) == 5


def test_the_order_is_that_of_the_key(client: Client) -> None:
    for name in ("b", "c", "a"):
        hold(name)
    execute(f"INSERT INTO {TABLE} (name, slot) VALUES ('a', 1)")
    assert list(table(client)) == ["a", "a [1]", "b", "c"]


def test_its_queries_do_not_grow_with_the_rows(client: Client) -> None:
    hold("first")
    client.get(LIST)
    with CaptureQueriesContext(connection) as few:
        client.get(LIST)
    for number in range(30):
        hold(f"n{number}")
    with CaptureQueriesContext(connection) as many:
        client.get(LIST)
    assert len(many) == len(few) <= 8
    assert sum("COUNT(" in query["sql"] for query in many) <= 1


def test_the_alias_is_that_of_the_settings(client: Client, log: Any) -> None:
    hold("here")
    execute(f"INSERT INTO {TABLE} (name) VALUES ('there')", on=connections["other"])
    with override_settings(DISTLOCK={"USING": "other"}):
        assert list(table(client)) == ["there"]
        found = DistributedLock.objects.using("other").get(name="there")
        assert "there" in text(client.get(f"{LIST}{found.pk}/change/"))
        held = take(backend_for(connection), "me", "mine", on=connections["other"])
        assert "taken from" in confirm(client, chosen("mine", held.token))[0]
        assert table(client)["mine"]["badge"] == "free"
    assert LogEntry.objects.get().object_repr == "mine"
    assert "lock_force_released name='mine'" in log.text


# -- one lock --------------------------------------------------------------------------


def test_the_detail_view_shows_everything(client: Client) -> None:
    with override_settings(USE_THOUSAND_SEPARATOR=True):
        hold(
            host="web-1",
            pid=47110,
            thread="sync[1]",
            note="month end",
            ttl=30 * SECOND,
            fencing_token=1795238896470000,
            acquisitions=7,
            waits=3,
            losses=2,
            total_hold=8 * SECOND,
            longest_hold=90 * SECOND,
            total_wait=7 * 1500,
            longest_wait=2 * HOUR,
        )
        shown = text(client.get(f"{LIST}{primary()}/change/"))
    for expected in (
        "Lock: n State: held Waiting: ",
        "Time left: 5",
        "Token: 1795238896470000 ",
        "Host: web-1 Process id: 47110 Thread or task: sync[1] Note: month end Held since: ",
        "Ttl: 30 s Owner: me",
        "Grants: 7 Grants that waited: 42 % waited Losses: 2 ",
        "Mean time held: 2.0 s Longest time held: 1 min 30 s",  # 8 s in 7 - 2 - the one that is on
        "Mean wait: 1.5 ms Longest wait: 2 h",
    ):
        assert expected in shown


def test_a_lock_that_was_never_released_has_no_mean(client: Client) -> None:
    hold(acquisitions=1)
    assert "Mean time held: \N{EN DASH}" in text(client.get(f"{LIST}{primary()}/change/"))
    execute(f"INSERT INTO {TABLE} (name) VALUES ('bare')")
    shown = text(client.get(f"{LIST}{primary('bare')}/change/"))
    assert "Mean wait: \N{EN DASH}" in shown
    assert table(client)["bare"]["holder"] == "\N{EN DASH}"


def test_durations_are_readable() -> None:
    for seconds, shown in {
        -1: "0 ms",
        0: "0 ms",
        0.000_25: "0.25 ms",
        0.0123: "12.3 ms",
        0.9994: "999 ms",
        0.9996: "999 ms",
        1: "1.0 s",
        9.94: "9.9 s",
        9.96: "9.9 s",
        59.9: "59 s",
        60: "1 min",
        90: "1 min 30 s",
        3599: "59 min 59 s",
        3600: "1 h",
        3601: "1 h",
        2 * 86400 + 3 * 3600 + 59: "2 d 3 h",
        400 * 86400: "400 d",
    }.items():
        assert duration(round(seconds * 1_000_000)) == shown


def test_a_name_that_looks_like_another_is_shown_as_a_literal(client: Client) -> None:
    for name in (" x", "x ", "a  b", "a\nb", "a\tb", "\u202eabc", "\u200b"):
        hold(name)
        assert f'title="{html.escape(repr(name))}"' in client.get(LIST).content.decode()


def test_every_text_is_escaped(client: Client) -> None:
    evil = "<b onclick='x'>&\"</b>"
    columns = {"host": evil, "thread": evil, "note": evil}
    hold(evil, **columns)
    pages = [
        client.get(LIST),
        client.get(f"{LIST}{primary(evil)}/change/"),
        ask(client, evil),
    ]
    confirm(client, chosen(evil))
    pages += [client.get(LIST), client.get(f"{LIST}{primary(evil)}/history/")]
    for page in pages:
        assert page.status_code == 200
        assert b"<b onclick" not in page.content
        assert b"<script>'" not in page.content
        assert b"&lt;b onclick" in page.content


# -- permissions -----------------------------------------------------------------------


def test_nothing_can_be_added_changed_or_deleted() -> None:
    client = browser(superuser=True)
    hold()
    one = f"{LIST}{primary()}/"
    assert client.get(f"{LIST}add/").status_code == 403
    assert client.post(f"{LIST}add/", {"name": "m"}).status_code == 403
    assert client.get(f"{one}delete/").status_code == 403
    assert client.post(f"{one}delete/", {"post": "yes"}).status_code == 403
    assert client.post(f"{one}change/", {"name": "m"}).status_code == 403
    page = client.get(f"{one}change/").content
    assert b'name="_save"' not in page
    assert b"delete_selected" not in client.get(LIST).content


def test_who_may_only_look_cannot_release() -> None:
    client = browser("view_distributedlock")
    hold()
    assert b"force_release" not in client.get(LIST).content
    assert b"force_release" not in client.get(f"{LIST}{primary()}/change/").content
    before = stored()
    ask(client, "n")
    ask(client, "n", chosen=[chosen()])
    assert stored() == before
    assert not LogEntry.objects.exists()


@pytest.mark.parametrize("permissions", [(), ("force_release",)])
def test_who_may_not_look_sees_nothing(permissions: tuple[str, ...]) -> None:
    client = browser(*permissions)
    hold()
    for page in (LIST, f"{LIST}{primary()}/change/", f"{LIST}{primary()}/history/"):
        assert client.get(page).status_code == 403
    before = stored()
    assert ask(client, "n", chosen=[chosen()]).status_code == 403
    assert stored() == before


# -- force-release ---------------------------------------------------------------------


def test_it_asks_first_and_shows_this_holder_and_token(client: Client) -> None:
    seed()
    before = stored("a held")
    page = ask(client, "a held", "c expired", "d free")
    shown = text(page)
    assert "a held shop.tasks.sync[1] process 4711 on web-1 month end" in shown
    assert " 7 " in shown
    assert "2 more selected locks are not held" in shown
    assert "c expired" not in shown
    assert stored("a held") == before
    fields = dict(re.findall(r'type="hidden" name="(\w+)" value="(.*?)"', page.content.decode()))
    assert json.loads(html.unescape(fields["chosen"])) == ["a held", 0, 7, "me"]


def test_confirmed_it_takes_the_lock_and_leaves_traces(client: Client, log: Any) -> None:
    lease = lock("x", note="why", renew=False).acquire()
    said = confirm(client, chosen("x", lease.token))
    assert len(said) == 1
    assert re.match(r"The lock 'x' was taken from .* of process \d+ on ", said[0])
    row = stored("x")
    assert row.owner == ""
    assert row.fencing_token > lease.token
    assert row.losses == 1
    assert is_free("x")
    with pytest.raises(LockLost):
        lease.release()
    entry = LogEntry.objects.get()
    assert (entry.object_repr, entry.user.username) == ("x", "ann<script>")
    assert f"Force-released: token {lease.token}" in entry.get_change_message()
    line = f"lock_force_released name='x' token={lease.token} by='ann<script>' holder="
    assert [record.levelname for record in log.records if line in record.getMessage()] == [
        "WARNING"
    ]
    assert "Force-released: token" in text(client.get(f"{LIST}{primary('x')}/history/"))


def test_a_lock_that_only_min_hold_keeps_can_be_freed(client: Client, log: Any) -> None:
    lock("x", min_hold=60).acquire().release()
    kept = stored("x")
    assert "Force-release…" in text(client.get(f"{LIST}{primary('x')}/change/"))
    assert "x last: MainThread" in text(ask(client, "x"))
    said = confirm(client, chosen("x", kept.fencing_token))
    assert len(said) == 1
    assert re.match(r"The lock 'x' is free: min_hold kept it after MainThread of process", said[0])
    assert stored("x").fencing_token > kept.fencing_token
    assert stored("x").losses == 0
    assert is_free("x")
    assert "lock_force_released name='x'" in log.text
    assert LogEntry.objects.get().object_repr == "x"


def test_a_released_lock_is_free_though_the_clock_was_set_back(client: Client) -> None:
    lock("x").acquire().release()
    write("x", acquired_at=HOUR, expires_at=HOUR)
    shown = table(client)["x"]
    assert (shown["badge"], shown["time_left"]) == ("free", "\N{EN DASH}")
    assert is_free("x")


def test_the_button_of_the_detail_view_leads_to_the_question(client: Client) -> None:
    hold()
    page = client.get(f"{LIST}{primary()}/change/").content.decode()
    action, inner = re.findall(r'(?s)<form method="post" action="(.*?)">(.*?)</form>', page)[-1]
    fields = dict(re.findall(r'name="(\w+)" value="(.*?)"', inner))
    assert action == reverse("admin:distlock_distributedlock_changelist")
    assert "Take these locks" in text(client.post(action, fields))
    write(expires_at=-SECOND)
    assert b"force_release" not in client.get(f"{LIST}{primary()}/change/").content


def test_a_holder_that_has_changed_is_left_alone(client: Client, log: Any) -> None:
    hold()
    ask(client, "n")
    hold(owner="you", fencing_token=8)
    before = stored()
    said = confirm(client, chosen())
    assert said == ["The lock 'n' was left alone: its holder has changed or is done."]
    assert stored() == before
    assert not LogEntry.objects.exists()
    assert log.text == ""


def test_a_holder_that_is_done_is_left_alone(client: Client) -> None:
    for meanwhile in ({"owner": "", "expires_at": -SECOND}, {"expires_at": -SECOND}, {"owner": ""}):
        hold(**meanwhile)
        before = stored()
        assert "left alone" in confirm(client, chosen(owner="me"))[-1]
        assert stored() == before


def test_a_holder_that_is_done_meanwhile_leaves_what_min_hold_keeps(client: Client) -> None:
    lease = lock("nightly", min_hold=60).acquire()
    page = ask(client, "nightly").content.decode()
    posted = [html.unescape(each) for each in re.findall(r'name="chosen" value="(.*?)"', page)]
    lease.release()
    kept = stored("nightly")
    assert (kept.owner, kept.fencing_token) == ("", lease.token)
    said = confirm(client, *posted)
    assert said == ["The lock 'nightly' was left alone: its holder has changed or is done."]
    assert stored("nightly") == kept
    assert not is_free("nightly")  # the job does not run twice


def test_a_lock_that_was_purged_meanwhile_is_left_alone(client: Client) -> None:
    assert "left alone" in confirm(client, chosen("gone"))[0]


@servers
def test_a_pinned_lock_is_left_alone_and_the_others_are_not(client: Client, log: Any) -> None:
    for name in ("a", "b", "c"):
        hold(name)
    before = stored("b")
    with pinned("b"), within(5):
        said = confirm(client, chosen("a"), chosen("b"), chosen("c"))
    told = sorted(said)
    assert [message[:12] for message in told] == ["The lock 'a'", "The lock 'b'", "The lock 'c'"]
    assert "in use by a running transaction" in told[1]
    assert stored("b") == before
    assert stored("a").owner == stored("c").owner == ""
    assert LogEntry.objects.count() == 2
    assert "name='b'" not in log.text


def test_nothing_that_is_held_nothing_to_ask(client: Client) -> None:
    seed()
    response = ask(client, "c expired", "d free")
    assert response.status_code == 302
    said = [str(message) for message in get_messages(response.wsgi_request)]
    assert said == ["None of the selected locks is held: there is nothing to release."]


def test_not_more_at_once_than_a_person_reads(client: Client) -> None:
    for number in range(101):
        hold(f"n{number}")
    response = ask(client, "n1", select_across="1")
    said = [str(message) for message in get_messages(response.wsgi_request)]
    assert said == ["Select at most 100 at a time."]


def test_not_more_at_once_than_was_asked_about(client: Client) -> None:
    hold()
    before = stored()
    assert ask(client, "n", chosen=[chosen()] * 101).status_code == 400
    assert stored() == before


def test_what_somebody_may_not_see_he_cannot_take(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold("mine")
    hold("theirs")
    before = stored("theirs")
    real = DistributedLockAdmin.get_queryset
    visible = lambda self, request: real(self, request).exclude(name="theirs")  # noqa: E731
    monkeypatch.setattr(DistributedLockAdmin, "get_queryset", visible)
    said = sorted(confirm(client, chosen("mine"), chosen("theirs")))
    assert "The lock 'mine' was taken" in said[0]
    assert "The lock 'theirs' was left alone" in said[1]
    assert stored("theirs") == before


def test_unusual_names_survive_the_question(client: Client) -> None:
    for name in ("a\nb", " x ", "\N{SNOWMAN}'\"", "n" * 255):
        hold(name)
        page = ask(client, name).content.decode()
        posted = re.findall(r'name="chosen" value="(.*?)"', page)
        assert "taken from" in confirm(client, *map(html.unescape, posted))[0]
        assert stored(name).owner == ""


def test_a_forged_confirmation_is_refused_whole(client: Client) -> None:
    hold()
    before = stored()
    for value in (
        "nonsense",
        "[]",
        "7",
        '["n", 0, 7]',
        '["n", 0, "7", "me"]',
        '["n", 0, -7, "me"]',
        '["n", 0, true, "me"]',
        '["", 0, 7, "me"]',
        '["a\\u0000b", 0, 7, "me"]',
        '["n", 0, 7, 8]',
        '["n", 0, 7, "a\\u0000b"]',
        f'["n", 0, {2**63}, "me"]',
    ):
        response = ask(client, "n", chosen=[chosen(), value])
        assert response.status_code == 400, value
        assert stored() == before


# -- transactions ----------------------------------------------------------------------


@pytest.fixture
def atomic_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)


@pytest.mark.usefixtures("atomic_requests")
def test_it_takes_effect_under_atomic_requests(client: Client, log: Any) -> None:
    for name in ("a", "b"):
        hold(name)
    said = confirm(client, chosen("a"), chosen("b"), chosen("gone"))
    assert sum("taken from" in message for message in said) == 2
    assert sum("left alone" in message for message in said) == 1
    assert stored("a").owner == stored("b").owner == ""
    assert LogEntry.objects.count() == 2
    assert log.text.count("lock_force_released") == 2


@servers
@pytest.mark.usefixtures("atomic_requests")
def test_a_pinned_lock_under_atomic_requests(client: Client) -> None:
    hold("a")
    hold("b")
    with pinned("a"), within(5):
        said = confirm(client, chosen("a"), chosen("b"))
    assert sum("in use by a running transaction" in message for message in said) == 1
    assert stored("a").owner == "me"
    assert stored("b").owner == ""


@pytest.mark.usefixtures("atomic_requests")
def test_a_request_that_fails_takes_nothing_and_claims_nothing(
    client: Client, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold()
    before = stored()
    real = DistributedLockAdmin.response_action

    def fail(self: Any, request: Any, queryset: Any) -> None:
        real(self, request, queryset)
        raise ZeroDivisionError

    monkeypatch.setattr(DistributedLockAdmin, "response_action", fail)
    client.raise_request_exception = False
    post = {"action": "force_release", "_selected_action": ["1"], "chosen": [chosen()]}
    response = client.post(LIST, post)
    assert response.status_code == 500
    assert not list(get_messages(response.wsgi_request))
    assert stored() == before
    assert not LogEntry.objects.exists()
    assert "lock_force_released" not in log.text


@pytest.mark.parametrize("of_the_log", [False, True])
@pytest.mark.parametrize("atomic", [False, True])
@servers
def test_what_the_database_says_of_one_lock_is_told_and_the_others_stand(
    client: Client, log: Any, monkeypatch: pytest.MonkeyPatch, atomic: bool, of_the_log: bool
) -> None:
    """Each on the alias of the settings, whose requests are no transactions."""
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", atomic)
    other, real = connections["other"], DistributedLockAdmin.log_change

    def fail(self: Any, request: Any, row: Any, message: Any) -> Any:
        if row.name == "b":
            execute("SELECT no_such_column", on=connection if of_the_log else other)
        return real(self, request, row, message)

    monkeypatch.setattr(DistributedLockAdmin, "log_change", fail)
    with override_settings(DISTLOCK={"USING": "other"}):
        backend = backend_for(connection)
        held = [take(backend, "me", name, on=other) for name in "abc"]
        said = confirm(client, *(chosen(each.name, each.token, owner="me") for each in held))
        states = {name: row["badge"] for name, row in table(client).items()}
    assert sum("was taken from" in message for message in said) == 2
    [refused] = [message for message in said if "could not be taken" in message]
    assert "no_such_column" in refused
    assert states == {"a": "free", "b": "held", "c": "free"}
    assert sorted(LogEntry.objects.values_list("object_repr", flat=True)) == ["a", "c"]
    assert "lock_not_released name='b'" in log.text


def test_without_its_audit_entry_it_does_not_happen(
    client: Client, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise ZeroDivisionError

    hold()
    before = stored()
    monkeypatch.setattr(DistributedLockAdmin, "log_change", fail)
    with pytest.raises(ZeroDivisionError):
        confirm(client, chosen())
    assert stored() == before
    assert "lock_force_released" not in log.text


# -- what comes from people is text ----------------------------------------------------

EVIL = "<script>alert('x')</script>\"&"


def test_every_page_escapes_every_text() -> None:
    client = browser(superuser=True)
    hold(EVIL, note=EVIL, host=EVIL, thread=EVIL, owner=EVIL[:64])
    tickets.draw(connection, EVIL, 0, EVIL, HOUR)
    once(EVIL).run(lambda: EVIL)
    Job.objects.update(task=EVIL, task_id=EVIL, arguments=EVIL)
    pk = primary(EVIL)
    confirm(client, chosen(EVIL, 7))
    hold(EVIL, note=EVIL, host=EVIL, thread=EVIL)
    jobs = "/admin/distlock/job/"
    row = primary(EVIL)
    pages = [
        client.get(LIST),
        client.get(f"{LIST}?q={quote(EVIL)}"),
        client.get(f"{LIST}{pk}/change/"),
        client.get(f"{LIST}{pk}/history/"),
        ask(client, EVIL),
        client.get(jobs),
        client.get(f"{jobs}{Job.objects.get().pk}/change/"),
        client.post(jobs, {"action": "rerun", "_selected_action": [Job.objects.get().pk]}),
        client.get(LIST),
    ]
    for page in pages:
        assert page.status_code == 200
        assert b"<script>alert" not in page.content
    assert sum(b"&lt;script&gt;alert" in page.content for page in pages) >= len(pages) - 1
    for more in ("", "&detail=1"):
        said = client.get(f"{LIST}live/?pk={row}{more}")
        assert said["Content-Type"] == "application/json"
        assert "<script" not in json.dumps(said.json())


# -- the story -------------------------------------------------------------------------


def story(client: Client, name: str = "n") -> list[str]:
    body = client.get(f"{LIST}{primary(name)}/change/").content.decode()
    items = re.findall(r"(?s)<li><span class=\"distlock-small\">.*?<div>(.*?)</div></li>", body)
    return [html.unescape(item) for item in items]


def test_the_story_is_what_the_row_and_the_audit_log_know(client: Client) -> None:
    who = {"host": "web-1", "pid": 4711, "thread": "sync"}
    hold(ttl=2 * MINUTE, acquired_at=-5 * MINUTE - 4711, lost_at=-HOUR, **who)
    acquired = "acquired by sync, process 4711 on web-1"
    lost = "a lease was found lost: it had ended, or was taken by force, before its holder was done"
    assert story(client) == ["renewed", acquired, lost]
    assert "Last renewed: 1 min" in text(client.get(f"{LIST}{primary()}/change/"))
    assert "taken from" in confirm(client, chosen())[0]
    token = "Force-released: token 7, sync of process 4711 on web-1."
    *now, before = story(client)
    assert before == acquired
    assert set(now) == {f"ann<script>: {token}", "released, by its holder or by force", lost}


def test_what_was_never_renewed_says_nothing_of_it(client: Client) -> None:
    lock("x", ttl=60, renew=False).acquire()._released = True  # type: ignore[union-attr]
    assert [line[:8] for line in story(client, "x")] == ["acquired"]
    hold("y", ttl=2 * MINUTE, acquired_at=-SECOND, expires_at=5 * MINUTE)  # a min_hold
    assert [line[:8] for line in story(client, "y")] == ["acquired"]
    hold("long ago", ttl=2 * MINUTE)  # the same, after the ttl
    row = DistributedLock.objects.filter(name="long ago")
    row.update(acquired_at=row.get().expires_at - timedelta(minutes=6))  # to the microsecond
    assert [line[:8] for line in story(client, "long ago")] == ["acquired"]
    hold("z", expires_at=-SECOND, acquired_at=-MINUTE)
    assert story(client, "z")[0] == "the lease ended, neither renewed nor released"


def test_a_min_hold_longer_than_the_ttl_is_no_renewal(client: Client, vendor: str) -> None:
    lease = lock("x", ttl=0.2, min_hold=60, renew=False).acquire()
    time.sleep(0.3)
    row = DistributedLock.objects.get(name="x")
    assert microseconds(row.expires_at) - microseconds(row.acquired_at) == 60 * SECOND
    assert [line[:8] for line in story(client, "x")] == ["acquired"]
    assert "Last renewed: \N{EN DASH}" in text(client.get(f"{LIST}{primary('x')}/change/"))
    lease.release()


def test_when_a_min_hold_was_over_is_not_when_it_was_released(client: Client) -> None:
    lock("x", min_hold=1).acquire().release()
    assert [line[:8] for line in story(client, "x")] == ["acquired"]
    assert eventually(lambda: len(story(client, "x")) == 2, 20)
    assert story(client, "x")[0] == "min_hold was over; its holder had released it before"
    with lock("y"):
        pass
    assert "released, by its holder or by force" in story(client, "y")


# -- figures ---------------------------------------------------------------------------


def test_the_figures_are_in_the_list(client: Client) -> None:
    hold(
        acquisitions=8,
        waits=2,
        losses=1,
        total_hold=12 * SECOND,
        longest_hold=90 * SECOND,
        total_wait=8 * SECOND,
        longest_wait=4 * SECOND,
    )
    hold("never")
    hold("once", acquisitions=1)
    row = table(client)["n"]
    assert row["holds"] == "8 grants mean 2.0 s, longest 1 min 30 s 1 lost"
    assert row["waits_shown"] == "25 % waited mean 1.0 s, longest 4.0 s"
    assert 'class="part" width="25.0"' in client.get(LIST).content.decode()
    assert table(client)["never"]["holds"] == table(client)["never"]["waits_shown"] == "\N{EN DASH}"
    assert table(client)["once"]["waits_shown"] == "0 % waited"
    write(acquisitions=1000)
    assert table(client)["n"]["waits_shown"].startswith("< 1 % waited")


# -- its job ---------------------------------------------------------------------------


def test_the_job_is_for_those_who_may_see_jobs() -> None:
    once("charge:42").run(int)
    page = f"{LIST}{primary('once:charge:42')}/change/"
    there = reverse("admin:distlock_job_change", args=[Job.objects.get().pk])
    body = browser("view_distributedlock", "view_job").get(page).content.decode()
    assert f'<a href="{there}">charge:42</a>' in body
    get_user_model().objects.all().delete()
    body = browser("view_distributedlock").get(page).content.decode()
    assert there not in body
    assert "field-job" not in body


def test_a_celery_task_leads_to_its_receipt() -> None:
    hold(thread="task shop.sync[5f2c]")
    receipt = Job.objects.create(key="celery:5f2c", state="done")
    client = browser("view_distributedlock", "view_job")
    there = reverse("admin:distlock_job_change", args=[receipt.pk])
    page = client.get(f"{LIST}{primary()}/change/").content.decode()
    assert f'<a href="{there}">celery:5f2c</a>' in page


# -- languages -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("language", "said"),
    [("de", ["gehalten", "Sperre und Token", "Haltezeiten"]), ("ko", ["보유 중", "잠금과 토큰"])],
)
def test_it_speaks_the_language_of_the_request(
    client: Client, language: str, said: list[str]
) -> None:
    hold()
    with override_settings(LANGUAGE_CODE=language):
        shown = text(client.get(LIST))
        one = text(client.get(f"{LIST}{primary()}/change/"))
        asked = text(ask(client, "n"))
    assert all(word in shown for word in said)
    assert not re.search("Held since|Story|Take these", one + asked)
