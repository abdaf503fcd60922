"""The portable way: SELECT .. FOR UPDATE, then a write, in a short transaction.

Standard SQL, with Django's own knowledge of how a database spells a row lock. It is what an
unknown vendor gets, and the reference that the others are tested against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

from django.db import DatabaseError, IntegrityError, NotSupportedError

from ..findings import Code, Finding
from .base import (
    EPOCH,
    MICROSECOND,
    TABLE,
    Backend,
    Claim,
    Grant,
    Held,
    Holder,
    Pinned,
    Seen,
    Trace,
    Unlock,
    holder_of,
    microseconds_of,
    trace_of,
)
from .stats import COUNTERS, LockStats, stats_of

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.backends.utils import CursorWrapper

COLUMNS = "name, owner, fencing_token, acquired_at, expires_at, host, pid, thread, note, ttl"
ROW = "name = %(name)s AND slot = %(slot)s"

INSERT = f"""
INSERT INTO {TABLE} (name, slot, owner, fencing_token, acquired_at, expires_at, ttl,
    host, pid, thread, note, acquisitions, waits, losses,
    total_hold, longest_hold, total_wait, longest_wait)
VALUES (%(name)s, %(slot)s, %(owner)s, %(token)s, %(now)s, %(expires)s, %(ttl)s,
    %(host)s, %(pid)s, %(thread)s, %(note)s, %(acquisitions)s,
    CASE WHEN %(waited)s > 0 THEN 1 ELSE 0 END, 0, 0, 0, %(waited)s, %(waited)s)"""

GRANT = f"""
UPDATE {TABLE} SET owner = %(owner)s, fencing_token = %(token)s, acquired_at = %(now)s,
    expires_at = %(expires)s, ttl = %(ttl)s, host = %(host)s, pid = %(pid)s,
    thread = %(thread)s, note = %(note)s, acquisitions = acquisitions + %(anew)s,
    waits = waits + CASE WHEN %(waited)s > 0 THEN 1 ELSE 0 END,
    losses = losses + %(lost)s, lost_at = CASE WHEN %(lost)s > 0 THEN %(now)s ELSE lost_at END,
    total_wait = total_wait + %(waited)s,
    longest_wait = CASE WHEN longest_wait < %(waited)s THEN %(waited)s ELSE longest_wait END
WHERE {ROW}"""

RENEW = f"UPDATE {TABLE} SET ttl = %(ttl)s, expires_at = %(expires)s WHERE {ROW}"

RELEASE = f"""
UPDATE {TABLE} SET owner = '', expires_at = %(expires)s, ttl = %(kept)s,
    losses = losses + %(lost)s, lost_at = CASE WHEN %(lost)s > 0 THEN %(now)s ELSE lost_at END,
    total_hold = total_hold + %(held)s,
    longest_hold = CASE WHEN longest_hold < %(held)s THEN %(held)s ELSE longest_hold END
WHERE {ROW}"""

FORCE_RELEASE = f"""
UPDATE {TABLE} SET owner = '', fencing_token = %(token)s, expires_at = %(now)s, ttl = 0,
    losses = losses + %(lost)s, lost_at = CASE WHEN %(lost)s > 0 THEN %(now)s ELSE lost_at END
WHERE {ROW}"""

RAISE_MARK = f"""
UPDATE {TABLE} SET fencing_token = %(token)s WHERE {ROW} AND fencing_token < %(token)s"""

STATS = f"SELECT {COUNTERS}, lost_at FROM {TABLE} WHERE {ROW}"

NOBODY: dict[str, Any] = {
    "owner": "",
    "ttl": 0,
    "host": "",
    "pid": 0,
    "thread": "",
    "note": "",
    "acquisitions": 0,
    "waited": 0,
}


class Generic(Backend):
    """Any Django database: correct, and as fast as its row locks."""

    now_sql: ClassVar[Mapping[str, str]] = {
        "oracle": "SYS_EXTRACT_UTC(SYSTIMESTAMP)",
        "microsoft": "SYSUTCDATETIME()",
        "": "CURRENT_TIMESTAMP",
    }
    clock_sql: ClassVar[str | None] = None
    """The SQL for the clock in microseconds; `None`: for the moment, which is then converted."""

    def grant(self, connection: BaseDatabaseWrapper, claim: Claim, waited: float) -> Grant | None:
        parameters = claim.parameters(waited)
        try:
            with self._transaction(connection), connection.cursor() as cursor:
                if not self._exists(cursor, claim.name, claim.slot):
                    return self._insert(connection, cursor, parameters)
                row = self._locked(connection, cursor, claim.name, claim.slot)
                if row is None:
                    return None
                return self._regrant(connection, cursor, parameters, row)
        except IntegrityError:
            return None

    def renew(
        self,
        connection: BaseDatabaseWrapper,
        held: Sequence[Held],
        ttl: int | None = None,
        *,
        pinned: bool = False,
    ) -> Mapping[str, int | None]:
        renewed: dict[str, int | None] = {}
        with self._transaction(connection), connection.cursor() as cursor:
            for lease in held:
                row = self._locked(connection, cursor, lease.name, lease.slot)
                if row is None:
                    if self._is_pinned(cursor, lease.name, lease.slot):
                        renewed[lease.owner] = None
                    continue
                now = self.clock(connection)
                if row[1] != lease.owner or (self._us(row[4]) <= now and not pinned):
                    continue
                span = row[9] if ttl is None else ttl
                key = {"name": lease.name, "slot": lease.slot, "ttl": span}
                cursor.execute(RENEW, {**key, "expires": self._db(now + span)})
                renewed[lease.owner] = now + span
        return renewed

    def release(self, connection: BaseDatabaseWrapper, held: Held, *, alone: bool) -> bool:
        with self._transaction(connection), connection.cursor() as cursor:
            row = self._locked(connection, cursor, held.name, held.slot, wait=True)
            if row is None or row[1] not in (held.owner, ""):
                return False
            if row[1] == "" and row[2] != held.token:
                return False
            self._write_release(connection, cursor, held, row, alone=alone)
            return True

    def free(self, connection: BaseDatabaseWrapper, held: Held) -> Unlock:
        with self._transaction(connection), connection.cursor() as cursor:
            row = self._locked(connection, cursor, held.name, held.slot)
            if row is None:
                pinned = self._is_pinned(cursor, held.name, held.slot)
                return Unlock.PINNED if pinned else Unlock.GONE
            if row[1] != held.owner:
                return Unlock.GONE
            self._write_release(connection, cursor, held, row)
            return Unlock.FREED

    def trace(self, connection: BaseDatabaseWrapper, held: Held) -> Trace:
        with self._transaction(connection), connection.cursor() as cursor:
            row = self._locked(connection, cursor, held.name, held.slot)
            if row is not None:
                return trace_of(row[1], row[2], held)
            pinned = self._is_pinned(cursor, held.name, held.slot)
            return Trace.PINNED if pinned else Trace.GONE

    def guard(self, connection: BaseDatabaseWrapper, held: Held) -> bool:
        with connection.cursor() as cursor:
            row = self._locked(connection, cursor, held.name, held.slot, wait=True)
            return row is not None and row[1] == held.owner and row[2] == held.token

    def holder(self, connection: BaseDatabaseWrapper, name: str, slot: int) -> Holder | None:
        now = self.clock(connection)
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT {COLUMNS} FROM {TABLE} WHERE {ROW}", {"name": name, "slot": slot}
            )
            row = cursor.fetchone()
        if row is None or self._is_over(row, now):
            return None
        acquired = self._us(row[3]) if row[3] is not None else 0
        return holder_of((*row[:3], acquired, self._us(row[4]), *row[5:9]))

    def stats(self, connection: BaseDatabaseWrapper, name: str, slot: int) -> LockStats | None:
        with connection.cursor() as cursor:
            cursor.execute(STATS, {"name": name, "slot": slot})
            row = cursor.fetchone()
        if row is None:
            return None
        return stats_of(name, (*row[:-1], None if row[-1] is None else self._us(row[-1])))

    def look(
        self, connection: BaseDatabaseWrapper, keys: Sequence[tuple[str, int]], *, mark: bool = True
    ) -> Mapping[tuple[str, int], Seen]:
        now = self.clock(connection)
        among = " OR ".join(["(name = %s AND slot = %s)"] * len(keys))
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT {COLUMNS}, slot FROM {TABLE} WHERE {among}",
                [part for key in keys for part in key],
            )
            return {
                (row[0], row[-1]): Seen(
                    row[2], 0 if self._is_over(row, now) else self._us(row[4]) - now
                )
                for row in cursor.fetchall()
            }

    def force_release(
        self,
        connection: BaseDatabaseWrapper,
        name: str,
        slot: int,
        token: int,
        *,
        owner: str | None = None,
    ) -> int | None:
        with self._transaction(connection), connection.cursor() as cursor:
            row = self._locked(connection, cursor, name, slot)
            if row is None:
                if self._is_pinned(cursor, name, slot):
                    raise Pinned(f"The lock {name!r} is in use by a running transaction.")
                return None
            now = self.clock(connection)
            if row[2] != token or self._is_over(row, now):
                return None
            if owner is not None and row[1] != owner:
                return None
            raised = max(token + 1, now)
            written: dict[str, Any] = {"name": name, "slot": slot, "token": raised}
            written |= {"now": self._db(now), "lost": int(row[1] != "")}
            cursor.execute(FORCE_RELEASE, written)
            return raised

    def purge(
        self, connection: BaseDatabaseWrapper, older_than: int, after: int, limit: int
    ) -> tuple[int, int] | None:
        ended = self._db(self.clock(connection) - older_than)
        expired = f"FROM {TABLE} WHERE name <> '' AND expires_at <= %s AND id > %s ORDER BY id"
        first = connection.ops.limit_offset_sql(0, limit)
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT id {expired} {first}", [ended, after])
            ids = [row[0] for row in cursor.fetchall()]
        if not ids:
            return None
        among = f"id IN ({', '.join(['%s'] * len(ids))})"
        with self._transaction(connection), connection.cursor() as cursor:
            cursor.execute(
                self._for_update(
                    connection,
                    "id, fencing_token",
                    f"{among} AND expires_at <= %s",
                    wait=False,
                ),
                [*ids, ended],
            )
            rows = cursor.fetchall()
            if rows:
                self.delete(connection, TABLE, [row[0] for row in rows])
                self._raise_mark(connection, cursor, max(row[1] for row in rows))
        return len(rows), ids[-1]

    def age(
        self,
        connection: BaseDatabaseWrapper,
        table: str,
        columns: Sequence[str],
        microseconds: int,
    ) -> None:
        older = ", ".join(f"{column} = %s" for column in columns)
        names = ", ".join(["id", *columns])
        with self._transaction(connection), connection.cursor() as cursor:
            cursor.execute(self._for_update(connection, names, "1 = 1", wait=False, table=table))
            for key, *values in cursor.fetchall():
                moments = [
                    value if value is None else self._db(self._us(value) - microseconds)
                    for value in values
                ]
                cursor.execute(f"UPDATE {table} SET {older} WHERE id = %s", [*moments, key])

    # -- what the database can do ----------------------------------------------------------------

    def clock(self, connection: BaseDatabaseWrapper) -> int:
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT {self.clock_sql}" if self.clock_sql else self._select_now(connection)
            )
            value = cursor.fetchone()[0]
        return value if isinstance(value, int) else microseconds_of(self.moment_from_db(value))

    def clock_us(self, connection: BaseDatabaseWrapper) -> str:
        return self.clock_sql or super().clock_us(connection)

    def examine_settings(self, connection: BaseDatabaseWrapper, threads: int) -> Iterator[Finding]:
        if not connection.features.has_select_for_update:
            yield Finding(
                Code.UNSUPPORTED,
                f"{connection.display_name} has no SELECT .. FOR UPDATE, which locks need.",
                "Let DISTLOCK['USING'] name a database that has it, such as PostgreSQL.",
            )

    def now(self, connection: BaseDatabaseWrapper) -> str:
        return self.now_sql.get(connection.vendor, self.now_sql[""])

    def _select_now(self, connection: BaseDatabaseWrapper) -> str:
        return f"SELECT {self.now(connection)}{connection.features.bare_select_suffix}"

    @contextmanager
    def _transaction(self, connection: BaseDatabaseWrapper) -> Iterator[None]:
        with transaction(connection):
            yield

    # -- pieces ----------------------------------------------------------------------------------

    def _locked(
        self,
        connection: BaseDatabaseWrapper,
        cursor: CursorWrapper,
        name: str,
        slot: int,
        *,
        wait: bool = False,
    ) -> Any:
        """Return the row, locked FOR UPDATE; `None` if it is not there or locked by another."""
        try:
            cursor.execute(
                self._for_update(connection, COLUMNS, ROW, wait=wait),
                {"name": name, "slot": slot},
            )
        except DatabaseError as error:
            if self.is_contention(error):
                raise Pinned(str(error)) from error
            raise
        return cursor.fetchone()

    def _for_update(
        self,
        connection: BaseDatabaseWrapper,
        columns: str,
        where: str,
        *,
        wait: bool,
        table: str = TABLE,
    ) -> str:
        features = connection.features
        skip = not wait and features.has_select_for_update_skip_locked
        nowait = not wait and not skip and features.has_select_for_update_nowait
        if not features.has_select_for_update:
            raise NotSupportedError(
                f"distlock needs SELECT .. FOR UPDATE, which {connection.vendor} does not have."
            )
        lock = connection.ops.for_update_sql(nowait=nowait, skip_locked=skip)
        if features.for_update_after_from:
            return f"SELECT {columns} FROM {table} {lock} WHERE {where}"
        return f"SELECT {columns} FROM {table} WHERE {where} {lock}"

    def _exists(self, cursor: CursorWrapper, name: str, slot: int) -> bool:
        cursor.execute(f"SELECT 1 FROM {TABLE} WHERE {ROW}", {"name": name, "slot": slot})
        return cursor.fetchone() is not None

    def _is_pinned(self, cursor: CursorWrapper, name: str, slot: int) -> bool:
        """Whether a row that could not be locked is there at all."""
        return self._exists(cursor, name, slot)

    def _is_over(self, row: Any, now: int) -> bool:
        """Whether the row is free; see Note [Nobody's row] in `base.py`."""
        return self._us(row[4]) <= now or (row[1] == "" and row[9] == 0)

    def _insert(
        self, connection: BaseDatabaseWrapper, cursor: CursorWrapper, parameters: dict[str, Any]
    ) -> Grant:
        cursor.execute(f"SELECT fencing_token FROM {TABLE} WHERE {ROW}", {"name": "", "slot": 0})
        mark = cursor.fetchone()
        now = self.clock(connection)
        grant = Grant(max(now, mark[0] + 1 if mark else 0), now, now + parameters["first"])
        cursor.execute(INSERT, {**parameters, **self._given(grant), "acquisitions": 1})
        return grant

    def _regrant(
        self,
        connection: BaseDatabaseWrapper,
        cursor: CursorWrapper,
        parameters: dict[str, Any],
        row: Any,
    ) -> Grant | None:
        now = self.clock(connection)
        owner, token, thread = row[1], row[2], row[7]
        resumed = owner == "" and thread == parameters["thread"] and parameters["resumes"]
        alive = not (resumed or self._is_over(row, now))
        if alive and owner != parameters["owner"]:
            return None
        grant = Grant(token if alive else max(now, token + 1), now, now + parameters["first"])
        anew = int(owner != parameters["owner"])
        lost = int(owner not in ("", parameters["owner"]))
        counted = {"anew": anew, "lost": lost, "waited": parameters["waited"] * anew}
        cursor.execute(GRANT, {**parameters, **self._given(grant), **counted})
        return grant

    def _given(self, grant: Grant) -> dict[str, Any]:
        return {
            "token": grant.token,
            "now": self._db(grant.acquired_us),
            "expires": self._db(grant.expires_us),
        }

    def _write_release(
        self,
        connection: BaseDatabaseWrapper,
        cursor: CursorWrapper,
        held: Held,
        row: Any,
        *,
        alone: bool = False,
    ) -> None:
        now = self.clock(connection)
        acquired = min(now, self._us(row[3]))  # the clock may have been set back meanwhile
        late = alone and row[1] != "" and self._us(row[4]) <= now
        cursor.execute(
            RELEASE,
            {
                "name": held.name,
                "slot": held.slot,
                "expires": self._db(max(now, acquired + held.min_hold_us)),
                "kept": held.min_hold_us if now - acquired < held.min_hold_us else 0,
                "held": now - acquired if row[1] and not late else 0,
                "lost": int(late),
                "now": self._db(now),
            },
        )

    def _raise_mark(
        self, connection: BaseDatabaseWrapper, cursor: CursorWrapper, token: int
    ) -> None:
        """Raise the reserved row to `token`; see Note [High-water mark]."""
        key: dict[str, Any] = {"name": "", "slot": 0}
        if not self._exists(cursor, "", 0):
            blank: dict[str, Any] = {**key, **self._given(Grant(token, 0, 0)), **NOBODY}
            with suppress(IntegrityError), transaction(connection):  # another purge made it
                cursor.execute(INSERT, blank)
        cursor.execute(RAISE_MARK, {**key, "token": token})

    def _us(self, value: Any) -> int:
        return microseconds_of(self.moment_from_db(value))

    def _db(self, microseconds: int) -> Any:
        return self.moment_to_db(EPOCH + microseconds * MICROSECOND)


@contextmanager
def transaction(connection: BaseDatabaseWrapper) -> Iterator[None]:
    """A short transaction on this very connection object, or a savepoint inside an open one.

    `django.db.transaction.atomic` knows only the connections that are registered by alias.
    """
    if connection.in_atomic_block or not connection.get_autocommit():
        sid = str(connection.savepoint())
        try:
            yield
        except BaseException:
            # Not by the method that is wrapped, which would write again what just failed.
            with connection.cursor() as cursor:
                cursor.execute(connection.ops.savepoint_rollback_sql(sid))
            raise
        connection.savepoint_commit(sid)
        return
    connection.set_autocommit(False, force_begin_transaction_with_broken_autocommit=True)
    done = False
    try:
        yield
        connection.commit()
        done = True
    finally:
        if not done:
            _roll_back(connection)
        if connection.connection is not None:
            connection.set_autocommit(True)


def _roll_back(connection: BaseDatabaseWrapper) -> None:
    try:
        connection.rollback()
    except DatabaseError:
        connection.close()
