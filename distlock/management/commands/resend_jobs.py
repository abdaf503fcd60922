"""Publish the messages of jobs that were queued and committed, but never reached the broker."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import Error, connections

from ...conf import settings
from ...deadlines import Seconds, seconds


class Command(BaseCommand):
    """`manage.py resend_jobs`: safe beside those who publish, and on every host at once."""

    help = (
        "Publishes what enqueue_once() has queued and nobody has published since, because the "
        "broker was down or the process died: each under its own task id, so that one copy too "
        "many does no harm. Run it from cron, on as many hosts as you like."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the arguments. Values are checked in `handle`, also those from call_command."""
        parser.add_argument(
            "--older-than",
            metavar="SECONDS",
            default="60",
            help="How long ago a job was queued, at least (default: 60): its own process may still "
            "publish it.",
        )
        parser.add_argument(
            "--database", metavar="ALIAS", help="The database of the jobs (default: USING)."
        )

    def handle(self, **options: Any) -> None:
        """Publish, and say how many. Raises `CommandError` that names the remedy."""
        older_than = _older_than(options["older_than"])
        alias = _alias(options["database"])
        resend = _resend()
        try:
            count, unknown = resend(alias, older_than)
        except Error as error:
            raise CommandError(
                f"The database {alias!r} says: {error}. What was published is not published again; "
                f"is `manage.py migrate distlock --database={alias}` done?"
            ) from error
        except Exception as error:
            raise CommandError(
                f"A message could not be sent: {error}. It is left to the next run; the log names "
                "a job that itself is the reason."
            ) from error
        if options["verbosity"] >= 1:
            jobs = "1 job" if count == 1 else f"{count} jobs"
            self.stdout.write(f"Published {jobs} queued at least {older_than:.15g} s ago.")
        if unknown:
            raise CommandError(
                f"This project's Celery app has no task {', '.join(unknown)}: their jobs are left. "
                "Is the app made in the project's __init__.py, and are its tasks imported?"
            )


def _resend() -> Any:
    """Return what publishes, with the tasks of the project loaded as a worker loads them."""
    try:
        from celery import current_app

        from ...contrib._enqueue import resend
    except ImportError as error:
        raise CommandError(f"resend_jobs needs Celery: {error}.") from error
    current_app.loader.import_default_modules()
    return resend


def _older_than(given: str | Seconds) -> float:
    try:
        return seconds(float(given) if isinstance(given, str) else given, "--older-than")
    except (TypeError, ValueError):
        raise CommandError(
            f"--older-than must be a number of seconds from 0 to ten years, not {given!r}."
        ) from None


def _alias(given: str | None) -> str:
    alias = settings().USING if given is None else given
    if alias not in connections:
        known = ", ".join(connections)
        raise CommandError(
            f"--database: there is no database {alias!r} in DATABASES. It has {known}."
        )
    return alias
