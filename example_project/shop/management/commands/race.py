"""`manage.py race`: concurrent processes against each hazard, with the lock or without."""

from __future__ import annotations

import secrets
import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management import call_command
from django.core.management.base import BaseCommand
from django.db import connection

from example_project.shop import racing
from example_project.shop.models import Delivery, Order, Payment, Product, Report

STOCK = 100
EUROS = 49
PIECES = 7


class Command(BaseCommand):
    """Ends with status 1 if a total is wrong."""

    help = "Let several processes sell, capture, report and receive at once, and check the totals."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Take the number of processes and of sales."""
        parser.add_argument("--without-lock", action="store_true", help="call the unlocked ones")
        parser.add_argument("--processes", type=int, default=4)
        parser.add_argument("--sales", type=int, default=10, help="of each process (10)")

    def handle(self, *, without_lock: bool, processes: int, sales: int, **options: Any) -> None:
        """Race, print a table, clean up."""
        call_command("migrate", verbosity=0)
        product = Product.objects.create(name="race", stock=max(STOCK, processes * sales))
        payment = Payment.objects.create(customer="race", euros=EUROS)
        night = event = f"race-{secrets.token_hex(8)}"
        connection.close()
        race = racing.Race(
            product.pk, payment.pk, night, event, PIECES, sales, locked=not without_lock
        )
        try:
            racing.run(race, processes)
            sold = processes * sales
            rows = [
                ("pieces in stock", product.stock - sold + PIECES, self.stock_of(product)),
                ("orders", sold, Order.objects.filter(product=product).count()),
                ("euros charged", EUROS, sum(charge.euros for charge in payment.charges.all())),
                ("deliveries booked", 1, Delivery.objects.filter(event=event).count()),
                ("reports sent", 1, Report.objects.filter(night=night).count()),
            ]
        finally:
            product.delete()
            payment.delete()
            Report.objects.filter(night=night).delete()
        how = "without the lock" if without_lock else "with the lock"
        self.stdout.write(f"{processes} processes, {how}, on {connection.display_name}\n\n")
        self.table(rows)
        if any(expected != found for _, expected, found in rows):
            sys.exit(1)

    def stock_of(self, product: Product) -> int:
        """Return what the database says is left."""
        return int(Product.objects.values_list("stock", flat=True).get(pk=product.pk))

    def table(self, rows: list[tuple[str, int, int]]) -> None:
        """Print the totals, and which of them are wrong."""
        self.stdout.write(f"  {'':<22}{'expected':>10}{'found':>10}\n")
        for what, expected, found in rows:
            line = f"  {what:<22}{expected:>10}{found:>10}   "
            if expected == found:
                self.stdout.write(line + self.style.SUCCESS("right"))
            else:
                self.stdout.write(line + self.style.ERROR("WRONG"))
