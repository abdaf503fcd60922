"""Pictures of the admin in a real browser: `python -m tests.browser.screenshot [FOLDER]`.

Needs chromium (Debian: apt-get install chromium). Writes docs/images/, or another folder: each page
wide and narrow, and the list and the page of a lock in the dark theme, too.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from tests.browser.pages import CHROMIUM, WIDTHS, browser, logged_in, server

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGES = ROOT / "docs" / "images"
DARK = ("locks", "lock")
LARGEST = 150_000
"""Bytes of one picture."""
COLOURS = 128
TALLEST = 1_500
WHOLE = ("lock", "job")
"""Pages that are shown to their end."""


@contextmanager
def site() -> Iterator[str]:
    """A live server with a new SQLite database; yields its address."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DISTLOCK_TEST_URL"] = f"sqlite:///{folder}/locks"
        os.environ["DJANGO_SETTINGS_MODULE"] = "tests.browser.settings"
        import django

        django.setup()
        from django.contrib.auth import get_user_model
        from django.core.management import call_command

        call_command("migrate", verbosity=0)
        get_user_model().objects.create_superuser("ann")
        with server() as address:
            yield address


def seed() -> ExitStack:
    """Make one lock in each state; those that are held are freed when the stack is closed."""
    from distlock import lock
    from distlock.contexts import caller
    from distlock.models import DistributedLock
    from tests.conformance.rows import MINUTE, SECOND, write

    hold = ExitStack()
    for name, note in (
        ("invoice:42", "month end, asked for by <b>Ann & Bob</b>"),
        ("stock:product-1017", ""),
    ):
        hold.enter_context(lock(name, ttl=30, note=note))
    caller.set("task shop.tasks.sync_account[5f2c1f9e-6f3b-4b54-9a53-0d1f2a1c77de]")
    hold.enter_context(lock("shop.tasks.sync_account:1017", ttl=300))
    caller.set("")
    with lock("nightly-report", min_hold=600, note="once a night, on whichever host"):
        pass
    for name in ("newsletter:2026-11", "payment:capture:88123"):
        with lock(name):
            pass
    lock("import:warehouse", ttl=0.3, renew=False, note="killed by the OOM killer").acquire()
    time.sleep(0.6)
    for number, name in enumerate(DistributedLock.objects.values_list("name", flat=True)):
        write(name, host="web-1", acquisitions=12 + 71 * number, waits=17 * number)
        write(name, total_hold=number * 431 * SECOND, longest_hold=(number + 1) * 47 * SECOND)
        write(name, total_wait=number * 19 * SECOND, longest_wait=number * 4 * SECOND)
    write("invoice:42", acquired_at=-95 * SECOND - 4321, expires_at=26 * SECOND, acquisitions=1204)
    write("invoice:42", waits=391, losses=2, pid=4711)
    past = "datetime('now', '-3 days')"
    from tests.conformance.rows import TABLE, execute

    execute(f"UPDATE {TABLE} SET lost_at = {past} WHERE name = 'invoice:42'")
    queue("invoice:42", 3)
    write("import:warehouse", expires_at=-42 * MINUTE, acquired_at=-50 * MINUTE, host="worker-3")
    long = "report:" + "a-very-long-key-that-somebody-built-from-arguments-" * 4
    write(long, owner="x", acquired_at=-8 * SECOND, expires_at=22 * SECOND, host="web-2", pid=4711)
    write(
        long, thread="ThreadPoolExecutor-0_3", fencing_token=time.time_ns() // 1000, ttl=3 * 10**7
    )
    return hold


def queue(name: str, count: int) -> None:
    """Let some wait in line for a lock."""
    from django.db import connection

    from distlock.backends import tickets

    for number in range(count):
        tickets.draw(connection, name, 0, f"waiter {number}", 3600 * 1_000_000)


def jobs() -> None:
    """Make one job in each state."""
    from datetime import timedelta

    from django.db import connection

    from distlock import once
    from distlock.backends import backend_for
    from distlock.backends.base import moment_of
    from distlock.models import Job

    now = moment_of(backend_for(connection).clock(connection))
    hour = timedelta(hours=1)
    stored = {"args": [1017], "kwargs": {"full": True}, "options": {}, "ttl": 3600}
    for key, state, age in (
        ("enqueue:shop.tasks.reindex:1017", "queued", timedelta(minutes=2)),
        ("enqueue:shop.tasks.reindex:1018", "running", timedelta(minutes=50)),
        ("enqueue:shop.tasks.mail:88123", "done", timedelta(hours=5)),
    ):
        Job.objects.create(
            key=key,
            state=state,
            task=key.split(":")[1],
            task_id=f"5f2c1f9e-6f3b-4b54-9a53-{abs(hash(key)) % 10**12:012}",
            arguments=stored,
            token=0 if state == "queued" else time.time_ns() // 1000,
            attempts=0 if state == "queued" else 1,
            created_at=now - age,
            started_at=None if state == "queued" else now - age,
            finished_at=now - age if state == "done" else None,
            expires_at=now + (-age if state == "done" else hour),
        )
    once("charge:88123").run(lambda: {"receipt": "ch_3Nx", "amount": "12.90"})


def visits() -> Iterator[tuple[str, str, str]]:
    """Yield the name of each page, its address, and the button that leads to what is meant."""
    from django.urls import reverse

    from distlock.models import DistributedLock, Job

    lock = DistributedLock.objects.get(name="invoice:42").pk
    job = Job.objects.get(key="enqueue:shop.tasks.reindex:1018").pk
    yield "locks", reverse("admin:distlock_distributedlock_changelist"), ""
    one = reverse("admin:distlock_distributedlock_change", args=[lock])
    yield "lock", one, ""
    yield "force-release", one, "Force-release…"
    yield "jobs", reverse("admin:distlock_job_changelist"), ""
    one = reverse("admin:distlock_job_change", args=[job])
    yield "job", one, ""
    yield "run-again", one, "Run again…"


def shoot(context: Any, address: str, button: str, target: Path, tallest: int) -> None:
    """Save what the browser shows."""
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    if button:
        page.get_by_role("button", name=button).click()
        page.wait_for_load_state()
    page.wait_for_timeout(300)
    wider = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    size = page.evaluate("[window.innerWidth, document.documentElement.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": size[0], "height": min(size[1], tallest)}
    page.screenshot(path=target, full_page=True, clip=clip)
    page.close()
    with Image.open(target) as picture:
        picture.convert("RGB").quantize(COLOURS).save(target, optimize=True)
    if complaints or wider > 0 or target.stat().st_size > LARGEST:
        sys.exit(f"{target.name}: {complaints}, {wider} px too wide, {target.stat().st_size} bytes")


def main(folder: Path) -> None:
    """Take the pictures."""
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"  # Playwright runs a loop in this thread
    if not CHROMIUM:
        sys.exit("chromium is not installed: apt-get install chromium")
    folder.mkdir(exist_ok=True)
    with site() as address:
        from django.contrib.auth import get_user_model
        from django.test import Client

        client = Client()
        client.force_login(get_user_model().objects.get())
        with seed(), browser() as opened:
            jobs()
            found = list(visits())
            for width, (across, down) in WIDTHS.items():
                for theme in ("light", "dark"):
                    context = opened.new_context(
                        viewport={"width": across, "height": down}, color_scheme=theme
                    )
                    closed = "localStorage.setItem('django.admin.navSidebarIsOpen', 'false')"
                    context.add_init_script(closed)
                    logged_in(context, address, client)
                    for name, path, button in found:
                        if theme == "light" or name in DARK:
                            target = folder / f"admin-{name}-{width}-{theme}.png"
                            tallest = 2 * TALLEST if name in WHOLE else TALLEST
                            shoot(context, address + path, button, target, tallest)
                    context.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
