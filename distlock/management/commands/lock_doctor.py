"""Tell what is wrong with the set-up of locks, and what to do about it."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from ...doctor import THREADS, diagnose
from ...findings import Finding
from ..options import add_database, connection_to, counted, whole_number


class Command(BaseCommand):
    """`manage.py lock_doctor`: reads, and changes nothing."""

    help = (
        "Examines what locks depend on: settings, routing, the server's version, durability and "
        "time limits, privileges, tables, and clocks. Each finding has an id, and says what to do. "
        "The exit status is 1 if one of them is an error. SILENCED_SYSTEM_CHECKS is respected."
    )
    requires_system_checks = []  # it says the same, and more

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the arguments."""
        add_database(parser)
        parser.add_argument("--json", action="store_true", help="For programs.")
        parser.add_argument(
            "--threads",
            metavar="N",
            default=THREADS,
            help="How many threads of one process use the database at once: is its pool large "
            f"enough? (default: {THREADS})",
        )

    def handle(self, **options: Any) -> None:
        """Examine, and say so. Raises `SystemExit` with status 1 if there is an error."""
        threads = whole_number(options["threads"], "--threads", 1, 10_000)
        if (alias := options["database"]) is not None:
            connection_to(alias)
        found = [
            finding
            for finding in diagnose(alias, threads)
            if finding.code.value not in settings.SILENCED_SYSTEM_CHECKS
        ]
        found.sort(key=lambda finding: finding.code.value)
        if options["json"]:
            self.stdout.write(json.dumps(_as_json(found), indent=2))
        else:
            self._tell(found)
        if any(finding.is_error for finding in found):
            sys.exit(1)

    def _tell(self, found: Sequence[Finding]) -> None:
        for finding in found:
            style = self.style.ERROR if finding.is_error else self.style.WARNING
            self.stdout.write(style(f"{finding.code.value}: {finding.message}"))
            for line in filter(None, (finding.remedy, f"See {finding.link}")):
                self.stdout.write(f"    {line}")
        errors = sum(finding.is_error for finding in found)
        counts = [(errors, "error"), (len(found) - errors, "warning")]
        text = " and ".join(counted(*count) for count in counts if count[0])
        self.stdout.write(f"{text}." if text else self.style.SUCCESS("Nothing is wrong."))


def _as_json(found: Sequence[Finding]) -> dict[str, Any]:
    return {
        "ok": not any(finding.is_error for finding in found),
        "findings": [
            {
                "id": finding.code.value,
                "severity": "error" if finding.is_error else "warning",
                "message": finding.message,
                "remedy": finding.remedy,
                "link": finding.link,
            }
            for finding in found
        ],
    }
