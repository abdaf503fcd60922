"""What docs/admin.md says is so: its code runs, its pictures are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth import get_user_model
from django.test import Client
from django.urls import path

from distlock import admin as pages
from distlock.models import DistributedLock, Job
from tests.browser.screenshot import DARK, IMAGES, LARGEST
from tests.test_admin import LIST, hold, text

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.vendor("sqlite")]

PAGE = Path(__file__).parent.parent / "docs" / "admin.md"
NAMES = ("locks", "lock", "force-release", "jobs", "job", "run-again")


@pytest.fixture
def own_admin() -> Iterator[ModuleType]:
    """The registry of the admin, put back at the end; and a place for the addresses."""
    before = dict(admin.site._registry)
    urls = ModuleType("own_urls")
    yield urls
    admin.site._registry = before


def test_the_code_of_the_page_runs(own_admin: Any, settings: Any) -> None:
    said: dict[str, Any] = {}
    for block in re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE.read_text()):
        exec(compile(block, str(PAGE), "exec"), said)
    own_admin.urlpatterns = [path("admin/", admin.site.urls)]
    settings.ROOT_URLCONF = own_admin
    assert isinstance(admin.site._registry[DistributedLock], said["Locks"])
    assert issubclass(said["Locks"], pages.DistributedLockAdmin)
    assert said["operators"].permissions.count() == 5
    ann = get_user_model().objects.create(username="ann", is_staff=True)
    ann.groups.add(said["operators"])
    client = Client()
    client.force_login(ann)
    hold()
    Job.objects.create(key="a job")
    shown = text(client.get(LIST))
    assert "Force-release the selected locks" in shown
    assert "Holds" not in shown
    assert "Free the selected jobs" in text(client.get("/admin/distlock/job/"))


def test_every_permission_of_the_app_is_on_the_page() -> None:
    from django.contrib.auth.models import Permission

    ours = Permission.objects.filter(content_type__app_label="distlock")
    told = set(re.findall(r"^\| `distlock\.(\w+)`", PAGE.read_text(), re.MULTILINE))
    assert told == set(ours.values_list("codename", flat=True))


def test_there_is_a_picture_of_each_page_at_both_widths() -> None:
    there = {path.name for path in IMAGES.iterdir()}
    wanted = {
        f"admin-{name}-{width}-{theme}.png"
        for name in NAMES
        for width in ("wide", "narrow")
        for theme in ("light", "dark")
        if theme == "light" or name in DARK
    }
    assert wanted <= there
    assert all(path.stat().st_size <= LARGEST for path in IMAGES.iterdir())
    readme = PAGE.parent.parent / "README.md"
    for page in (PAGE, readme):
        for picture in re.findall(r"!\[[^]]*\]\((.*?)\)", page.read_text()):
            assert (page.parent / picture).exists(), picture
