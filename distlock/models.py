"""The row: one per name and slot. The statements that keep its rules stand in `backends/`."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils import timezone as django_timezone

from .backends import backend_for
from .backends.base import EPOCH, TABLE, in_convention
from .backends.tickets import TICKETS

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    CharField = models.CharField[str, str]
    DateTimeField = models.DateTimeField[Any, Any]
else:
    CharField, DateTimeField = models.CharField, models.DateTimeField


class NameField(CharField):
    """A lock's name, compared exactly: case, accents and trailing spaces count on every database.

    The collation comes from `db_parameters` and not from `db_collation`, which would be one for
    all vendors and make `makemigrations --check` depend on the database.
    """

    def db_parameters(self, connection: BaseDatabaseWrapper) -> dict[str, Any]:
        """Return Django's parameters with the vendor's exact, no-pad collation."""
        parameters: dict[str, Any] = dict(super().db_parameters(connection))
        parameters["collation"] = backend_for(connection).exact_collation
        return parameters


class UTCDateTimeField(DateTimeField):
    """A moment on the database's clock, stored as UTC whatever USE_TZ and TIME_ZONE say.

    Django stores local time where a database has no time zones and USE_TZ is off; the statements
    in `backends/` write UTC. In Python a value follows Django's convention: aware with USE_TZ,
    else naive and local.
    """

    def get_internal_type(self) -> str:
        """Return a name of our own, so that no backend converter of Django's applies."""
        return "UTCDateTimeField"

    def db_type(self, connection: BaseDatabaseWrapper) -> str | None:
        """Return the column type of a `DateTimeField`."""
        return DateTimeField().db_type(connection)

    def get_db_prep_value(
        self, value: Any, connection: BaseDatabaseWrapper, prepared: bool = False
    ) -> Any:
        """Return the moment as the vendor's column takes it."""
        if not prepared:
            value = self.get_prep_value(value)
        if not isinstance(value, datetime):
            return value
        if django_timezone.is_naive(value):
            value = django_timezone.make_aware(value, django_timezone.get_default_timezone())
        return backend_for(connection).moment_to_db(value.astimezone(timezone.utc))

    def from_db_value(
        self, value: Any, expression: object, connection: BaseDatabaseWrapper
    ) -> datetime | None:
        """Return the moment in Django's convention."""
        if value is None:
            return None
        moment = backend_for(connection).moment_from_db(value)
        if moment.tzinfo is None and not settings.USE_TZ:
            return moment
        return in_convention(moment)


class DistributedLock(models.Model):
    """A lock's row. Free means `expires_at <= now` on the database's clock.

    Never write it by hand and never point a foreign key at it: inserting one share-locks the row
    and makes a free lock busy. Every column has a default in the database, so that a release of
    this library that does not know a new column can still insert during a rolling deploy.
    Durations are microseconds.
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
    losses = models.BigIntegerField(db_default=0)
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
