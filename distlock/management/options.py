"""What the commands have in common: which database is meant, and what to do about its errors."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import TYPE_CHECKING

from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError
from django.db import Error, connections

from ..conf import settings

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper


def add_database(parser: ArgumentParser) -> None:
    """Declare `--database`."""
    parser.add_argument("--database", metavar="ALIAS", help="Where the locks live (USING).")


def connection_to(given: str | None) -> BaseDatabaseWrapper:
    """Return the connection to the alias, by default that of the settings."""
    try:
        alias = settings().USING if given is None else given
    except ImproperlyConfigured as error:
        raise CommandError(str(error)) from None
    if alias not in connections:
        known = ", ".join(connections)
        raise CommandError(
            f"--database: there is no database {alias!r} in DATABASES. It has {known}."
        )
    return connections[alias]


def remedy_for(connection: BaseDatabaseWrapper, error: Error) -> str | None:
    """Return what to do where there is no table or no answer; `None` for any other error."""
    alias = connection.alias
    models = apps.get_app_config("distlock").get_models()
    try:
        there = connection.introspection.table_names()
    except Error:
        return f"The database {alias!r} cannot be asked; check that it runs. It says: {error}"
    for table in sorted(model._meta.db_table for model in models):
        if table not in there:
            command = f"manage.py migrate distlock --database={alias}"
            return f"The database {alias!r} has no table {table!r}: run `{command}`."
    return None


def whole_number(given: str | int, option: str, lowest: int, highest: int) -> int:
    """Return a number. Raises `CommandError` that names the option."""
    try:
        number = int(given)
    except (TypeError, ValueError):
        number = lowest - 1
    if not lowest <= number <= highest:
        raise CommandError(
            f"{option} must be a whole number from {lowest} to {highest}, not {given!r}."
        )
    return number


def counted(count: int, noun: str) -> str:
    """Return a number of things."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
