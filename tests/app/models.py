"""The data that the tests protect with locks."""

from __future__ import annotations

from django.db import models


class Counter(models.Model):
    """A number that lost updates would make too small."""

    name = models.CharField(max_length=100, unique=True)
    value = models.IntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.name}: {self.value}"


class Ticket(models.Model):
    """A row whose foreign key is checked at COMMIT: it can make the COMMIT itself fail."""

    counter = models.ForeignKey(Counter, on_delete=models.CASCADE)
    note = models.CharField(max_length=100, default="", blank=True)

    def __str__(self) -> str:
        return f"ticket {self.pk} of {self.counter_id}"
