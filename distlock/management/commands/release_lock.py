"""Take a lock from its holder."""

from __future__ import annotations

import getpass
import sys
from argparse import ArgumentParser
from typing import Any, NoReturn

from django.core.management.base import BaseCommand, CommandError
from django.db import DatabaseError, Error

from ...arguments import checked_name
from ...backends import backend_for
from ...backends.base import Holder
from ...releases import take
from ...states import moment
from ..options import add_database, connection_to, remedy_for, whole_number
from ..table import shown

FREE = 3
CHANGED = 4
IN_USE = 5
DECLINED = 6


class Command(BaseCommand):
    """`manage.py release_lock NAME`: from the holder that it showed, and from no other."""

    help = (
        "Takes the lock NAME from whoever holds it, and raises its fencing token, so that a holder "
        f"who is still at work is refused. Exit status: 0 it is free now, {FREE} nobody held it, "
        f"{CHANGED} the holder has changed, {IN_USE} a running transaction has its row locked, "
        f"{DECLINED} it was not confirmed, 1 any other error."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("name", metavar="NAME", help="The name of the lock.")
        parser.add_argument("--slot", metavar="N", default=0, help="Of a lock with several (0).")
        parser.add_argument("--yes", action="store_true", help="Do not ask.")
        parser.add_argument(
            "--token", metavar="N", help="Only if this is still the holder's fencing token."
        )
        add_database(parser)

    def handle(self, **options: Any) -> None:
        """Show the holder, ask, and take the lock. Raises `SystemExit` with one of the statuses."""
        try:
            name = checked_name(options["name"])
        except (TypeError, ValueError) as error:
            raise CommandError(str(error)) from None
        slot = whole_number(options["slot"], "--slot", 0, 2**31 - 1)
        token = options["token"]
        if token is not None:
            token = whole_number(token, "--token", 0, 2**63 - 1)
        connection = connection_to(options["database"])
        backend = backend_for(connection)
        try:
            holder = backend.holder(connection, name, slot)
            self._check(name, holder, token)
            assert holder is not None
            self._confirm(holder, options["yes"])
            alias, user = connection.alias, _user()
            raised = take(alias, name, slot, holder.token, holder.owner, by=user)
        except DatabaseError as error:
            if backend.is_contention(error):
                self._end(IN_USE, f"The lock {name!r} is in use by a running transaction.")
            self._refuse(connection, error)
        except Error as error:
            self._refuse(connection, error)
        if raised is None:
            said = f"The lock {name!r} was left alone: its holder has changed or is done."
            self._end(CHANGED, said)
        if options["verbosity"] >= 1:
            self.stdout.write(f"The lock {name!r} is free. Its token is {raised} now.")

    def _check(self, name: str, holder: Holder | None, token: int | None) -> None:
        """End unless somebody has the lock, and with that token."""
        if holder is None:
            self._end(FREE, f"Nobody holds the lock {name!r}.")
        if token is not None and token != holder.token:
            self._end(
                CHANGED,
                f"The lock {name!r} was left alone: its token is {holder.token}, not {token}.",
            )

    def _confirm(self, holder: Holder, yes: bool) -> None:
        """Show the holder and ask. End if the answer is no."""
        since = f"since {moment(holder.acquired_at)}, token {holder.token}"
        self.stdout.write(f"The lock {holder.name!r} is held by {shown(str(holder))}, {since}.")
        if yes:
            return
        if not sys.stdin.isatty():
            raise CommandError("There is no terminal to ask on: confirm with --yes.")
        self.stdout.write(
            "A holder who is still at work is not stopped, but told that the lock is lost."
        )
        if input("Take it away? [y/N] ").strip().lower() not in ("y", "yes"):
            self._end(DECLINED, "It was left alone.")

    def _refuse(self, connection: Any, error: Error) -> NoReturn:
        remedy = remedy_for(connection, error)
        raise CommandError(remedy or f"The database says: {error}") from error

    def _end(self, status: int, message: str) -> NoReturn:
        self.stderr.write(message)
        sys.exit(status)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        return ""
