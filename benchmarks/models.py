"""What a developer makes for a lock of his own, and what a transaction has to do."""

from __future__ import annotations

from django.db import models


class Lease(models.Model):
    """The hand-written lock."""

    name = models.CharField(max_length=255, unique=True)
    owner = models.CharField(max_length=64, blank=True)
    expires_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return self.name


class Stock(models.Model):
    """A row that a transaction changes."""

    quantity = models.BigIntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.pk}: {self.quantity}"
