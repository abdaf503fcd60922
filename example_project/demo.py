"""`make demo`: a web site, two workers and two beats, and a job that still runs once per tick.

Two beats are one too many on purpose, as after a deploy that went wrong: they send every tick
twice. The job `report` is a `single_instance` with a `min_hold`; `control` is the same job without
the decorator. Everything lives in a new folder and ends with this process.

DEMO_SECONDS   stop by itself that long after the start; the exit status says whether all was well
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sqlite3
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django
from django.core.management import call_command

from . import celery_app, counting
from .processes import Child, DidNotStart
from .schedules import INTERVAL, MIN_HOLD

WORKERS = 2
BEATS = counting.BEATS
DRAIN_LIMIT = 15.0


def main() -> int:
    """Run the demo. Return 0 if the report ran exactly once in every tick."""
    limit = seconds()
    stop_at_signals()
    with tempfile.TemporaryDirectory(prefix="distlock-demo-") as name:
        demo = Demo(Path(name))
        print("The shop, with two workers and two beats. One moment...", flush=True)
        try:
            demo.prepare()
            demo.start()
            demo.watch(limit)
        except DidNotStart as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nStopping; the workers finish what they have begun.", flush=True)
        finally:
            ignore_signals()
            demo.stop()
        if not demo.shown:
            print("No tick was over yet.", flush=True)
            return 1
        text, good = counting.summary(counting.ticks())
        good = good and not demo.died
        print(f"\n{text}\n{'All is well.' if good else 'SOMETHING WENT WRONG.'}", flush=True)
        return 0 if good else 1


def seconds() -> float | None:
    """Return DEMO_SECONDS, if it is set."""
    value = os.environ.get("DEMO_SECONDS", "")
    try:
        return float(value) if value else None
    except ValueError:
        sys.exit(f"DEMO_SECONDS must be a number, not {value!r}.")


def stop_at_signals() -> None:
    """Let TERM and HUP end the demo as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        ignore_signals()  # the second one must not cut the stopping short
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def ignore_signals() -> None:
    """From here on everything ends by itself, in bounded time."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class Demo:
    """Everything that runs, and what it has shown so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = folder / "broker.sqlite3"
        self.environ = {
            "DJANGO_SETTINGS_MODULE": "example_project.settings",
            "DATABASE_URL": f"sqlite:///{folder / 'shop.sqlite3'}",
            "BROKER_URL": f"sqla+sqlite:///{self.broker}",
        }
        self.password = secrets.token_urlsafe(9)
        self.workers: list[Child] = []
        self.beats: list[Child] = []
        self.web: list[Child] = []
        self.died = False
        self.shown: set[int] = set()
        self.first = 0

    # -- before ----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the database, the admin's user and something to sell."""
        os.environ.update(self.environ)
        django.setup()
        call_command("migrate", verbosity=0)
        from django.contrib.auth.models import User

        from .shop.models import Payment, Product

        User.objects.create_superuser("admin", password=self.password)
        for name, stock in (("Bicycle", 3), ("Helmet", 25), ("Lamp", 100)):
            Product.objects.create(name=name, stock=stock)
        for customer, euros in (("Ada", 49), ("Grace", 120)):
            Payment.objects.create(customer=customer, euros=euros)
        self.prepare_broker()

    def prepare_broker(self) -> None:
        """Make the queue, in a file of its own. Of two workers that make it at once, one fails.

        WAL stays set in the file, so that readers do not block writers.
        """
        with contextlib.closing(sqlite3.connect(self.broker)) as database:
            database.execute("PRAGMA journal_mode=WAL")
        with celery_app.connection_for_write() as broker:
            celery_app.amqp.queues["celery"](broker.default_channel).declare()

    def start(self) -> None:
        """Start the children, the beats last. Raises `DidNotStart`."""
        port = free_port(8000)
        self.web = [self.child("web", f"manage.py runserver --noreload 127.0.0.1:{port}")]
        quiet = "--without-gossip --without-mingle --without-heartbeat"
        for name in numbered("worker", WORKERS):
            command = f"-m celery -A example_project worker -n {name}@%h -c 2 -l INFO {quiet}"
            self.workers.append(self.child(name, command))
        for worker in self.workers:
            worker.wait_until_it_says(" ready.")
        url = f"http://127.0.0.1:{port}/"
        self.web[0].wait_until(lambda: answers(url))
        for name in numbered("beat", BEATS):
            schedule = self.folder / f"{name}.schedule"
            command = f"-m celery -A example_project beat -l INFO -s {schedule}"
            self.beats.append(self.child(name, command))
        for beat in self.beats:
            beat.wait_until_it_says("beat: Starting")
        self.introduce(url)

    def introduce(self, url: str) -> None:
        """Say where to look."""
        print(
            f"""
  web site   {url}
  admin      {url}admin/   user admin, password {self.password}

  Each of {BEATS} beats sends two jobs every {INTERVAL} s, to {WORKERS} workers:
  report     @single_instance("report", min_hold={MIN_HOLD})
  control    the same without the decorator
  Ctrl-C stops everything.
""",
            flush=True,
        )

    def child(self, name: str, command: str) -> Child:
        """Start a child in this demo's folder."""
        return Child(name, command, self.folder, self.environ)

    # -- meanwhile -------------------------------------------------------------------------------

    def watch(self, limit: float | None) -> None:
        """Print each tick when it is over, until the time is up or a child has died."""
        until = None if limit is None else time.monotonic() + limit
        while until is None or time.monotonic() < until:
            self.show()
            for child in (*self.web, *self.workers, *self.beats):
                if not child.alive:
                    self.died = True
                    print(f"{child.name} has ended:\n{child.said()[-3000:]}", file=sys.stderr)
                    return
            time.sleep(0.2)

    def show(self, *, last: bool = False) -> None:
        """Print the ticks that are complete, or so late that something must be missing."""
        for tick in counting.ticks():
            late = time.time() > (tick.number + 2) * INTERVAL
            if tick.number in self.shown or not (tick.complete or late or last):
                continue
            self.first = self.first or tick.number
            self.shown.add(tick.number)
            moment = time.strftime("%H:%M:%S", time.localtime(tick.number * INTERVAL))
            print(f"{moment}  tick {tick.number - self.first + 1:<3} {tick}", flush=True)

    # -- afterwards ------------------------------------------------------------------------------

    def stop(self) -> None:
        """End the children: the beats first, and the workers once they have done everything."""
        try:
            end(self.beats)
            if self.beats:
                self.drain()
                self.show(last=True)
        finally:
            end([*self.workers, *self.web])

    def drain(self) -> None:
        """Wait until every message that was sent has left its row."""
        deadline = time.monotonic() + DRAIN_LIMIT
        while time.monotonic() < deadline:
            done = sum(1 for run in self.runs() if run.ended)
            if done >= self.sent() or not all(worker.alive for worker in self.workers):
                return
            time.sleep(0.2)

    def runs(self) -> Iterator[Any]:
        """Yield every row of every tick."""
        for tick in counting.ticks():
            yield from (*tick.report, *tick.skipped, *tick.control)

    def sent(self) -> int:
        """Return how many messages there ever were; this transport keeps those delivered, too."""
        with contextlib.closing(sqlite3.connect(self.broker, timeout=20)) as connection:
            return int(connection.execute("SELECT count(*) FROM kombu_message").fetchone()[0])


def end(children: list[Child]) -> None:
    """End them all at the same time."""
    for child in children:
        child.ask_to_stop()
    for child in children:
        child.stop()


def numbered(name: str, count: int) -> list[str]:
    """Return name1, name2, ..."""
    return [f"{name}{number}" for number in range(1, count + 1)]


def free_port(wanted: int) -> int:
    """Return the port, or another one if it is in use."""
    for port in (wanted, 0):
        with socket.socket() as listener, contextlib.suppress(OSError):
            # As the web server does: what a closed connection leaves behind is not in use.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            return int(listener.getsockname()[1])
    raise OSError("there is no free port")


def answers(url: str) -> bool:
    """Whether the web site is there."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
        return bool(response.status == 200)
    return False


if __name__ == "__main__":
    sys.exit(main())
