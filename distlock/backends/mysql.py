"""MySQL and MariaDB: one statement per verb where they have it, on `UTC_TIMESTAMP(6)`.

`NOW()` follows the session's time zone, and `UNIX_TIMESTAMP(NOW(6))` repeats an hour in autumn.
UTC_TIMESTAMP stands still within a statement, so it is read once. An UPDATE cannot skip locked
rows, but the SELECT in a derived table can: the row is chosen there and joined, by primary key
and not by a scan, which would wait for its neighbours. In a single-table
UPDATE, assignments run from left to right and later ones see the new values.

# Note [Old snapshots]
Above READ COMMITTED a transaction that reads the row by name also locks the gap before it, and so
every new name that would go there, until it ends. So `guard`, and a release inside a transaction,
find the row's id without a lock and lock by that. At SERIALIZABLE no read is without a lock, and
new names next to one that is guarded must wait.

Where MariaDB has `innodb_snapshot_isolation` (from 11.6 on it is the default), a transaction may
not even lock a row that was written after its snapshot, and each renewal writes it. What is done to
the lock's row is fenced by owner and token and must see what is there now, so for those statements,
and for no other of the transaction's, that check is off. The snapshot stays as it is.

# Note [Constant rows]
A row that is named by the whole of a unique key is read before the rest of the WHERE is looked at,
and stays locked until the transaction ends if that does not fit. What is found in a range is let go
again (at READ COMMITTED). Who waits for a turn must not keep a lock from a look that was in vain:
who has the turn might wait for the row, and neither would know.

Django counts matched rows (CLIENT.FOUND_ROWS), so an upsert's row count cannot tell a grant from
a refusal: the owner that comes back does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from django.db import DatabaseError

from .base import (
    TABLE,
    Claim,
    Grant,
    Held,
    Holder,
    Seen,
    Unlock,
    error_code,
    holder_of,
    parameters_of,
)
from .examine import mysql as examination
from .generic import Generic
from .plans import Plans, Statement

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.backends.utils import CursorWrapper

    from ..findings import Finding


def _us(moment: str) -> str:
    return f"TIMESTAMPDIFF(MICROSECOND, '1970-01-01', {moment})"


NOW = "UTC_TIMESTAMP(6)"
COLUMNS = (
    f"name, owner, fencing_token, {_us('acquired_at')}, {_us('expires_at')}, "
    "host, pid, thread, note"
)
IDENTITY = "DATABASE()"
FIELD = re.compile(r"%\(\w+\)s|" + re.escape(IDENTITY))
GRANTED = f"fencing_token, {_us('acquired_at')}, {_us('expires_at')}, {IDENTITY}"
ROW = "name = %(name)s AND slot = %(slot)s"
MINE = "(owner = %(owner)s OR (owner = '' AND fencing_token = %(token)s))"
OURS = f"{ROW} AND {MINE}"
ALIVE = f"(owner = %(owner)s AND expires_at > {NOW})"  # see Note [A grant is found again]
NOBODYS = "(owner = '' AND ttl = 0)"  # see Note [Nobody's row] in `base.py`
RESUMED = "(owner = '' AND thread = %(thread)s AND %(resumes)s)"

GRANT = f"""
UPDATE (
    SELECT id, owner NOT IN ('', %(owner)s) AS lost, owner <> %(owner)s AS anew, {ALIVE} AS alive
    FROM {TABLE}
    WHERE {ROW} AND (expires_at <= {NOW} OR {NOBODYS} OR {RESUMED} OR owner = %(owner)s)
    FOR UPDATE SKIP LOCKED
) AS free STRAIGHT_JOIN {TABLE} AS l FORCE INDEX (PRIMARY) ON l.id = free.id
SET l.owner = %(owner)s,
    l.fencing_token = IF(free.alive, l.fencing_token, GREATEST(l.fencing_token + 1, {_us(NOW)})),
    l.acquired_at = {NOW},
    l.expires_at = {NOW} + INTERVAL %(first)s MICROSECOND, l.ttl = %(ttl)s,
    l.host = %(host)s, l.pid = %(pid)s, l.thread = %(thread)s, l.note = %(note)s,
    l.acquisitions = l.acquisitions + free.anew,
    l.waits = l.waits + free.anew * (%(waited)s > 0),
    l.losses = l.losses + free.lost, l.lost_at = IF(free.lost, {NOW}, l.lost_at),
    l.total_wait = l.total_wait + free.anew * %(waited)s,
    l.longest_wait = GREATEST(l.longest_wait, %(waited)s)"""


def _planned(name: str, sql: str) -> Statement:
    """Return a statement for MariaDB; MySQL's EXECUTE takes nothing but variables.

    Which database is current is among the values, for while a plan is executed, that is the one
    that it was made in.
    """
    text = FIELD.sub("?", sql).replace("'", "''")
    values = ", ".join(field[0] for field in FIELD.finditer(sql))
    return Statement(
        sql,
        prepare=f"PREPARE {name} FROM '{text}'",
        execute=f"EXECUTE {name} USING {values}",
        forget=f"DEALLOCATE PREPARE {name}",
    )


def _insert(mark: str) -> str:
    return f"""
INSERT INTO {TABLE} (name, slot, owner, fencing_token, acquired_at, expires_at, ttl,
    host, pid, thread, note, acquisitions, waits, losses,
    total_hold, longest_hold, total_wait, longest_wait)
VALUES (%(name)s, %(slot)s, %(owner)s, GREATEST({_us(NOW)}, COALESCE({mark}, 0)),
    {NOW}, {NOW} + INTERVAL %(first)s MICROSECOND, %(ttl)s,
    %(host)s, %(pid)s, %(thread)s, %(note)s, 1, %(waited)s > 0, 0, 0, 0,
    %(waited)s, %(waited)s)"""


# An INSERT that reads the mark itself waits for a purge, whatever the isolation level.
MARK = f"SELECT fencing_token + 1 FROM {TABLE} WHERE name = '' AND slot = 0"
INSERT = _insert("%(mark)s")
READ_BACK = f"SELECT {GRANTED} FROM {TABLE} WHERE {ROW} AND owner = %(owner)s"
EXISTS = f"SELECT 1 FROM {TABLE} WHERE {ROW}"

AT_ONCE = "SET STATEMENT innodb_lock_wait_timeout = 0 FOR"
LATEST = "SET STATEMENT innodb_snapshot_isolation = OFF FOR"
UNDONE = (1020, 1213)
"""What a statement that had to wait may end with: as if it had not been sent."""
NOT_NOW = (1205, 3572)
"""What NOWAIT says on a locked row: MariaDB, MySQL."""

LOST = f"(expires_at <= {NOW} AND owner NOT IN ('', VALUES(owner)))"
ANEW = f"((expires_at <= {NOW} OR {NOBODYS} OR {RESUMED}) AND owner <> VALUES(owner))"
# What counts comes before the owner: after it a grant that was found again looks like a new one.
# The owner is unique, so that it tells in the later assignments whether the first took effect.
UPSERT = _planned(
    "distlock_grant",
    f"""
{AT_ONCE} {_insert(f"({MARK})")}
ON DUPLICATE KEY UPDATE
    fencing_token = IF(expires_at <= {NOW} OR {NOBODYS} OR {RESUMED},
        GREATEST(fencing_token + 1, {_us(NOW)}), fencing_token),
    losses = losses + {LOST},
    lost_at = IF({LOST}, {NOW}, lost_at),
    acquisitions = acquisitions + {ANEW},
    waits = waits + {ANEW} * VALUES(waits),
    total_wait = total_wait + {ANEW} * VALUES(total_wait),
    owner = IF(expires_at <= {NOW} OR {NOBODYS} OR {RESUMED} OR owner = VALUES(owner),
        VALUES(owner), owner),
    acquired_at = IF(owner = VALUES(owner), VALUES(acquired_at), acquired_at),
    ttl = IF(owner = VALUES(owner), VALUES(ttl), ttl),
    host = IF(owner = VALUES(owner), VALUES(host), host),
    pid = IF(owner = VALUES(owner), VALUES(pid), pid),
    thread = IF(owner = VALUES(owner), VALUES(thread), thread),
    note = IF(owner = VALUES(owner), VALUES(note), note),
    longest_wait = IF(owner = VALUES(owner),
        GREATEST(longest_wait, VALUES(longest_wait)), longest_wait),
    expires_at = IF(owner = VALUES(owner), VALUES(expires_at), expires_at)
RETURNING owner, {GRANTED}""",
)

SINCE = f"LEAST(acquired_at, {NOW})"  # the clock may have been set back meanwhile


def _released(unheld: str = "owner = ''", lost: str = "") -> str:
    return f"""{lost}
    total_hold = total_hold
        + IF({unheld}, 0, TIMESTAMPDIFF(MICROSECOND, {SINCE}, {NOW})),
    longest_hold = GREATEST(longest_hold,
        IF({unheld}, 0, TIMESTAMPDIFF(MICROSECOND, {SINCE}, {NOW}))),
    ttl = IF(TIMESTAMPDIFF(MICROSECOND, {SINCE}, {NOW}) < %(min_hold)s, %(min_hold)s, 0),
    expires_at = GREATEST({NOW}, {SINCE} + INTERVAL %(min_hold)s MICROSECOND)"""


LATE = f"owner <> '' AND expires_at <= {NOW}"  # see Note [What counts] in `stats.py`
LOST_BY_RELEASE = f"""
    losses = losses + ({LATE}),
    lost_at = IF({LATE}, {NOW}, lost_at),"""
RELEASED = _released()
RELEASED_ALONE = _released(f"owner = '' OR expires_at <= {NOW}", LOST_BY_RELEASE)

RELEASE = f"UPDATE {TABLE} SET {RELEASED}, owner = '' WHERE {OURS}"
RELEASE_ALONE = _planned(
    "distlock_release", f"UPDATE {TABLE} SET {RELEASED_ALONE}, owner = '' WHERE {OURS}"
)
FIND = f"SELECT id FROM {TABLE} WHERE {OURS}"
RELEASE_FOUND = f"UPDATE {TABLE} SET {RELEASED}, owner = '' WHERE id = %(id)s AND {MINE}"

FREE = f"""
UPDATE (
    SELECT id AS mine_id FROM {TABLE} WHERE {ROW} AND owner = %(owner)s FOR UPDATE SKIP LOCKED
) AS mine STRAIGHT_JOIN {TABLE} FORCE INDEX (PRIMARY) ON id = mine_id
SET {RELEASED}, owner = ''"""

# With its LIMIT the derived table is read first, and without a lock.
GUARD = f"""
SELECT 1 FROM (
    SELECT id FROM {TABLE} WHERE {ROW} AND owner = %(owner)s AND fencing_token = %(token)s LIMIT 1
) AS mine STRAIGHT_JOIN {TABLE} AS l FORCE INDEX (PRIMARY) ON l.id = mine.id
WHERE l.owner = %(owner)s AND l.fencing_token = %(token)s
LOCK IN SHARE MODE"""

HOLDER = f"""
SELECT {COLUMNS} FROM {TABLE} WHERE {ROW} AND expires_at > {NOW} AND NOT {NOBODYS}"""


LOOK = f"""
SELECT name, slot, fencing_token,
    IF({NOBODYS}, 0, TIMESTAMPDIFF(MICROSECOND, {NOW}, expires_at)) FROM {TABLE}
WHERE (name, slot) IN """


class MySQL(Generic):
    """MySQL 8.0.17 and later. It has neither RETURNING nor a lock timeout of 0."""

    exact_collation = "utf8mb4_0900_bin"
    ddl_commits = True
    contention = frozenset({1205, 1213, 3572, 1020})
    overdue = frozenset({1969, 3024})
    now_sql = {"": NOW}
    clock_sql = _us(NOW)
    share_sql = "FOR SHARE SKIP LOCKED"
    share_lookups = ("pk__gte", "pk__lte")  # see Note [Constant rows]
    _insert_sql = INSERT

    def __init__(self) -> None:
        self._isolation: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
        self._plans: Plans | None = None

    def grant(self, connection: BaseDatabaseWrapper, claim: Claim, waited: float) -> Grant | None:
        parameters = claim.parameters(waited)
        with connection.cursor() as cursor:
            cursor.execute(GRANT, parameters)
            if not cursor.rowcount:
                cursor.execute(EXISTS, parameters)
                if cursor.fetchone():
                    return None
                cursor.execute(MARK)
                mark = cursor.fetchone()
                try:
                    cursor.execute(self._insert_sql, {**parameters, "mark": mark[0] if mark else 0})
                except DatabaseError as error:
                    if error_code(error) == 1062:  # somebody else's insert came first
                        return None
                    raise
            cursor.execute(READ_BACK, parameters)
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
        among = (
            f"FROM {TABLE} FORCE INDEX (distlock_name_slot) WHERE (name, slot, owner) IN ({keys})"
        )
        if not pinned:
            among += f" AND expires_at > {NOW}"
        before = self.clock(connection)
        latest = self._latest(connection) if pinned else nullcontext()
        with latest, connection.cursor() as cursor:
            cursor.execute(
                f"UPDATE (SELECT id {among} FOR UPDATE SKIP LOCKED) AS alive "
                f"STRAIGHT_JOIN {TABLE} AS l FORCE INDEX (PRIMARY) ON l.id = alive.id "
                "SET l.ttl = COALESCE(%s, l.ttl), "
                f"l.expires_at = {NOW} + INTERVAL COALESCE(%s, l.ttl) MICROSECOND",
                [*values, ttl, ttl],
            )
            cursor.execute(f"SELECT owner, {_us('expires_at')}, ttl {among}", values)
            rows = cursor.fetchall()
        # An older expiry says that the row was locked. What this process knows of the expiry says
        # nothing: the answer to a renewal may have been lost.
        return {owner: expires if expires >= before + ttl else None for owner, expires, ttl in rows}

    def release(self, connection: BaseDatabaseWrapper, held: Held, *, alone: bool) -> bool:
        if alone:
            return self._release_alone(connection, held)
        with self._latest(connection), connection.cursor() as cursor:
            if not self.snapshot_isolation(connection):
                cursor.execute(RELEASE, parameters_of(held))
                return bool(cursor.rowcount == 1)
            cursor.execute(FIND, parameters_of(held))
            found = cursor.fetchone()
            if found:
                cursor.execute(RELEASE_FOUND, {**parameters_of(held), "id": found[0]})
            return bool(found and cursor.rowcount == 1)

    def _release_alone(self, connection: BaseDatabaseWrapper, held: Held) -> bool:
        with connection.cursor() as cursor:
            try:
                self._send(connection, cursor, RELEASE_ALONE, parameters_of(held))
            except DatabaseError as error:
                if error_code(error) not in UNDONE:
                    raise
                cursor.execute(RELEASE_ALONE.sql, parameters_of(held))
            return bool(cursor.rowcount == 1)

    def free(self, connection: BaseDatabaseWrapper, held: Held) -> Unlock:
        with connection.cursor() as cursor:
            cursor.execute(FREE, parameters_of(held))
            if cursor.rowcount:
                return Unlock.FREED
            cursor.execute(READ_BACK, parameters_of(held))
            return Unlock.PINNED if cursor.fetchone() else Unlock.GONE

    def guard(self, connection: BaseDatabaseWrapper, held: Held) -> bool:
        with self._latest(connection), connection.cursor() as cursor:
            cursor.execute(GUARD, parameters_of(held))
            return cursor.fetchone() is not None

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
            cursor.execute(f"{LOOK} ({among})", [part for key in keys for part in key])
            return {
                (name, slot): Seen(token, max(0, time_left))
                for name, slot, token, time_left in cursor.fetchall()
            }

    def delete(self, connection: BaseDatabaseWrapper, table: str, ids: Sequence[int]) -> None:
        # In this order: for a list of most ids the whole table is read, whatever index is forced,
        # and waited for what is locked. One by one, a row costs a message.
        with connection.cursor() as cursor:
            cursor.execute(
                f"{self._safe_sql} l FROM "
                "JSON_TABLE(%s, '$[*]' COLUMNS (id BIGINT PATH '$')) AS gone "
                f"STRAIGHT_JOIN {table} AS l FORCE INDEX (PRIMARY) ON l.id = gone.id",
                [json.dumps(list(ids))],
            )

    # -- what the database can do (force_release and purge are the portable ones) ----------------

    def identity(self, connection: BaseDatabaseWrapper) -> Any:
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT {IDENTITY}")
            return cursor.fetchone()[0]

    def snapshot_isolation(self, connection: BaseDatabaseWrapper) -> bool:
        connection.ensure_connection()
        physical = connection.connection
        if physical not in self._isolation:
            variable = "tx_isolation" if self._is_mariadb else "transaction_isolation"
            with connection.cursor() as cursor:
                cursor.execute(f"SELECT @@{variable}")
                level = cursor.fetchone()[0]
            self._isolation[physical] = level in ("REPEATABLE-READ", "SERIALIZABLE")
        return self._isolation[physical]

    minimum_version: tuple[int, ...] = (8, 0, 17)
    _is_mariadb = False
    _limit_sql = "@@max_execution_time / 1000"
    _safe_sql = "DELETE /*+ SET_VAR(sql_safe_updates = 0) */"
    """A DELETE whose join names its rows. That setting takes a list of them for the whole table."""

    @contextmanager
    def _transaction(self, connection: BaseDatabaseWrapper) -> Iterator[None]:
        with super()._transaction(connection), self._latest(connection):
            yield

    def _send(
        self,
        connection: BaseDatabaseWrapper,
        cursor: CursorWrapper,
        statement: Statement,
        parameters: Mapping[str, Any],
    ) -> None:
        """Execute a statement that is sent again and again."""
        if self._plans is None:
            cursor.execute(statement.sql, parameters)
        else:
            self._plans.run(connection, cursor, statement, parameters)

    def _is_pinned(self, cursor: CursorWrapper, name: str, slot: int) -> bool:
        # A plain SELECT would do, but at SERIALIZABLE it waits.
        try:
            cursor.execute(f"{EXISTS} FOR UPDATE NOWAIT", {"name": name, "slot": slot})
        except DatabaseError as error:
            if error_code(error) in NOT_NOW:
                return True
            raise
        return cursor.fetchone() is not None

    def _latest(self, connection: BaseDatabaseWrapper) -> AbstractContextManager[None]:
        """Let statements on the lock table pass an old snapshot; see Note [Old snapshots]."""
        return nullcontext()

    def private_settings(self, settings_dict: dict[str, Any]) -> dict[str, Any]:
        options = settings_dict["OPTIONS"]
        options["isolation_level"] = "read committed"
        options["connect_timeout"] = min(int(options.get("connect_timeout") or 5), 5)
        options["init_command"] = self._session_limits(options.get("init_command"))
        return settings_dict

    @contextmanager
    def _patient(self, connection: BaseDatabaseWrapper, seconds: float) -> Iterator[None]:
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT {self._limit_sql}")
            own = float(cursor.fetchone()[0])
        limit = min(seconds, own or seconds)  # one of the session that is stricter stays

        def execute(run: Any, sql: str, *more: Any) -> Any:
            return run(self._stopping(sql, limit), *more)

        with connection.execute_wrapper(execute):
            yield

    def _stopping(self, sql: str, seconds: float) -> str:
        """Return a SELECT that the server stops after that long."""
        hint = f"SELECT /*+ MAX_EXECUTION_TIME({max(1, int(seconds * 1000))}) */"
        return sql.replace("SELECT", hint, 1) if sql.startswith("SELECT") else sql

    def examine(self, connection: BaseDatabaseWrapper, tables: Sequence[str]) -> Iterator[Finding]:
        return examination.examine(connection, tables, self.minimum_version)

    def _session_limits(self, init_command: str | None) -> str:
        limits = (  # a renewal of many leases joins them, which safe updates refuse
            "SET SESSION innodb_lock_wait_timeout = 1, lock_wait_timeout = 5, sql_safe_updates = 0"
        )
        return f"{init_command}; {limits}" if init_command else limits


class MariaDBPlans(Plans):
    """What a session has read once. It is planned each time, so it does not become a bad plan.

    The table is that of the settings' database, whichever is current: what is granted after USE,
    and then refused, can be given back. See Note [One table] in `places.py`.
    """

    gone = (1243, 1295, 1461, 1615)
    """It does not exist, cannot be made, would be one too many, or does not fit any more."""

    def prepare(self, connection: BaseDatabaseWrapper, statement: Statement) -> str:
        """Return what has the statement read."""
        home = connection.ops.quote_name(connection.settings_dict["NAME"]).replace("'", "''")
        return statement.prepare.replace(TABLE, f"{home}.{TABLE}")

    def is_direct(self, connection: BaseDatabaseWrapper, cursor: CursorWrapper) -> bool:
        """Whether it is the session that the driver has opened."""
        # With its name it is no text that a proxy answers by itself, as ProxySQL does without.
        cursor.execute("SELECT CONNECTION_ID() AS id")
        own = getattr(connection.connection, "thread_id", lambda: None)
        return bool(cursor.fetchone()[0] == own())


class MariaDB(MySQL):
    """MariaDB 10.6 and later: the grant is one upsert that never waits and returns the row."""

    exact_collation = "utf8mb4_nopad_bin"
    share_sql = "LOCK IN SHARE MODE SKIP LOCKED"
    minimum_version = (10, 6)
    _is_mariadb = True
    _limit_sql = "@@max_statement_time"
    _safe_sql = "SET STATEMENT sql_safe_updates = 0 FOR DELETE"
    _insert_sql = f"{AT_ONCE} {INSERT}"

    def __init__(self) -> None:
        super().__init__()
        self._knows: dict[tuple[int, ...], bool] = {}
        self._plans = MariaDBPlans()

    def grant(self, connection: BaseDatabaseWrapper, claim: Claim, waited: float) -> Grant | None:
        for _ in range(GAP_TRIES):
            try:
                with connection.cursor() as cursor:
                    self._send(connection, cursor, UPSERT, claim.parameters(waited))
                    owner, *granted = cursor.fetchone()
                return Grant(*granted) if owner == claim.owner else None
            except DatabaseError as error:
                if not self.is_contention(error):
                    raise
            try:  # the row is pinned, or only the mark is, or the gap that a new name goes to
                return super().grant(connection, claim, waited)
            except DatabaseError as error:
                if not self.is_contention(error):
                    raise
        return None

    def _session_limits(self, init_command: str | None) -> str:
        limits = super()._session_limits(init_command)
        return f"{limits}, max_statement_time = 5"

    def _stopping(self, sql: str, seconds: float) -> str:
        if not sql.startswith("SELECT"):
            return sql
        return f"SET STATEMENT max_statement_time = {seconds:.3f} FOR {sql}"

    @contextmanager
    def _latest(self, connection: BaseDatabaseWrapper) -> Iterator[None]:
        if not self._has_snapshot_isolation(connection):
            yield
            return

        def execute(run: Any, sql: str, *more: Any) -> Any:
            return run(f"{LATEST} {sql}" if TABLE in sql else sql, *more)

        with connection.execute_wrapper(execute):
            yield

    def _has_snapshot_isolation(self, connection: BaseDatabaseWrapper) -> bool:
        """Whether the server knows the setting, which came in the middle of several series."""
        version = connection.get_database_version()
        if version not in self._knows:
            with connection.cursor() as cursor:
                cursor.execute("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'")
                self._knows[version] = cursor.fetchone() is not None
        return self._knows[version]


GAP_TRIES = 10
"""An upsert that meets a duplicate locks the gap before it for the length of the statement."""
