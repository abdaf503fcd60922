"""The data that the tests protect with locks."""

from __future__ import annotations

from django.db import models

from distlock.fencing import FencedModel


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


class Account(FencedModel):
    """A row that is written under a fence, mostly in the database "other"."""

    name = models.CharField(max_length=40, primary_key=True)
    balance = models.IntegerField(default=0)
    counter = models.ForeignKey(Counter, on_delete=models.CASCADE, null=True, blank=True)

    def __str__(self) -> str:
        return f"{self.name}: {self.balance}"


class Savings(Account):
    """A row in two tables, of which the other one has the token."""

    rate = models.IntegerField(default=0)


class Frozen(Account):
    """The same rows under another name."""

    class Meta:
        proxy = True


class Entry(FencedModel, Counter):
    """A row in two tables, of which this one has the token."""

    note = models.CharField(max_length=40, default="", blank=True)


class Event(FencedModel):
    """A row whose key the database chooses."""

    text = models.CharField(max_length=40)

    def __str__(self) -> str:
        return self.text
