"""A command that runs once at a time, and does what it is told."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from distlock.management import SingleInstanceMixin


class Command(SingleInstanceMixin, BaseCommand):
    lock_ttl = 1.5
    requires_migrations_checks = True

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--until-told", action="store_true")
        parser.add_argument("--fail", action="store_true")

    def handle(self, *args: Any, **options: Any) -> str:
        self.stdout.write(f"token {self.lease.token}")
        self.stdout.flush()
        if options["until_told"]:
            sys.stdin.readline()
        if options["fail"]:
            raise CommandError("as it was told", returncode=9)
        return "done"
