"""What is wrong with a project's set-up, from the settings down to the database and its clock.

`settings_findings` asks nobody, `server_findings` asks the server about itself: the system checks
are these two, and `diagnose`, which is `manage.py lock_doctor`, adds what takes the tables.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.db import Error, NotSupportedError, connections, router

from .backends import backend_for, backend_unasked
from .backends.base import EPOCH, MICROSECOND
from .backends.examine import refused
from .conf import problems, settings
from .deadlines import seconds
from .findings import Code, Finding
from .models import NAMED, DistributedLock
from .states import duration

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import QuerySet

THREADS = 2
"""How many threads of a process use the database at once, if nobody says."""
APART = 2_000_000
"""Microseconds by which two clocks may differ: below that it is nobody's mistake."""
QUARTER = 900_000_000
WEEK = 7 * 24 * 3600
SAMPLE = 10_000
"""How many rows are looked at, the oldest or the newest ones."""

KINDS = {"unknown": Code.UNKNOWN_SETTING, "invalid": Code.INVALID_SETTING}


def diagnose(alias: str | None = None, threads: int = THREADS) -> list[Finding]:
    """Return all that is wrong with an alias, by default that of the settings."""
    found = list(settings_findings(alias, threads))
    if any(problems()):
        return found
    connection = connections[alias or settings().USING]
    try:
        connection.ensure_connection()
        found += server_findings(connection)
        found += _clocks(connection)
        found += _isolation(connection)
        if Code.READ_ONLY not in {finding.code for finding in found}:
            found += _table_findings(connection)
    except NotSupportedError as error:
        told = f"Django refuses this server: {error}"
        found.append(Finding(Code.OLD_VERSION, told, "Upgrade the server."))
    except (Error, ImproperlyConfigured) as error:
        found.append(_no_answer(connection, error))
    return found


def settings_findings(alias: str | None = None, threads: int = THREADS) -> Iterator[Finding]:
    """Yield what is wrong with the settings, without asking a database."""
    faults = [Finding(KINDS[kind], message) for kind, message in problems()]
    yield from faults
    if faults:  # not even the alias is known
        return
    connection = connections[alias or settings().USING]
    yield from _routing(connection)
    yield from backend_unasked(connection).examine_settings(connection, threads)


def server_findings(connection: BaseDatabaseWrapper) -> Iterator[Finding]:
    """Yield what the server says about itself, if it can be reached."""
    backend = backend_for(connection)
    try:
        yield from backend.examine(connection, list(_columns()))
    except Error as error:
        yield Finding(
            Code.NOT_EXAMINED,
            f"The server could not be asked about itself: {str(error).strip()}",
            "Locks may work well. If this is a plain PostgreSQL, MariaDB or MySQL, please report "
            "it.",
        )


def _columns() -> dict[str, list[str]]:
    """Return the columns of the app's tables, by table, but for the key."""
    return {
        model._meta.db_table: [
            field.column
            for field in model._meta.local_concrete_fields
            if field.column and not field.primary_key
        ]
        for model in apps.get_app_config("distlock").get_models()
    }


def _routing(connection: BaseDatabaseWrapper) -> Iterator[Finding]:
    """Yield what says that the alias is a replica. Locks do not ask routers where to go."""
    alias = connection.alias
    remedy = "Let DISTLOCK['USING'] name an alias that is written to{}."
    if mirrored := connection.settings_dict["TEST"].get("MIRROR"):
        yield Finding(
            Code.ROUTED_ELSEWHERE,
            f"Locks are kept in {alias!r}, which is a replica of {mirrored!r} by its TEST MIRROR.",
            remedy.format(f", such as {mirrored!r}"),
        )
    writes = _writes_to()
    if writes and writes != alias:
        yield Finding(
            Code.ROUTED_ELSEWHERE,
            f"Locks are kept in {alias!r}, but DATABASE_ROUTERS send the writes of this app to "
            f"{writes!r}.",
            remedy.format(f", or let the routers answer {alias!r} for the app 'distlock'"),
        )
    if not router.allow_migrate_model(alias, DistributedLock):
        yield Finding(
            Code.ROUTED_ELSEWHERE,
            f"Locks are kept in {alias!r}, where DATABASE_ROUTERS allow no table of theirs.",
            remedy.format(", or let the routers allow the app 'distlock' there"),
        )


def _writes_to() -> str | None:
    """Return the alias that a router names, and not the one that Django falls back to."""
    for one in router.routers:
        named: str | None = getattr(one, "db_for_write", lambda model: None)(DistributedLock)
        if named:
            return named
    return None


def _no_answer(connection: BaseDatabaseWrapper, error: Exception) -> Finding:
    said = str(error).strip()
    return Finding(
        Code.NO_ANSWER,
        f"The database {connection.alias!r} cannot be asked. It says: {said}",
        "Check that it runs, and what DATABASES says of it.",
    )


# -- what takes the tables -------------------------------------------------------------------


def _table_findings(connection: BaseDatabaseWrapper) -> Iterator[Finding]:
    """Yield what is wrong with the tables, and with what stands in them."""
    missing = list(_missing(connection))
    yield from missing
    if not missing:
        refusals = list(_privileges(connection))
        yield from refusals
        if not refusals:
            yield from _rows(connection)


def _clocks(connection: BaseDatabaseWrapper) -> Iterator[Finding]:
    before = time.time_ns() // 1000
    theirs = backend_for(connection).clock(connection)
    after = time.time_ns() // 1000
    apart = max(before - theirs, theirs - after)
    if apart <= APART:
        return
    side = "ahead of" if theirs > after else "behind"
    odd = apart % QUARTER
    zone = min(odd, QUARTER - odd) < APART + after - before and apart > QUARTER / 2
    yield Finding(
        Code.CLOCKS_DIFFER,
        f"The database's clock is {duration(apart)} {side} this host's. Leases count on the "
        "database's alone; but one of the two is wrong, and when it is the database's, setting it "
        "right ends leases early, or late.",
        "One of them seems to keep local time as if it were UTC: set its time zone, and then its "
        "clock."
        if zone
        else "Let both follow a time server (NTP), and set the clock slowly, without a jump.",
    )


def _isolation(connection: BaseDatabaseWrapper) -> Iterator[Finding]:
    if backend_for(connection).snapshot_isolation(connection):
        yield Finding(
            Code.SNAPSHOTS,
            "Transactions are REPEATABLE READ or SERIALIZABLE here: in such a one no lock can be "
            "taken, because what it reads was fixed before the lock was held.",
            "Use READ COMMITTED, or take each lock before its transaction begins, as atomic=True "
            "does.",
        )


def _missing(connection: BaseDatabaseWrapper) -> Iterator[Finding]:
    """Yield tables and columns that are not there."""
    remedy = f"Run manage.py migrate distlock --database={connection.alias}."
    there = set(connection.introspection.table_names())
    for table, columns in _columns().items():
        if table not in there:
            yield Finding(Code.NO_TABLE, f"The table {table} is missing, or hidden.", remedy)
            continue
        with connection.cursor() as cursor:
            given = connection.introspection.get_table_description(cursor, table)
        if lacking := sorted(set(columns) - {column.name for column in given}):
            lack = ", ".join(lacking)
            yield Finding(Code.NO_TABLE, f"The table {table} has no column {lack}.", remedy)


def _privileges(connection: BaseDatabaseWrapper) -> Iterator[Finding]:
    for table, columns in _columns().items():
        if refusals := list(refused(connection, table, columns)):
            kinds = ", ".join(kind for kind, _ in refusals)
            yield Finding(
                Code.NO_PRIVILEGE,
                f"{kinds} on the table {table} is refused: {str(refusals[0][1]).strip()}",
                f"Grant SELECT, INSERT, UPDATE and DELETE on {table} to the user of the "
                "application, on a server that takes writes.",
            )


def _rows(connection: BaseDatabaseWrapper) -> Iterator[Finding]:
    rows = DistributedLock.objects.using(connection.alias).filter(NAMED)
    now = backend_for(connection).clock(connection)
    yield from _set_back(rows, now)
    yield from _not_purged(rows, now)


def _set_back(rows: QuerySet[DistributedLock], now: int) -> Iterator[Finding]:
    latest = rows.filter(acquired_at__gt=_moment(now + APART))
    # By key, whatever it finds: an index that could say it at once would slow down each grant.
    if edge := rows.order_by("-pk").values_list("pk", flat=True)[SAMPLE : SAMPLE + 1].first():
        latest = latest.filter(pk__gt=edge)
    if row := latest.order_by("-acquired_at").first():
        yield Finding(
            Code.CLOCK_SET_BACK,
            f"The database's clock was set back: the lock {str(row)!r} was acquired at a time that "
            "is still to come. Until then a dead holder's lock may be kept longer than its ttl; "
            "tokens go on growing.",
            "Let the server's clock follow a time server (NTP), and set it slowly. What is kept "
            "too long can be freed by manage.py release_lock.",
        )


def _not_purged(rows: QuerySet[DistributedLock], now: int) -> Iterator[Finding]:
    after = seconds(settings().PURGE_AFTER, "PURGE_AFTER") + WEEK
    oldest = rows.order_by("pk")
    if edge := oldest.values_list("pk", flat=True)[SAMPLE : SAMPLE + 1].first():
        oldest = oldest.filter(pk__lt=edge)
    ended = oldest.filter(expires_at__lt=_moment(now - int(after * 1_000_000)))
    if count := ended.count():
        of = "" if edge is None else f" of the {SAMPLE} oldest"
        yield Finding(
            Code.NOT_PURGED,
            f"Leases{of} ended more than {duration(int(after * 1_000_000))} ago: {count}. It seems "
            "that nobody deletes such rows, so that the table grows with each new name.",
            "Run manage.py purge_locks every day, from cron, on as many hosts as you like.",
        )


def _moment(microseconds: int) -> datetime:
    return EPOCH + microseconds * MICROSECOND
