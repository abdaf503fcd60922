"""What columns hold, the same on every database: names, moments and values in JSON."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.serializers.json import DjangoJSONEncoder
from django.db import models
from django.utils import timezone as django_timezone

from .backends import backend_for
from .backends.base import in_convention

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models.sql.compiler import SQLCompiler

    CharField = models.CharField[str, str]
    DateTimeField = models.DateTimeField[Any, Any]
    TextField = models.TextField[Any, Any]
else:
    CharField, DateTimeField = models.CharField, models.DateTimeField
    TextField = models.TextField


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


class DatabaseNow(models.Expression):
    """This moment on the database's clock: not Django's `Now()`, which is when a transaction began.

    It is compared in the statement that reads; whoever writes reads `Backend.clock()` once.
    """

    def __init__(self) -> None:
        super().__init__(output_field=UTCDateTimeField())

    def as_sql(self, compiler: SQLCompiler, connection: BaseDatabaseWrapper) -> tuple[str, Any]:
        """Return the vendor's words for it."""
        return backend_for(connection).now(connection), []


class JSONTextField(TextField):
    """A value that JSON can express, kept to the letter.

    The databases' own types for JSON keep less: they sort the keys of an object, round large
    numbers or refuse a NUL in a string, each in its own way.
    """

    def from_db_value(self, value: str | None, *context: object) -> Any:
        """Return the value."""
        return None if value is None else json.loads(value)

    def get_prep_value(self, value: Any) -> Any:
        """Return the text. Raises `TypeError` or `ValueError` if JSON cannot express the value."""
        if value is None or hasattr(value, "resolve_expression"):
            return value
        return json_of(value)

    def to_python(self, value: Any) -> Any:
        """Return the value, which a serializer had as it is."""
        return value

    def value_to_string(self, obj: models.Model) -> Any:
        """Return the value for a serializer, which may put it into JSON as it is."""
        return self.value_from_object(obj)


def json_of(value: Any) -> str:
    """Return the JSON of a value, with what Django knows how to express, such as a `Decimal`.

    Raises `TypeError` or `ValueError` for everything else, `NaN` and infinity included.
    """
    return json.dumps(value, cls=DjangoJSONEncoder, allow_nan=False)
