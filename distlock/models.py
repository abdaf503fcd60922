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
    name = NameField(_("name"), max_length=255, db_default="")
    slot = models.IntegerField(_("slot"), db_default=0)
    owner = models.CharField(_("owner"), max_length=64, db_default="", blank=True)
    fencing_token = models.BigIntegerField(_("fencing token"), db_default=0)
    acquired_at = UTCDateTimeField(_("acquired at"), null=True, blank=True)
    expires_at = UTCDateTimeField(_("lease ends"), db_default=EPOCH)
    ttl = models.BigIntegerField(_("ttl"), db_default=0)
    wanted_until = UTCDateTimeField(_("wanted until"), db_default=EPOCH)

    host = models.CharField(_("host"), max_length=255, db_default="", blank=True)
    pid = models.BigIntegerField(_("process id"), db_default=0)
    thread = models.CharField(_("thread or task"), max_length=255, db_default="", blank=True)
    note = models.CharField(_("note"), max_length=255, db_default="", blank=True)

    acquisitions = models.BigIntegerField(_("grants"), db_default=0)
    waits = models.BigIntegerField(_("grants after a wait"), db_default=0)
    losses = models.BigIntegerField(_("losses"), db_default=0)
    lost_at = UTCDateTimeField(_("last lost"), null=True, blank=True)
    total_hold = models.BigIntegerField(_("total time held"), db_default=0)
    longest_hold = models.BigIntegerField(_("longest time held"), db_default=0)
    total_wait = models.BigIntegerField(_("total wait"), db_default=0)
    longest_wait = models.BigIntegerField(_("longest wait"), db_default=0)

    class Meta:
        db_table = TABLE
        verbose_name = _("lock")
        verbose_name_plural = _("locks")
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
    key = NameField(_("key"), max_length=255, db_default="")
    state = models.CharField(
        _("state"), max_length=16, choices=State, db_default=State.QUEUED.value
    )
    task = models.CharField(_("task"), max_length=255, db_default="", blank=True)
    task_id = models.CharField(_("task id"), max_length=255, db_default="", blank=True)
    arguments = JSONTextField(_("arguments"), null=True, blank=True)
    result = JSONTextField(_("result"), null=True, blank=True)
    token = models.BigIntegerField(_("token"), db_default=0)
    attempts = models.BigIntegerField(_("attempts"), db_default=0)
    created_at = UTCDateTimeField(_("first seen"), null=True, blank=True)
    started_at = UTCDateTimeField(_("started"), null=True, blank=True)
    finished_at = UTCDateTimeField(_("finished"), null=True, blank=True)
    expires_at = UTCDateTimeField(_("expires"), db_default=EPOCH)
    unpublished_since = UTCDateTimeField(
        _("unpublished since"), null=True, blank=True, db_index=True
    )

    class Meta:
        db_table = "distlock_job"
        verbose_name = _("job")
        verbose_name_plural = _("jobs")
        constraints = [models.UniqueConstraint(fields=["key"], name="distlock_job_key")]
        indexes = [models.Index(fields=["task_id"], name="distlock_job_task_id")]
        permissions = [
            ("free_job", "Can free the key of a job"),
            ("rerun_job", "Can let a job run again"),
        ]
        default_permissions = ("view",)

    def __str__(self) -> str:
        return self.key
