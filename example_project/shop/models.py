"""What a shop counts, and what must not be counted twice."""

from __future__ import annotations

from datetime import datetime, timezone

from django.db import models

from example_project.schedules import INTERVAL


class Product(models.Model):
    """Something to sell. The hazard: two customers read the same stock."""

    name = models.CharField(max_length=100)
    stock = models.IntegerField()

    def __str__(self) -> str:
        return self.name


class Order(models.Model):
    """One piece, sold."""

    product = models.ForeignKey(Product, on_delete=models.CASCADE, related_name="orders")
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"order {self.pk}"


class Payment(models.Model):
    """Money that a customer has authorized. The hazard: it is captured twice."""

    customer = models.CharField(max_length=100)
    euros = models.IntegerField()
    captured = models.BooleanField(default=False)

    def __str__(self) -> str:
        return f"{self.euros} euros of {self.customer}"


class Charge(models.Model):
    """What the bank has booked, on its side."""

    payment = models.ForeignKey(Payment, on_delete=models.CASCADE, related_name="charges")
    euros = models.IntegerField()
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"charge of {self.euros} euros"


class Delivery(models.Model):
    """What the supplier has sent, by the event that says so. The hazard: it is delivered twice."""

    event = models.CharField(max_length=40, db_index=True)
    product = models.ForeignKey(Product, on_delete=models.CASCADE, related_name="deliveries")
    pieces = models.IntegerField()
    received_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"{self.pieces} pieces of {self.product}"


class Report(models.Model):
    """The mail that goes out every night. The hazard: every host sends it."""

    night = models.CharField(max_length=40, db_index=True)
    pieces_sold = models.IntegerField()
    sent_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"report of {self.night}"


class Run(models.Model):
    """One run of a periodic job, so that `make demo` can count runs, duplicates and overlaps."""

    job = models.CharField(max_length=40)
    tick = models.BigIntegerField()
    skipped = models.BooleanField(default=False)
    worker = models.CharField(max_length=100)
    pid = models.BigIntegerField()
    started = models.FloatField()
    ended = models.FloatField(null=True)

    def __str__(self) -> str:
        return f"{self.job} of tick {self.tick}"

    @property
    def due(self) -> datetime:
        """When its tick was."""
        return datetime.fromtimestamp(self.tick * INTERVAL, timezone.utc)
