"""Pictures of the admin in a real browser: `python -m tests.browser.screenshot [FOLDER]`.

Needs chromium (Debian: apt-get install chromium). Writes docs/admin.png, or with a folder every
page in both themes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
THEMES = {"light": "1", "dark": "0"}


@contextmanager
def site() -> Iterator[str]:
    """A live server with a new SQLite database; yields its address."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DISTLOCK_TEST_URL"] = f"sqlite:///{folder}/locks"
        os.environ["DJANGO_SETTINGS_MODULE"] = "tests.browser.settings"
        import django

        django.setup()
        from django.contrib.auth import get_user_model
        from django.contrib.staticfiles.handlers import StaticFilesHandler
        from django.core.management import call_command
        from django.test.testcases import LiveServerThread

        call_command("migrate", verbosity=0)
        get_user_model().objects.create_superuser("admin")
        server = LiveServerThread("127.0.0.1", StaticFilesHandler)
        server.start()
        server.is_ready.wait()
        if server.error:
            raise server.error
        try:
            yield f"http://127.0.0.1:{server.port}"
        finally:
            server.terminate()


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
    caller.set("shop.tasks.sync_account[5f2c1f9e-6f3b-4b54-9a53-0d1f2a1c77de]")
    hold.enter_context(lock("shop.tasks.sync_account:1017", ttl=300))
    caller.set("")
    with lock("nightly-report", min_hold=600, note="once a night, on whichever host"):
        pass
    for name in ("newsletter:2026-11", "payment:capture:88123"):
        with lock(name):
            pass
    lock("import:warehouse", ttl=0.3, renew=False, note="killed by the OOM killer").acquire()
    time.sleep(0.6)
    for name in DistributedLock.objects.values_list("name", flat=True):
        write(name, host="web-1")
    write("invoice:42", acquired_at=-95 * SECOND, acquisitions=1204, losses=2)
    write("import:warehouse", expires_at=-42 * MINUTE, acquired_at=-50 * MINUTE, host="worker-3")
    long = "report:" + "a-very-long-key-that-somebody-built-from-arguments-" * 4
    write(long, owner="x", acquired_at=-8 * SECOND, expires_at=22 * SECOND, host="web-2", pid=4711)
    write(long, thread="ThreadPoolExecutor-0_3", fencing_token=time.time_ns() // 1000)
    return hold


def shoot(url: str, target: Path, theme: str = "light", size: str = "1280,960") -> None:
    """Save what the browser shows at an address."""
    target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        how = [
            *FLAGS,
            f"--user-data-dir={profile}",
            f"--window-size={size}",
            f"--blink-settings=preferredColorScheme={THEMES[theme]}",
            f"--screenshot={target}",
        ]
        subprocess.run([CHROMIUM, *how, url], check=True, capture_output=True, timeout=120)
    if not target.exists():
        sys.exit(f"chromium wrote no picture of {url}")


def main(folder: str | None) -> None:
    """Take the pictures."""
    if not CHROMIUM:
        sys.exit("chromium is not installed: apt-get install chromium")
    with site() as address:
        from django.urls import reverse

        from distlock.models import DistributedLock
        from tests.browser.urls import LOCK, LOCKS

        with seed():
            one = DistributedLock.objects.get(name="invoice:42").pk
            listed, detail = reverse(LOCKS), reverse(LOCK, args=[one])
            enter = f"{address}/enter/?next="
            if folder is None:
                shoot(enter + quote(listed), ROOT / "docs" / "admin.png")
                return
            for theme in THEMES:
                shoot(enter + quote(listed), Path(folder) / f"list-{theme}.png", theme)
                shoot(enter + quote(detail), Path(folder) / f"lock-{theme}.png", theme)
                shoot(f"{address}/confirm/", Path(folder) / f"confirm-{theme}.png", theme)
            shoot(enter + quote(listed), Path(folder) / "list-narrow.png", size="500,900")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
