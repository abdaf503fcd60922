"""The admin of jobs: what it shows, to whom."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin import AdminSite
from django.contrib.admin import site as default
from django.db import connection
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import clear_url_caches, path, reverse

from distlock import lock, once
from distlock.admin import DistributedLockAdmin, JobAdmin
from distlock.backends import backend_for
from distlock.backends.base import moment_of
from distlock.models import DistributedLock, Job
from tests.conformance.rows import write
from tests.test_admin import browser, text

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

LIST = "/admin/distlock/job/"
urlpatterns: list[Any] = []
"""Of the tests that have a second site."""
MINUTE = timedelta(minutes=1)
STATES = {
    "a queued": "queued",
    "b running": "running",
    "c broken": "broken off",
    "d done": "done",
    "e past": "expired",
}


@pytest.fixture
def client() -> Client:
    """A browser of somebody who may see jobs and locks."""
    return browser("view_job", "view_distributedlock")


def seed() -> None:
    """One job in each state."""
    now = moment_of(backend_for(connection).clock(connection))
    for key in STATES:
        state = {"c broken": "running", "e past": "done"}.get(key, key[2:])
        expires = now + (-MINUTE if key == "e past" else MINUTE)
        Job.objects.create(key=key, state=state, expires_at=expires, task="shop.pay", attempts=3)


def page(client: Client, job: Job) -> str:
    return text(client.get(reverse("admin:distlock_job_change", args=[job.pk])))


def shown(client: Client, query: str = "") -> dict[str, str]:
    """The badge of each job in the list, by its key."""
    rows = re.findall(r'(?s)title="(\w [^"]+)".*?badge[^>]*>([^<]+)<', _body(client, query))
    return dict(rows)


def _body(client: Client, query: str) -> str:
    response = client.get(LIST + query)
    assert response.status_code == 200, response.status_code
    return response.content.decode()


@pytest.mark.usetz
def test_the_list_shows_each_job_and_its_state(client: Client) -> None:
    seed()
    # Nobody's, though a min_hold keeps it.
    write("once:c broken", owner="", ttl=60_000_000, expires_at=60_000_000)
    with lock("once:b running"):
        assert shown(client) == STATES
        for key, state in STATES.items():
            value = {"broken off": "broken", "expired": "past"}.get(state, state)
            assert list(shown(client, f"?state={value}")) == [key]
    assert "shop.pay" in text(client.get(LIST))


def test_a_job_can_be_searched(client: Client) -> None:
    seed()
    Job.objects.filter(key="d done").update(task_id="4711", task="shop.other")
    for query in ("d+do", "d+done", "4711&in=all", "done&in=all", "shop.other&in=all"):
        assert list(shown(client, f"?q={query}")) == ["d done"]
    for query in ("done", "4711", "D"):
        assert shown(client, f"?q={query}") == {}


def test_its_queries_do_not_grow_with_the_rows(client: Client) -> None:
    counts = []
    for _ in range(2):
        seed()
        with CaptureQueriesContext(connection) as queries:
            client.get(LIST)
        counts.append(len(queries))
        for job in Job.objects.all():
            Job.objects.filter(pk=job.pk).update(key=f"{job.key} {job.pk}")
    assert counts[0] == counts[1]


def test_the_page_of_a_job_shows_all_of_it_and_leads_to_its_lock(client: Client) -> None:
    once("charge:42").run(lambda: {"<b>": "\u00e9"})
    job, row = Job.objects.get(), DistributedLock.objects.get()
    said = page(client, job)
    for part in ("charge:42", "done", "<lambda>", str(job.token), '"<b>": "\u00e9"'):
        assert part in said
    url = reverse("admin:distlock_job_change", args=[job.pk])
    body = client.get(url).content.decode()
    assert "<b>" not in body
    there = reverse("admin:distlock_distributedlock_change", args=[row.pk])
    assert f'<a href="{there}">once:charge:42</a>' in body
    assert f'<a href="{url}">charge:42</a>' in client.get(there).content.decode()


def test_the_list_does_not_read_what_it_does_not_show(client: Client) -> None:
    seed()
    with CaptureQueriesContext(connection) as queries:
        client.get(LIST)
    read = [query["sql"] for query in queries if "distlock_job" in query["sql"]]
    assert read
    assert not [sql for sql in read if re.search(r"\W(arguments|result)\W", sql)]


def test_half_of_a_surrogate_pair_does_no_harm(client: Client) -> None:
    once("odd").run(lambda: "a\ud800b \u00e9")
    assert '"a\\ud800b \u00e9"' in page(client, Job.objects.get())


def test_a_token_is_no_number_to_be_grouped(client: Client) -> None:
    once("charge:42").run(int)
    job = Job.objects.get()
    with override_settings(USE_THOUSAND_SEPARATOR=True):
        assert f"Token: {job.token} " in page(client, job)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Register models with the other site, for this test."""

    def register(*models: Any) -> None:
        site = AdminSite(name="ops")
        for model in models:
            site.register(model, {DistributedLock: DistributedLockAdmin, Job: JobAdmin}[model])
        given = [path("ops/", site.urls), path("admin/", default.urls)]
        monkeypatch.setattr(f"{__name__}.urlpatterns", given)
        clear_url_caches()

    with override_settings(ROOT_URLCONF=__name__):
        yield register
    clear_url_caches()


def test_links_stay_on_the_site(client: Client, registered: Any) -> None:
    registered(DistributedLock, Job)
    once("charge:42").run(int)
    job, row = Job.objects.get(), DistributedLock.objects.get()
    one = f"/ops/distlock/job/{job.pk}/change/"
    two = f"/ops/distlock/distributedlock/{row.pk}/change/"
    assert f'<a href="{two}">once:charge:42</a>' in client.get(one).content.decode()
    assert f'<a href="{one}">charge:42</a>' in client.get(two).content.decode()


@pytest.mark.parametrize("model", [DistributedLock, Job])
def test_a_site_that_has_one_of_the_models_shows_the_name_of_the_other(
    client: Client, registered: Any, model: Any
) -> None:
    registered(model)
    once("charge:42").run(int)
    one = f"/ops/distlock/{model._meta.model_name}/{model.objects.get().pk}/change/"
    response = client.get(one)
    said, body = text(response), response.content.decode()
    assert ("Job: charge:42 " if model is DistributedLock else "Lock: once:charge:42 ") in said
    assert "charge:42</a>" not in body


def test_a_lock_that_is_no_jobs_has_no_link_and_a_job_may_have_no_lock(client: Client) -> None:
    seed()
    with lock("d done"):
        pass
    row = DistributedLock.objects.get()
    said = client.get(reverse("admin:distlock_distributedlock_change", args=[row.pk]))
    assert b"/distlock/job/1" not in said.content
    assert "Job:" not in text(said)
    assert "Lock: \N{EN DASH}" in page(client, Job.objects.get(key="d done"))


def test_nothing_can_be_added_changed_or_deleted() -> None:
    seed()
    client = browser(superuser=True)
    pk = Job.objects.values_list("pk", flat=True)[0]
    for url in (f"{LIST}add/", f"{LIST}{pk}/delete/"):
        assert client.get(url).status_code == 403
    assert client.post(f"{LIST}{pk}/change/", {"state": "done"}).status_code == 403
    assert "delete_selected" not in client.get(LIST).content.decode()
    assert Job.objects.count() == len(STATES)


def test_who_may_not_look_sees_nothing() -> None:
    assert browser("view_distributedlock").get(LIST).status_code == 403


def test_the_alias_is_that_of_the_settings(client: Client) -> None:
    once("one job").run(int)
    once("other job", using="other").run(int)
    assert "one job" in text(client.get(LIST))
    with override_settings(DISTLOCK={"USING": "other"}):
        said: Any = text(client.get(LIST))
        assert "other job" in said
        assert "one job" not in said
