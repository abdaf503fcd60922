"""Show the locks: who holds which, since when, and for how much longer."""

from __future__ import annotations

import json
import shutil
import time
from argparse import ArgumentParser
from typing import TYPE_CHECKING, Any

from django.core.management.base import BaseCommand, CommandError
from django.db import Error

from ...arguments import checked_name
from ...backends.base import EPOCH, MICROSECOND, in_convention
from ...deadlines import seconds
from ...listing import Listing, as_json, listing, stats_in
from ...states import LockState, duration, moment
from ..options import add_database, connection_to, remedy_for, whole_number
from ..table import table

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

LIMIT = 100
HIGHEST = 10_000
PATIENCE = 10.0
"""Seconds that a list may take."""
EVERY = 2.0

STATS_HEADER = (
    *("LOCK", "GRANTS", "WAITED FOR", "MEAN WAIT", "LONGEST WAIT"),
    *("MEAN HOLD", "LONGEST HOLD", "LOSSES", "LAST LOSS"),
)
HEADER = ("LOCK", "STATE", "HOLDER", "HELD FOR", "TIME LEFT", "TOKEN", "NOTE")
AROUND = 4
"""Lines of the terminal that are not for locks."""
OPEN, HOME, CLEAR_LINE, CLEAR_REST, CLOSE = (
    f"\x1b[{code}" for code in ("?1049h\x1b[?25l", "H", "K", "J", "?25h\x1b[?1049l")
)


class Command(BaseCommand):
    """`manage.py locks`: reads only, and never the whole table for a plain list."""

    help = (
        "Lists locks in the order of their names, by the database's clock. A name stays in the "
        "list after its release, until purge_locks forgets it."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the arguments."""
        add = parser.add_argument
        add("--held", action="store_true", help="Only those that somebody has now.")
        add("--name", metavar="PREFIX", default="", help="Only those whose name begins so.")
        add("--limit", metavar="N", default=LIMIT, help=f"How many at most (default: {LIMIT}).")
        add("--stats", action="store_true", help="What each has counted, and not who holds it.")
        add("--json", action="store_true", help="For programs; has both.")
        add(
            "--watch",
            metavar="SECONDS",
            nargs="?",
            const=EVERY,
            help=f"Show it again and again, on a terminal (every {EVERY:g} s), until Ctrl-C.",
        )
        add_database(parser)

    def handle(self, **options: Any) -> None:
        """Show the list. Raises `CommandError` that names the remedy."""
        self.held, self.prefix = options["held"], _prefix(options["name"])
        self.stats = options["stats"]
        self.limit = whole_number(options["limit"], "--limit", 1, HIGHEST)
        connection = connection_to(options["database"])
        if options["watch"] is not None:
            if options["json"]:
                raise CommandError("--watch is for people and --json for programs: choose one.")
            self._watch(connection, _every(options["watch"]))
            return
        found = self._listing(connection, self.limit)
        if options["json"]:
            self.stdout.write(json.dumps(_as_json(found), indent=2))
        else:
            self.stdout.write("\n".join(self._lines(found, self._width())))

    def _listing(self, connection: BaseDatabaseWrapper, limit: int) -> Listing:
        try:
            return listing(
                connection.alias,
                held=self.held,
                prefix=self.prefix,
                limit=limit,
                patience=PATIENCE,
            )
        except Error as error:
            remedy = remedy_for(connection, error)
            raise CommandError(remedy or f"The database says: {error}") from error

    def _width(self) -> int | None:
        return shutil.get_terminal_size().columns if self.stdout.isatty() else None

    def _watch(self, connection: BaseDatabaseWrapper, every: float) -> None:
        if not self.stdout.isatty():
            raise CommandError("--watch needs a terminal; without one, call it again and again.")
        self.stdout.write(OPEN, ending="")
        try:
            while True:
                lines = self._screen(connection)
                text = f"{CLEAR_LINE}\n".join(lines)
                self.stdout.write(f"{HOME}{text}{CLEAR_LINE}{CLEAR_REST}", ending="")
                self.stdout.flush()
                time.sleep(every)
        except KeyboardInterrupt:
            pass
        finally:
            self.stdout.write(CLOSE, ending="")

    def _screen(self, connection: BaseDatabaseWrapper) -> list[str]:
        """Return what fits on the terminal now; an error is shown until it is over."""
        size = shutil.get_terminal_size()
        try:
            found = self._listing(connection, min(self.limit, max(1, size.lines - AROUND)))
        except CommandError as error:
            connection.close()
            return str(error).splitlines()
        at = in_convention(EPOCH + found.now * MICROSECOND)
        return [f"{connection.alias}, {moment(at)}", "", *self._lines(found, size.columns)]

    def _lines(self, found: Listing, width: int | None) -> list[str]:
        if not found.rows:
            return [found.cut_off or "There are none."]
        if self.stats:
            rows = [STATS_HEADER, *map(_stats_cells, found.rows)]
        else:
            rows = [HEADER, *(_cells(row, found) for row in found.rows)]
        lines = table(rows, width)
        return [*lines, found.cut_off] if found.cut_off else lines


def _cells(row: Any, found: Listing) -> tuple[str, ...]:
    said = as_json(row, found)
    holder, held_for, left = said["holder"], said["held_for"], said["time_left"]
    state = str(LockState(row.state).label) + (", wanted" if said["wanted"] else "")
    return (
        str(row),
        state,
        f"{holder['thread']}, {holder['pid']} on {holder['host']}" if holder else "",
        "" if held_for is None else duration(int(held_for * 1_000_000)),
        duration(int(left * 1_000_000)) if left else "",
        str(said["token"]),
        holder["note"] if holder else "",
    )


def _stats_cells(row: Any) -> tuple[str, ...]:
    stats = stats_in(row)
    return (
        str(row),
        str(stats.acquisitions),
        f"{stats.share_waited:.0%}" if stats.acquisitions else "",
        _seconds(stats.mean_waited, stats.waits),
        _seconds(stats.longest_waited, stats.waits),
        _seconds(stats.mean_held, stats.releases),
        _seconds(stats.longest_held, stats.releases),
        str(stats.losses),
        moment(stats.last_lost_at) if stats.last_lost_at else "",
    )


def _seconds(value: float, of: int) -> str:
    return duration(int(value * 1_000_000)) if of else ""


def _as_json(found: Listing) -> dict[str, Any]:
    return {
        "now": found.now / 1_000_000,
        "locks": [as_json(row, found) for row in found.rows],
        "cut_off": found.cut_off or None,
    }


def _prefix(given: str) -> str:
    try:
        return checked_name(given) if given else ""
    except (TypeError, ValueError) as error:
        raise CommandError(f"--name: {error}") from None


def _every(given: str | float) -> float:
    try:
        return max(0.1, seconds(float(given), "--watch", positive=True))
    except (TypeError, ValueError):
        raise CommandError(
            f"--watch must be a number of seconds greater than 0, not {given!r}."
        ) from None
