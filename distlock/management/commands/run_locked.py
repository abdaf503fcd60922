"""Run a command while a lock is held: for cron on several hosts."""

from __future__ import annotations

import dataclasses
import re
import signal
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error, connections

from ...arguments import DEFAULT
from ...conf import settings
from ...deadlines import seconds
from ...exceptions import JobDuplicate, LockBusy, LockError, LockLost
from ...jobs import Once, once
from ...locks import Lock, lock
from ...signals import lock_lost
from ..children import Bell, Child
from ..single_instance import BUSY, LOST

FAILED = 125
NOT_EXECUTABLE = 126
NOT_FOUND = 127
ON_LOST = {"term": signal.SIGTERM, "kill": signal.SIGKILL, "ignore": None}
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


class Failure(Exception):
    """The command ended with a status that is not 0."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Command(BaseCommand):
    """`manage.py run_locked NAME -- COMMAND`: ends with an exit status, always."""

    help = (
        "Runs a command while the lock NAME is held, across all hosts, and ends with its exit "
        f"status. {BUSY}: the lock was busy, the command did not run. {LOST}: the lock was lost "
        f"meanwhile. {FAILED}: it could not be tried, or with --once-every not be noted. "
        f"{NOT_EXECUTABLE} and {NOT_FOUND}: the command could not be started. 128 + n: it was "
        "ended by signal n."
    )
    requires_system_checks = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the arguments. Durations are seconds, or have a unit: 90, 90s, 15m, 1h, 1d."""
        parser.usage = "%(prog)s NAME [options] -- COMMAND [ARGUMENT ...]"
        parser.add_argument("name", metavar="NAME", help="The name of the lock.")
        parser.add_argument("command", metavar="COMMAND", nargs="+", help="What is to be run.")
        add = parser.add_argument
        add("--ttl", metavar="TIME", help="How long the lease outlives this process (TTL, 30).")
        add("--wait", metavar="TIME", default=0, help='How long to wait if busy (0), or "forever".')
        add("--min-hold", metavar="TIME", help="Keep the lock at least that long, from its start.")
        add(
            "--once-every",
            metavar="TIME",
            help="Do nothing, and end well, if the command has ended well on any host since the "
            "last full minute (1m), hour (1h), day in UTC (1d), ..",
        )
        add(
            "--on-lost",
            choices=ON_LOST,
            default="term",
            help="What is sent to the command when the lock is lost: SIGTERM (term, the default) "
            "and SIGKILL after --kill-after, SIGKILL at once (kill), or nothing (ignore).",
        )
        add("--kill-after", metavar="TIME", default=10, help="From SIGTERM to SIGKILL (10).")
        add("--busy-status", metavar="N", default=BUSY, help=f"Instead of {BUSY}, perhaps 0.")
        add("--note", default="", help="For people who look at the lock.")
        add("--database", metavar="ALIAS", help="Where the lock lives (USING).")

    def create_parser(self, *args: Any, **kwargs: Any) -> CommandParser:
        """Return a parser that leaves alone what follows the first `--`; argparse drops another."""
        parser = super().create_parser(*args, **kwargs)
        parse = parser.parse_args

        def parse_args(args: Any = None, namespace: Any = None) -> Any:
            given = list(args or ())
            end = given.index("--") + 2 if "--" in given else len(given)
            parsed = parse(given[:end], namespace)
            parsed.command += given[end:]
            return parsed

        parser.parse_args = parse_args  # type: ignore[method-assign]
        return parser

    def handle(self, **options: Any) -> None:
        """Run the command. Raises `SystemExit` with a status that is not 0, or `CommandError`."""
        if threading.current_thread() is not threading.main_thread():
            raise CommandError("run_locked handles signals: call it in the main thread.")
        held, child = _lock_of(options), _child_of(options)
        job = _once_of(options, held)
        busy = _status(options["busy_status"])
        bell = Bell()
        explained = self._explained(bell, held, busy, options["verbosity"])
        with bell, explained, _heard(bell), held as lease:
            run = partial(self._run, child, bell, held.alias, lease.token)
            status = self._run_once(job, run, options["verbosity"]) if job else run()
        if status:
            sys.exit(status)

    def _run(self, child: Child, bell: Bell, alias: str, token: int) -> int:
        _close_idle(alias)
        try:
            return child.run(bell, token)
        except OSError as error:
            self.stderr.write(f"{error.filename}: {error.strerror}")
            return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE

    def _run_once(self, job: Once, run: Callable[[], int], verbosity: int) -> int:
        """Run the command unless it has succeeded before; a failure leaves no receipt."""
        try:
            job.run(self.succeed, run)
        except Failure as failure:
            return failure.status
        except JobDuplicate as error:
            if verbosity:
                self.stderr.write(str(error))
        return 0

    def succeed(self, run: Callable[[], int]) -> None:
        """Run the command. Raises `Failure` if its status is not 0."""
        if status := run():
            raise Failure(status)

    @contextmanager
    def _explained(self, bell: Bell, held: Lock, busy: int, verbosity: int) -> Iterator[None]:
        """Turn what can become of a lock into a line and a status."""
        try:
            yield
        except LockBusy as error:
            if verbosity:
                self.stderr.write(str(error))
            sys.exit(busy)
        except LockLost as error:
            self._end(LOST, str(error))
        except (LockError, Error) as error:
            if bell.had_child:
                self._end(FAILED, f"The command has run, but that could not be noted: {error}")
            self._end(FAILED, f"The lock {held.name!r} could not be asked for: {error}")

    def _end(self, status: int, message: str) -> NoReturn:
        self.stderr.write(message)
        sys.exit(status)


@contextmanager
def _heard(bell: Bell) -> Iterator[None]:
    """Let the bell ring as soon as a lock of this process is lost: there is only one."""

    def ring(**what: Any) -> None:
        bell.tell_lost()

    lock_lost.connect(ring)
    try:
        yield
    finally:
        lock_lost.disconnect(ring)


def _close_idle(alias: str) -> None:
    """Give up a session that has nothing to do for now: the keeper has its own."""
    connection = connections[alias]
    if not connection.in_atomic_block:
        connection.close()


def _lock_of(options: dict[str, Any]) -> Lock:
    ttl, min_hold = options["ttl"], options["min_hold"]
    wait = options["wait"]
    try:
        return lock(
            options["name"],
            ttl=DEFAULT if ttl is None else _duration(ttl, "--ttl", positive=True),
            wait=None if wait == "forever" else _duration(wait, "--wait"),
            min_hold=None if min_hold is None else _duration(min_hold, "--min-hold"),
            renew=True,
            note=options["note"],
            using=options["database"] or settings().USING,
        )
    except (TypeError, ValueError) as error:
        raise CommandError(str(error), returncode=FAILED) from None


def _once_of(options: dict[str, Any], held: Lock) -> Once | None:
    """Return the job of which there is one success per period; its lock is free under `held`."""
    if (every := options["once_every"]) is None:
        return None
    every = _duration(every, "--once-every", positive=True)
    ttl = DEFAULT if held.ttl is None else held.ttl
    how: dict[str, Any] = {"ttl": ttl, "wait": 0, "using": held.using}
    try:
        job = once(held.literal_name, every=every, atomic=False, on_duplicate="raise", **how)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error), returncode=FAILED) from None
    return dataclasses.replace(job, lock=dataclasses.replace(job.lock, renew=True))


def _child_of(options: dict[str, Any]) -> Child:
    kill_after = _duration(options["kill_after"], "--kill-after")
    return Child(options["command"], on_lost=ON_LOST[options["on_lost"]], kill_after=kill_after)


def _duration(given: Any, option: str, *, positive: bool = False) -> float:
    """Return seconds. Raises `CommandError` that names the option."""
    try:
        if isinstance(given, str):
            parts = re.fullmatch(r"(\d+\.?\d*)([smhd]?)", given)
            if not parts:
                raise ValueError(f"{option} must be a time like 90, 90s, 15m, 1h or 1d.")
            given = float(parts[1]) * UNITS[parts[2]]
        return seconds(given, option, positive=positive)
    except (TypeError, ValueError) as error:
        raise CommandError(f"{error} It was given as {given!r}.", returncode=FAILED) from None


def _status(given: Any) -> int:
    try:
        status = int(given)
    except (TypeError, ValueError):
        status = -1
    if not 0 <= status <= 255:
        raise CommandError(
            f"--busy-status must be a number from 0 to 255, not {given!r}.", returncode=FAILED
        )
    return status
