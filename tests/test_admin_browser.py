"""The admin in a real browser: it counts, it refreshes itself, and it says when it cannot."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.staticfiles.handlers import StaticFilesHandler
from django.db import connections
from django.test import override_settings

from distlock import lock, once
from distlock.admin import live
from distlock.backends.tickets import draw
from distlock.models import DistributedLock, Job
from tests.browser.pages import CHROMIUM, WIDTHS, browser, logged_in, server
from tests.conformance.rows import MINUTE, SECOND, write
from tests.support import eventually
from tests.test_admin import EVIL, LIST, hold, primary
from tests.test_admin import browser as client_of

JOBS = "/admin/distlock/job/"
pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.vendor("postgresql"),
    pytest.mark.slow,
]
KINDS = ("script-src", "style-src", "img-src", "connect-src", "form-action")
POLICY = "; ".join(["default-src 'none'", *(f"{kind} 'self'" for kind in KINDS)])


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.fail("These tests need a browser: apt-get install chromium", pytrace=False)
    # Playwright runs a loop of its own in this thread, which Django takes for asynchronous code.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "DJANGO_ALLOW_ASYNC_UNSAFE", "1")
        with browser() as opened:
            yield opened


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A live server that asks for a strict Content Security Policy."""

    def get_response(self: Any, request: Any) -> Any:
        response = real(self, request)
        response["Content-Security-Policy"] = POLICY
        return response

    real = StaticFilesHandler.get_response
    monkeypatch.setattr(StaticFilesHandler, "get_response", get_response)
    monkeypatch.setattr(live, "EVERY", 1)
    with override_settings(DEBUG=True, ALLOWED_HOSTS=["*"], STATIC_URL="/static/"):
        with server() as address:
            yield address


@pytest.fixture
def page(chromium: Any, site: str) -> Iterator[Any]:
    """A page of somebody who may see the locks, which must not complain."""
    across, down = WIDTHS["wide"]
    context = chromium.new_context(base_url=site, viewport={"width": across, "height": down})
    context.set_default_timeout(30_000)
    logged_in(context, site, client_of("view_distributedlock", "force_release"))
    page = context.new_page()
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda line: "Policy" in line.text and said.append(line.text))
    yield page
    context.close()
    assert said == []


def cell(page: Any, name: str, column: str) -> str:
    row = page.locator("#result_list tbody tr", has_text=name)
    return " ".join(row.locator(f".field-{column}").inner_text().split())


def test_a_page_that_stays_open_tells_the_truth(page: Any) -> None:
    hold("counted", ttl=2 * MINUTE, expires_at=90 * SECOND, acquired_at=-30 * SECOND)
    hold(EVIL, note=EVIL)
    other = lock("taken meanwhile")
    other.acquire().release()
    page.goto(LIST)
    assert page.locator("#distlock-live").inner_text() == "Refreshes itself"
    page.evaluate("window.untouched = true")
    first = cell(page, "counted", "time_left")
    assert first.startswith("1 min ")
    assert eventually(lambda: cell(page, "counted", "time_left") != first, 20)
    assert cell(page, "taken meanwhile", "badge") == "free"
    with other:
        assert eventually(lambda: cell(page, "taken meanwhile", "badge") == "held", 20)
        assert "process" in cell(page, "taken meanwhile", "holder")
        token = str(DistributedLock.objects.get(name="taken meanwhile").fencing_token)
        assert token in cell(page, "taken meanwhile", "lock_and_token")
        write("taken meanwhile", wanted_until=MINUTE)
        assert eventually(
            lambda: cell(page, "taken meanwhile", "badge") == "held somebody waits", 20
        )
    assert eventually(lambda: cell(page, "taken meanwhile", "badge") == "free", 20)
    assert EVIL in page.locator("#result_list").inner_text()
    assert page.locator("#result_list script").count() == 0
    assert page.evaluate("window.untouched")  # all without a reload


def test_a_page_that_gets_no_answer_says_so_and_goes_on(page: Any) -> None:
    hold("n", ttl=2 * MINUTE, expires_at=100 * SECOND)
    page.route("**/live/**", lambda route: route.abort())
    page.goto(LIST)
    note = page.locator("#distlock-live")
    assert eventually(lambda: "does not answer" in note.inner_text(), 20)
    # It counts on by itself.
    for column in ("time_left", "held_since"):
        before = cell(page, "n", column)
        assert eventually(lambda: cell(page, "n", column) != before, 20)  # noqa: B023
    page.unroute("**/live/**")
    assert eventually(lambda: note.inner_text() == "Refreshes itself", 30)


def test_a_lock_that_has_changed_hands_is_said_to_have(page: Any) -> None:
    hold("n", ttl=MINUTE)
    page.goto(f"{LIST}{primary('n')}/change/")
    assert page.locator("#distlock-live").inner_text() == "Refreshes itself"
    hold("n", fencing_token=8)
    note = page.locator("#distlock-live")
    assert eventually(lambda: "The holder has changed" in note.inner_text(), 20)


def test_nobody_looks_nobody_asks(page: Any) -> None:
    hold("n")
    asked: list[float] = []
    page.on("request", lambda request: "live/" in request.url and asked.append(time.monotonic()))
    page.goto(LIST)
    assert eventually(lambda: (page.wait_for_timeout(100), len(asked) >= 2)[1], 20)
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    page.wait_for_timeout(1200)  # one may be on its way
    before = len(asked)
    page.wait_for_timeout(2500)
    assert len(asked) == before
    page.evaluate("Object.defineProperty(document, 'hidden', {value: false})")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    assert eventually(lambda: (page.wait_for_timeout(100), len(asked) > before)[1], 20)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("theme", "language"), [("light", "en-us"), ("dark", "de")])
def test_everything_fits_and_can_be_read(
    chromium: Any, site: str, width: str, theme: str, language: str, settings: Any
) -> None:
    settings.LANGUAGE_CODE = language
    long = "n" * 200
    hold(long, note="w" * 200, thread="t" * 200, host="h" * 200, ttl=2 * MINUTE)
    write(long, losses=2, acquisitions=10**9, total_wait=10**15, longest_wait=10**13)
    draw(connections["default"], long, 0, "me", 2**60)
    across, down = WIDTHS[width]
    context = chromium.new_context(
        base_url=site, viewport={"width": across, "height": down}, color_scheme=theme
    )
    logged_in(context, site, client_of("view_distributedlock", "force_release"))
    page = context.new_page()
    for address in (LIST, f"{LIST}{primary(long)}/change/"):
        page.goto(address)
        assert page.evaluate(BEYOND) == [], address
        faint = page.evaluate(CONTRAST)
        assert faint == [], address
    page.locator(".object-tools button").click()
    page.wait_for_load_state()
    assert page.evaluate(BEYOND) == []
    assert page.evaluate(CONTRAST) == []
    context.close()
    connections.close_all()


def test_on_a_narrow_page_the_fields_follow_each_other(chromium: Any, site: str) -> None:
    once("charge:42").run(int)
    hold(note="month end", thread="sync", host="web-1", ttl=2 * MINUTE, acquisitions=8, waits=2)
    across, down = WIDTHS["narrow"]
    context = chromium.new_context(base_url=site, viewport={"width": across, "height": down})
    logged_in(context, site, client_of("view_distributedlock", "view_job", "rerun_job"))
    page = context.new_page()
    for address in (f"{LIST}{primary()}/change/", f"{JOBS}{Job.objects.get().pk}/change/"):
        page.goto(address)
        heights = page.evaluate(HEIGHTS)
        assert len(heights) > 4, address
        assert max(heights) <= 120, address
        assert page.evaluate(BEYOND) == [], address
    context.close()
    connections.close_all()


HEIGHTS = """
() => [...document.querySelectorAll(".form-multiline > div")].map((field) => field.offsetHeight)
"""
BEYOND = """
() => document.documentElement.scrollWidth <= window.innerWidth ? []
  : [...document.querySelectorAll("#content *, .breadcrumbs")]
    .filter((element) => element.getBoundingClientRect().right > window.innerWidth)
    .map((element) => `${element.tagName} ${element.className} ${element.id}`)
"""
CONTRAST = """
() => {
  const luminance = (colour) => {
    const part = colour.map((value) => value / 255)
      .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) {
        return colour.slice(0, 3);
      }
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll('[class*="distlock"], .distlock-story *')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility()) {
      continue;
    }
    const [one, two] = [parse(getComputedStyle(element).color).slice(0, 3), behind(element)]
      .map(luminance).sort((a, b) => b - a);
    const ratio = (one + 0.05) / (two + 0.05);
    if (ratio < 4.5) {
      found.push(`${element.className} ${ratio.toFixed(2)}`);
    }
  }
  return found;
}
"""
