"""SQLite: one writer at a time, so the write lock of the file is the row lock.

For development and single hosts. The clock counts milliseconds; moments are kept as text with six
digits, which compares in order. 'now' stands still within a statement, so it is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..deadlines import Limit
from .base import TABLE, Claim, Grant, Held, Holder, Seen, Unlock, holder_of, parameters_of
from .examine import sqlite as examination
from .generic import Generic

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    from ..findings import Finding


def _in(microseconds: str) -> str:
    """Return the moment that many microseconds from now."""
    return f"strftime('%%Y-%%m-%%d %%H:%%M:%%f', 'now', {_seconds(microseconds)}) || '000'"


def _seconds(microseconds: str) -> str:
    return f"printf('%%.3f seconds', {microseconds} / 1000000.0)"


def _us(moment: str) -> str:
    return f"(CAST(round((julianday({moment}) - 2440587.5) * 86400000) AS INTEGER) * 1000)"


NOW = "strftime('%%Y-%%m-%%d %%H:%%M:%%f', 'now') || '000'"
COLUMNS = (
    f"name, owner, fencing_token, {_us('acquired_at')}, {_us('expires_at')}, "
    "host, pid, thread, note"
)
GRANTED = f"fencing_token, {_us('acquired_at')}, {_us('expires_at')}"
ROW = "name = %(name)s AND slot = %(slot)s"
NOBODYS = "(owner = '' AND ttl = 0)"  # see Note [Nobody's row] in `base.py`
RESUMED = "(owner = '' AND thread = %(thread)s AND %(resumes)s)"
ALIVE = f"owner = excluded.owner AND expires_at > {NOW}"  # see Note [A grant is found again]
ANEW = "(owner <> excluded.owner)"
LOST = "(owner NOT IN ('', excluded.owner))"
OURS = f"{ROW} AND (owner = %(owner)s OR (owner = '' AND fencing_token = %(token)s))"

BUSY = f"""
SELECT 1 FROM {TABLE}
WHERE {ROW} AND expires_at > {NOW} AND NOT {NOBODYS} AND NOT {RESUMED}
    AND owner <> %(owner)s"""

GRANT = f"""
INSERT INTO {TABLE} (name, slot, owner, fencing_token, acquired_at, expires_at, ttl,
    host, pid, thread, note, acquisitions, waits, losses,
    total_hold, longest_hold, total_wait, longest_wait)
VALUES (%(name)s, %(slot)s, %(owner)s,
    MAX({_us("'now'")}, COALESCE((SELECT m.fencing_token + 1 FROM {TABLE} m
        WHERE m.name = '' AND m.slot = 0), 0)),
    {NOW}, {_in("%(first)s")}, %(ttl)s, %(host)s, %(pid)s, %(thread)s, %(note)s, 1,
    %(waited)s > 0, 0, 0, 0, %(waited)s, %(waited)s)
ON CONFLICT (name, slot) DO UPDATE SET owner = excluded.owner,
    fencing_token = CASE WHEN {ALIVE} THEN fencing_token
        ELSE MAX(fencing_token + 1, {_us("'now'")}) END,
    acquired_at = excluded.acquired_at, expires_at = excluded.expires_at, ttl = excluded.ttl,
    host = excluded.host, pid = excluded.pid, thread = excluded.thread, note = excluded.note,
    acquisitions = acquisitions + {ANEW}, waits = waits + {ANEW} * excluded.waits,
    losses = losses + {LOST}, lost_at = CASE WHEN {LOST} THEN {NOW} ELSE lost_at END,
    total_wait = total_wait + {ANEW} * excluded.total_wait,
    longest_wait = MAX(longest_wait, excluded.longest_wait)
WHERE expires_at <= {NOW} OR {NOBODYS} OR {RESUMED} OR owner = excluded.owner
RETURNING {GRANTED}"""

SINCE = f"MIN(acquired_at, {NOW})"  # the clock may have been set back meanwhile


def _release(unheld: str = "owner = ''", lost: str = "") -> str:
    return f"""
UPDATE {TABLE} SET owner = '',
    expires_at = MAX({NOW}, strftime('%%Y-%%m-%%d %%H:%%M:%%f', {SINCE},
        {_seconds("%(min_hold)s")}) || '000'),
    ttl = CASE WHEN {_us("'now'")} - {_us(SINCE)} < %(min_hold)s THEN %(min_hold)s ELSE 0 END,
    total_hold = total_hold + CASE WHEN {unheld} THEN 0
        ELSE {_us("'now'")} - {_us(SINCE)} END,
    longest_hold = MAX(longest_hold, CASE WHEN {unheld} THEN 0
        ELSE {_us("'now'")} - {_us(SINCE)} END){lost}
WHERE {OURS}"""


LATE = f"(owner <> '' AND expires_at <= {NOW})"  # see Note [What counts] in `stats.py`
LOST_BY_RELEASE = f""",
    losses = losses + {LATE}, lost_at = CASE WHEN {LATE} THEN {NOW} ELSE lost_at END"""
RELEASE = _release()
RELEASE_ALONE = _release(f"owner = '' OR expires_at <= {NOW}", LOST_BY_RELEASE)

STEPS = 10_000
"""Of SQLite's machine, after which it is asked whether time is up: less than a millisecond."""

TAKE_WRITE_LOCK = f"UPDATE {TABLE} SET owner = owner WHERE id = -1"

HOLDER = f"""
SELECT {COLUMNS} FROM {TABLE} WHERE {ROW} AND expires_at > {NOW} AND NOT {NOBODYS}"""


LOOK = f"""
SELECT name, slot, fencing_token,
    CASE WHEN {NOBODYS} THEN 0 ELSE {_us("expires_at")} - {_us("'now'")} END FROM {TABLE}
WHERE (name, slot) IN """


class SQLite(Generic):
    """SQLite 3.35 and later."""

    private_connection = False
    now_sql = {"": NOW}
    clock_sql = _us("'now'")

    def grant(self, connection: BaseDatabaseWrapper, claim: Claim, waited: float) -> Grant | None:
        parameters = claim.parameters(waited)
        with connection.cursor() as cursor:
            cursor.execute(BUSY, parameters)  # a read does not take the file's write lock
            if cursor.fetchone():
                return None
            cursor.execute(GRANT, parameters)
            row = cursor.fetchone()
        return Grant(*row) if row else None

    def renew(
        self,
        connection: BaseDatabaseWrapper,
        held: Sequence[Held],
        ttl: int | None = None,
        *,
        pinned: bool = False,
    ) -> Mapping[str, int | None]:
        keys = ", ".join(["(%s, %s, %s)"] * len(held))
        values = [part for lease in held for part in (lease.name, lease.slot, lease.owner)]
        alive = "" if pinned else f"AND expires_at > {NOW} "
        with connection.cursor() as cursor:
            cursor.execute(
                f"UPDATE {TABLE} SET ttl = COALESCE(%s, ttl), "
                f"expires_at = {_in('COALESCE(%s, ttl)')} "
                f"WHERE (name, slot, owner) IN (VALUES {keys}) {alive}"
                f"RETURNING owner, {_us('expires_at')}",
                [ttl, ttl, *values],
            )
            return dict(cursor.fetchall())

    def release(self, connection: BaseDatabaseWrapper, held: Held, *, alone: bool) -> bool:
        with connection.cursor() as cursor:
            cursor.execute(RELEASE_ALONE if alone else RELEASE, parameters_of(held))
            return bool(cursor.rowcount == 1)

    def free(self, connection: BaseDatabaseWrapper, held: Held) -> Unlock:
        with connection.cursor() as cursor:
            cursor.execute(f"{RELEASE} AND owner <> ''", parameters_of(held))
            return Unlock.FREED if cursor.rowcount else Unlock.GONE

    def guard(self, connection: BaseDatabaseWrapper, held: Held) -> bool:
        # The write that takes the file's write lock to the end of the transaction.
        with connection.cursor() as cursor:
            cursor.execute(
                f"UPDATE {TABLE} SET owner = owner WHERE {ROW} AND owner = %(owner)s "
                "AND fencing_token = %(token)s",
                parameters_of(held),
            )
            return bool(cursor.rowcount == 1)

    def holder(self, connection: BaseDatabaseWrapper, name: str, slot: int) -> Holder | None:
        with connection.cursor() as cursor:
            cursor.execute(HOLDER, {"name": name, "slot": slot})
            row = cursor.fetchone()
        return holder_of(row) if row else None

    def look(
        self, connection: BaseDatabaseWrapper, keys: Sequence[tuple[str, int]], *, mark: bool = True
    ) -> Mapping[tuple[str, int], Seen]:
        among = ", ".join(["(%s, %s)"] * len(keys))
        with connection.cursor() as cursor:
            cursor.execute(f"{LOOK} (VALUES {among})", [part for key in keys for part in key])
            return {
                (name, slot): Seen(token, max(0, time_left))
                for name, slot, token, time_left in cursor.fetchall()
            }

    @contextmanager
    def _transaction(self, connection: BaseDatabaseWrapper) -> Iterator[None]:
        with super()._transaction(connection), connection.cursor() as cursor:
            cursor.execute(TAKE_WRITE_LOCK)  # a transaction that begins by reading may not write
            yield

    def _for_update(
        self,
        connection: BaseDatabaseWrapper,
        columns: str,
        where: str,
        *,
        wait: bool,
        table: str = TABLE,
    ) -> str:
        return f"SELECT {columns} FROM {table} WHERE {where}"

    # -- what the database can do (force_release and purge are the portable ones) ----------------

    def commit_done(self, connection: BaseDatabaseWrapper) -> bool | None:
        return not connection.connection.in_transaction

    def is_contention(self, error: BaseException) -> bool:
        return super().is_contention(error) or "database is locked" in str(error)

    @contextmanager
    def _patient(self, connection: BaseDatabaseWrapper, seconds: float) -> Iterator[None]:
        connection.ensure_connection()
        physical, deadline = connection.connection, Limit(seconds)
        physical.set_progress_handler(lambda: deadline.left <= 0, STEPS)
        try:
            yield
        finally:
            physical.set_progress_handler(None, STEPS)

    def is_overdue(self, error: BaseException) -> bool:
        return "interrupted" in str(error)

    def in_memory(self, connection: BaseDatabaseWrapper) -> bool:
        name = str(connection.settings_dict["NAME"])
        return ":memory:" in name or "mode=memory" in name

    def examine_settings(self, connection: BaseDatabaseWrapper, threads: int) -> Iterator[Finding]:
        return examination.examine_settings(self.in_memory(connection))

    def examine(self, connection: BaseDatabaseWrapper, tables: Sequence[str]) -> Iterator[Finding]:
        return examination.examine(connection)
