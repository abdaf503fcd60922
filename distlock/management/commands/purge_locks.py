"""Delete the rows of locks that nobody has used for a long time, and receipts that have expired."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from django.core.management.base import BaseCommand, CommandError
from django.db import DatabaseError, Error, IntegrityError

from ... import receipts
from ...backends import backend_for
from ...backends.base import EPOCH, MICROSECOND
from ...conf import settings
from ...deadlines import Seconds, jitter, seconds
from ...models import NAMED, DistributedLock, Job, Ticket
from ..options import add_database, connection_to, counted, remedy_for, whole_number
from ..progress import progress

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

BATCH = 500
LONGEST_REST = 0.01
"""Seconds to pause after a batch, which is as long as that took, so that others have their turn."""
LARGEST_BATCH = 10_000
"""Below what every database takes as parameters of one statement."""

TRIES = 5
LONG_DEAD = 60 * 1_000_000
"""Microseconds without a sign of life after which nobody will come back for a ticket."""


class Command(BaseCommand):
    """`manage.py purge_locks`: safe beside running locks, and on every host at once."""

    help = (
        "Deletes the rows of locks whose lease ended long ago, by the database's clock. A lock "
        "that is held, or in use by a running transaction, is passed over; fencing tokens go on "
        "growing. Also deletes the receipts of once() that do not count any more. Run it from cron "
        "as often and on as many hosts as you like."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the arguments. Values are checked in `handle`, also those from call_command."""
        parser.add_argument(
            "--older-than",
            metavar="SECONDS",
            help="How long ago the lease ended, at least (default: PURGE_AFTER, which is 30 days).",
        )
        parser.add_argument(
            "--batch-size",
            metavar="N",
            default=BATCH,
            help=f"How many rows one transaction deletes at most (default: {BATCH}).",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="Only say how many rows would be deleted."
        )
        add_database(parser)

    def handle(self, **options: Any) -> None:
        """Purge, and say how many rows that were. Raises `CommandError` that names the remedy."""
        older_than = _older_than(options["older_than"])
        limit = whole_number(options["batch_size"], "--batch-size", 1, LARGEST_BATCH)
        connection = connection_to(options["database"])
        microseconds = int(older_than * 1_000_000)
        self.locks = self.receipts = 0
        verb = "Would delete" if options["dry_run"] else "Deleted"
        try:
            if options["dry_run"]:
                self.locks = _count(connection, microseconds)
                self.receipts = receipts.expired(connection.alias).count()
            else:
                self._purge(connection, microseconds, limit, quiet=options["verbosity"] < 1)
        except Error as error:
            raise CommandError(self._remedy(connection, error)) from error
        if options["verbosity"] >= 1:
            locks = counted(self.locks, "lock")
            self.stdout.write(f"{verb} {locks} whose lease ended at least {older_than:.15g} s ago.")
            self.stdout.write(f"{verb} {counted(self.receipts, 'receipt')} that had expired.")

    def _purge(
        self, connection: BaseDatabaseWrapper, older_than: int, limit: int, *, quiet: bool
    ) -> None:
        now = backend_for(connection).clock(connection)
        dead = Ticket.objects.using(connection.alias).filter(alive_until__lt=now - LONG_DEAD)
        # By key, which MySQL's safe updates want, and only those that nobody came back for since.
        dead.filter(pk__in=list(dead.values_list("pk", flat=True)[:LARGEST_BATCH])).delete()
        rows = DistributedLock.objects.using(connection.alias).filter(NAMED)
        with progress(rows, "locks", quiet=quiet) as tell:
            for count, after in _rested(partial(_batch, connection, older_than, limit=limit)):
                self.locks += count
                tell(after, self.locks)
        with progress(Job.objects.using(connection.alias), "receipts", quiet=quiet) as tell:
            for count, after in _rested(partial(receipts.purge, connection.alias, limit=limit)):
                self.receipts += count
                tell(after, self.receipts)

    def _remedy(self, connection: BaseDatabaseWrapper, error: Error) -> str:
        """Return what to do about an error of the database."""
        return remedy_for(connection, error) or (
            f"Stopped after deleting {counted(self.locks, 'lock')} and "
            f"{counted(self.receipts, 'receipt')}; what is deleted stays deleted, and the next "
            f"run goes on from here. The database {connection.alias!r} says: {error}"
        )


def _rested(purge: Callable[[int], tuple[int, int] | None]) -> Iterator[tuple[int, int]]:
    """Yield how many rows each batch has deleted, and up to which id, with a pause in between."""
    after = 0
    while True:
        began = time.perf_counter()
        batch = purge(after)
        if batch is None:
            return
        yield batch
        after = batch[1]
        time.sleep(min(LONGEST_REST, time.perf_counter() - began))


def _batch(
    connection: BaseDatabaseWrapper, older_than: int, after: int, limit: int
) -> tuple[int, int] | None:
    """Purge one batch. Two purges may collide on the reserved row: one of them tries again."""
    backend = backend_for(connection)
    for tries_left in reversed(range(TRIES)):
        try:
            return backend.purge(connection, older_than, after, limit)
        except DatabaseError as error:
            collision = isinstance(error, IntegrityError) or backend.is_contention(error)
            if not collision or not tries_left:
                raise
        time.sleep(jitter(0.1))
    return None


def _count(connection: BaseDatabaseWrapper, older_than: int) -> int:
    ended = EPOCH + (backend_for(connection).clock(connection) - older_than) * MICROSECOND
    rows = DistributedLock.objects.using(connection.alias).filter(NAMED, expires_at__lte=ended)
    return rows.count()


def _older_than(given: str | Seconds | None) -> float:
    if given is None:
        return seconds(settings().PURGE_AFTER, "PURGE_AFTER")
    try:
        return seconds(float(given) if isinstance(given, str) else given, "--older-than")
    except (TypeError, ValueError):
        raise CommandError(
            "--older-than must be a number of seconds from 0 to ten years, like 86400 for one "
            f"day, not {given!r}."
        ) from None
