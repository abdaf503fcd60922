"""The rows: of a lock, one per name and slot, and of a job, one per key.

The statements that keep a lock's rules stand in `backends/`; who may write a job, in `receipts.py`.
"""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.utils.translation import gettext_lazy as _

from .backends.base import EPOCH, TABLE
from .backends.tickets import TICKETS
from .fields import JSONTextField, NameField, UTCDateTimeField


class DistributedLock(models.Model):
    """A lock's row. Free means `expires_at <= now` on the database's clock.

    Never write it by hand and never point a foreign key at it: inserting one share-locks the row
    and makes a free lock busy. Every column has a default in the database, so that a release of
    this library that does not know a new column can still insert during a rolling deploy.
    Durations are microseconds. `waits` counts the grants that somebody had to wait for; `lost_at`
    is when a lease was last seen to have ended before its holder was done.
    """

    id = models.BigAutoField(primary_key=True)
    name = NameField(max_length=255, db_default="")
    slot = models.IntegerField(db_default=0)
    owner = models.CharField(max_length=64, db_default="", blank=True)
    fencing_token = models.BigIntegerField(db_default=0)
    acquired_at = UTCDateTimeField(null=True, blank=True)
    expires_at = UTCDateTimeField(db_default=EPOCH)
    ttl = models.BigIntegerField(db_default=0)
    wanted_until = UTCDateTimeField(db_default=EPOCH)

    host = models.CharField(max_length=255, db_default="", blank=True)
    pid = models.BigIntegerField(db_default=0)
    thread = models.CharField("thread or task", max_length=255, db_default="", blank=True)
    note = models.CharField(max_length=255, db_default="", blank=True)

    acquisitions = models.BigIntegerField(db_default=0)
    waits = models.BigIntegerField(db_default=0)
    losses = models.BigIntegerField(db_default=0)
    lost_at = UTCDateTimeField(null=True, blank=True)
    total_hold = models.BigIntegerField(db_default=0)
    longest_hold = models.BigIntegerField(db_default=0)
    total_wait = models.BigIntegerField(db_default=0)
    longest_wait = models.BigIntegerField(db_default=0)

    class Meta:
        db_table = TABLE
        verbose_name = "lock"
        constraints = [
            models.UniqueConstraint(fields=["name", "slot"], name="distlock_name_slot"),
        ]
        permissions = [("force_release", "Can force-release a lock")]
        default_permissions = ("view",)

    def __str__(self) -> str:
        return self.name if self.slot == 0 else f"{self.name} [{self.slot}]"


class Ticket(models.Model):
    """Somebody's turn at a lock with `fair=True`, in the order of the ids; see `tickets.py`."""

    id = models.BigAutoField(primary_key=True)
    name = NameField(max_length=255)
    slot = models.IntegerField(db_default=0)
    owner = models.CharField(max_length=64)
    alive_until = models.BigIntegerField(db_default=0)

    class Meta:
        db_table = TICKETS
        indexes = [models.Index(fields=["name", "slot"], name="distlock_ticket_name")]
        default_permissions = ()

    def __str__(self) -> str:
        return f"{self.name} {self.pk}"


NAMED = ~Q(name="")
"""Every row but the reserved one; see Note [High-water mark] in `backends/base.py`."""


class Job(models.Model):
    """What is to be done once, is being done, or was done: one row per key.

    A row that is done and has not expired is a receipt: with it in place the job does not run
    again. It is written by `receipts.py`, by whoever holds the job's lock, and never over a newer
    token. What is queued is written by `outbox.py`, and is unpublished until its message is out.
    Moments are on the database's clock, and every column has a default in the database, as those
    of a lock.
    """

    class State(models.TextChoices):
        """How far it is. A job that runs has its lock held; without that it was broken off."""

        QUEUED = "queued", _("queued")
        RUNNING = "running", _("running")
        DONE = "done", _("done")

    id = models.BigAutoField(primary_key=True)
    key = NameField(max_length=255, db_default="")
    state = models.CharField(max_length=16, choices=State, db_default=State.QUEUED.value)
    task = models.CharField(max_length=255, db_default="", blank=True)
    task_id = models.CharField("task id", max_length=255, db_default="", blank=True)
    arguments = JSONTextField(null=True, blank=True)
    result = JSONTextField(null=True, blank=True)
    token = models.BigIntegerField(db_default=0)
    attempts = models.BigIntegerField(db_default=0)
    created_at = UTCDateTimeField(null=True, blank=True)
    started_at = UTCDateTimeField(null=True, blank=True)
    finished_at = UTCDateTimeField(null=True, blank=True)
    expires_at = UTCDateTimeField(db_default=EPOCH)
    unpublished_since = UTCDateTimeField(null=True, blank=True, db_index=True)

    class Meta:
        db_table = "distlock_job"
        constraints = [models.UniqueConstraint(fields=["key"], name="distlock_job_key")]
        default_permissions = ("view",)

    def __str__(self) -> str:
        return self.key
