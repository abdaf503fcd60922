from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.apps import apps
from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.management import call_command
from django.db import IntegrityError, connection, connections
from django.db.models import F
from django.utils import timezone as django_timezone

from distlock import lock
from distlock.backends import backend_for
from distlock.backends.base import Holder, microseconds_of, moment_of
from distlock.models import NAMED, DistributedLock
from tests.conformance.rows import MINUTE, TABLE, claim, execute, microseconds, query, stored, take

pytestmark = pytest.mark.django_db(transaction=True)

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MICROSECOND = timedelta(microseconds=1)


def convention(moment: datetime) -> datetime:
    """An aware moment as Django's users write it: aware with USE_TZ, else naive and local."""
    if settings.USE_TZ:
        return moment
    return django_timezone.make_naive(moment, ZoneInfo(settings.TIME_ZONE))


# -- the columns ---------------------------------------------------------------------------------


def columns() -> dict[str, tuple[bool, bool]]:
    """Of each column: whether it may be null, and whether the database has a default for it."""
    if connection.vendor == "sqlite":
        found = query(f"PRAGMA table_info({TABLE})")
        return {name: (not notnull or pk, default) for _, name, _, notnull, default, pk in found}
    schema = "current_schema()" if connection.vendor == "postgresql" else "database()"
    generated = "is_identity = 'YES'" if connection.vendor == "postgresql" else "extra <> ''"
    found = query(
        f"SELECT column_name, is_nullable = 'YES', column_default IS NOT NULL OR {generated} "
        f"FROM information_schema.columns WHERE table_schema = {schema} AND table_name = '{TABLE}'"
    )
    return {name: (bool(nullable), bool(default)) for name, nullable, default in found}


def test_every_column_has_a_default_in_the_database_or_may_be_null() -> None:
    found = columns()
    assert set(found) == {field.column for field in DistributedLock._meta.local_concrete_fields}
    assert [
        name for name, (nullable, default) in found.items() if not nullable and not default
    ] == []


def test_a_release_that_knows_only_name_and_slot_can_insert() -> None:
    execute(f"INSERT INTO {TABLE} (name, slot) VALUES (%s, %s)", ["n", 0])
    row = DistributedLock.objects.get()
    assert (row.owner, row.fencing_token, row.acquisitions, row.note) == ("", 0, 0, "")
    assert row.acquired_at is None
    assert microseconds(row.expires_at) == 0 == stored().expires_at
    with lock("n") as lease:
        assert lease.token > 0


def test_a_row_of_the_orm_has_the_same_defaults() -> None:
    DistributedLock.objects.create(name="n")
    row = stored()
    assert (row.slot, row.owner, row.fencing_token, row.expires_at) == (0, "", 0, 0)


def test_name_and_slot_are_unique_together() -> None:
    DistributedLock.objects.create(name="n", slot=0)
    DistributedLock.objects.create(name="n", slot=1)
    DistributedLock.objects.create(name="N", slot=0)
    with pytest.raises(IntegrityError):
        DistributedLock.objects.create(name="n", slot=1)


def test_only_the_key_and_the_name_are_indexed() -> None:
    """An index on what a renewal writes would end PostgreSQL's cheap updates (HOT)."""
    with connection.cursor() as cursor:
        found = connection.introspection.get_constraints(cursor, TABLE)
    indexed = {tuple(one["columns"]) for one in found.values() if one["index"] or one["unique"]}
    assert indexed - {("id",)} == {("name", "slot")}


def test_no_foreign_key_points_at_the_model() -> None:
    """Inserting one would share-lock the row and make a free lock busy."""
    related = [
        field
        for model in apps.get_models(include_auto_created=True)
        for field in model._meta.get_fields()
        if field.is_relation and field.related_model is DistributedLock
    ]
    assert related == []
    assert [field for field in DistributedLock._meta.get_fields() if field.is_relation] == []
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names(cursor):
            for one in connection.introspection.get_constraints(cursor, table).values():
                assert (one["foreign_key"] or ("",))[0] != TABLE


@pytest.mark.usetz
@pytest.mark.parametrize("alias", ["default", "other"])
def test_the_migrations_are_complete(alias: str) -> None:
    """On every vendor and with USE_TZ on and off: nothing in them depends on either."""
    said = io.StringIO()
    call_command("makemigrations", "distlock", check=True, dry_run=True, stdout=said)
    assert "No changes" in said.getvalue()
    assert connections[alias].vendor == connection.vendor


def test_the_name_has_the_exact_collation_of_its_vendor() -> None:
    with connection.cursor() as cursor:
        described = connection.introspection.get_table_description(cursor, TABLE)
    collation = next(column.collation for column in described if column.name == "name")
    assert collation == backend_for(connection).exact_collation


def test_the_orm_sorts_and_finds_names_exactly() -> None:
    names = ["Report", "r\u00e9port", "report", "report "]
    for name in names:
        DistributedLock.objects.create(name=name)
    for name in names:
        assert DistributedLock.objects.get(name=name).name == name
    assert len(set(DistributedLock.objects.values_list("name", flat=True).distinct())) == 4


def test_a_row_is_shown_by_its_name() -> None:
    assert str(DistributedLock(name="n", slot=0)) == "n"
    assert str(DistributedLock(name="n", slot=2)) == "n [2]"


def test_the_reserved_row_is_not_among_the_named() -> None:
    DistributedLock.objects.create(name="", fencing_token=7)
    DistributedLock.objects.create(name=" ")
    assert [row.name for row in DistributedLock.objects.filter(NAMED)] == [" "]


def test_nobody_may_add_change_or_delete_a_lock_by_permission() -> None:
    assert DistributedLock._meta.default_permissions == ("view",)
    assert [name for name, _ in DistributedLock._meta.permissions] == ["force_release"]


# -- moments -------------------------------------------------------------------------------------

NEW_YORK = ZoneInfo("America/New_York")
AUTUMN = datetime(2026, 11, 1, 5, 30, tzinfo=timezone.utc)  # 01:30 in New York, for the first time
MOMENTS = {
    "summer": datetime(2026, 7, 1, 12, 34, 56, 789012, tzinfo=timezone.utc),
    "winter": datetime(2026, 1, 15, 23, 59, 59, 999999, tzinfo=timezone.utc),
    "before the clocks go back": AUTUMN,
    "after the clocks went back": AUTUMN + timedelta(hours=1),  # 01:30 again
    "as the clocks go forward": datetime(2026, 3, 8, 7, 0, tzinfo=timezone.utc),
    "1970": EPOCH,
    "a microsecond": EPOCH + MICROSECOND,
    "2038": datetime(2038, 1, 19, 3, 14, 8, 1, tzinfo=timezone.utc),
}
each_moment = pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usetz
def test_the_suite_runs_where_the_hour_repeats() -> None:
    local = [MOMENTS[name].astimezone(NEW_YORK) for name in list(MOMENTS)[2:4]]
    assert settings.TIME_ZONE == "America/New_York"
    assert local[0].replace(tzinfo=None) == local[1].replace(tzinfo=None)


@pytest.mark.usetz
@each_moment
def test_a_moment_makes_the_round_trip_and_is_stored_as_utc(moment: datetime) -> None:
    with no_warnings():
        DistributedLock.objects.create(name="n", expires_at=convention(moment))
        row = DistributedLock.objects.get(expires_at=convention(moment))
    assert row.expires_at == convention(moment)
    assert microseconds(row.expires_at) == microseconds_of(moment) == stored().expires_at
    row.save()
    assert stored().expires_at == microseconds_of(moment)


@pytest.mark.usetz
@each_moment
def test_the_orm_reads_what_a_statement_wrote(moment: datetime) -> None:
    us = microseconds_of(moment)
    DistributedLock.objects.create(name="n")
    execute(
        {
            "postgresql": f"UPDATE {TABLE} SET acquired_at = "
            "timestamptz 'epoch' + %s * interval '1 microsecond'",
            "mysql": f"UPDATE {TABLE} SET acquired_at = '1970-01-01' + INTERVAL %s MICROSECOND",
            "sqlite": f"UPDATE {TABLE} SET acquired_at = "
            "strftime('%%Y-%%m-%%d %%H:%%M:%%S', %s / 1000000, 'unixepoch') || "
            f"'.{us % 1_000_000:06}'",
        }[connection.vendor],
        [us],
    )
    acquired = DistributedLock.objects.get().acquired_at
    assert microseconds(acquired) == us
    assert acquired == convention(moment)


@pytest.mark.usetz
@each_moment
def test_a_moment_of_the_api_is_in_the_convention_of_the_orm(moment: datetime) -> None:
    shown = moment_of(microseconds_of(moment))
    assert shown == convention(moment)
    assert microseconds(shown) == microseconds_of(moment)
    assert django_timezone.is_aware(shown) == settings.USE_TZ


@pytest.mark.usetz
def test_the_orm_agrees_with_a_grant() -> None:
    backend = backend_for(connection)
    grant = backend.grant(connection, claim(), 0)
    assert grant is not None
    row = DistributedLock.objects.get()
    assert microseconds(row.acquired_at) == grant.acquired_us
    assert microseconds(row.expires_at) == grant.expires_us
    assert row.expires_at - row.acquired_at == MINUTE * MICROSECOND
    holder = backend.holder(connection, "n", 0)
    assert isinstance(holder, Holder)
    assert (holder.acquired_at, holder.expires_at) == (row.acquired_at, row.expires_at)
    assert django_timezone.is_aware(row.expires_at) == settings.USE_TZ


@pytest.mark.usetz
def test_a_lease_agrees_with_the_row() -> None:
    with lock("n") as lease:
        row = DistributedLock.objects.get()
        assert (lease.acquired_at, lease.expires_at) == (row.acquired_at, row.expires_at)


@pytest.mark.usetz
def test_the_orm_compares_moments() -> None:
    backend = backend_for(connection)
    take(backend)
    acquired = DistributedLock.objects.get().acquired_at
    assert acquired is not None
    for hours in (-1, 1):
        limit = acquired + timedelta(hours=hours)
        assert DistributedLock.objects.filter(acquired_at__lt=limit).exists() == (hours == 1)
        assert DistributedLock.objects.filter(acquired_at__gt=limit).exists() == (hours == -1)
    assert DistributedLock.objects.filter(expires_at__gt=F("acquired_at")).exists()
    assert DistributedLock.objects.exclude(acquired_at=None).count() == 1


@pytest.mark.usetz
@pytest.mark.parametrize("zone", ["Asia/Seoul", "UTC", "Pacific/Marquesas"])
def test_the_current_time_zone_of_a_request_changes_nothing(zone: str) -> None:
    moment = MOMENTS["summer"]
    with django_timezone.override(zone):
        DistributedLock.objects.create(name="n", expires_at=convention(moment))
        row = DistributedLock.objects.get()
    assert stored().expires_at == microseconds_of(moment)
    assert microseconds(row.expires_at) == microseconds_of(moment)


def test_a_moment_may_be_absent() -> None:
    DistributedLock.objects.create(name="n", acquired_at=None)
    assert DistributedLock.objects.get().acquired_at is None


@pytest.mark.usetz
def test_what_is_no_moment_is_refused() -> None:
    with pytest.raises(ValidationError, match="tomorrow"):
        DistributedLock.objects.create(name="n", expires_at="tomorrow")


def test_a_text_is_taken_as_django_takes_it() -> None:
    row: Any = DistributedLock.objects.create(name="n", expires_at="2026-07-01T12:34:56.789012Z")
    row.refresh_from_db()
    assert microseconds(row.expires_at) == microseconds_of(MOMENTS["summer"])
