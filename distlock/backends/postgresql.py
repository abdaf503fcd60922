"""PostgreSQL: every verb is one statement, and the clock is `clock_timestamp()`.

A session that is used often has its statements planned once; see `plans.py`.

`now()` is the start of the transaction: an expiry computed with it in a long transaction has
already passed. Statements that change a row's owner follow Note [FOR UPDATE] in `base.py`.

# Note [Asynchronous release]
A release that is its own transaction sets `synchronous_commit` off for that transaction, in the
same statement: lost in a crash of the server it only means waiting for the expiry. Inside a
caller's transaction the setting would last to its end and make the caller's COMMIT asynchronous,
so there it is never touched.

# Note [Wanted]
NOTIFY in every release would serialise all commits of the database. So a waiter writes into the
row until when it waits, and only a release that finds such a mark notifies, in its own statement:
in a caller's transaction the message is sent with its COMMIT. So does a renewal that lets a lease
end sooner. Grants never clear the mark, for others may wait still; it runs out a second after the
lease that the waiter saw, and whoever then still waits renews it. A message only wakes: the row
decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from django.db import DatabaseError, transaction

from .base import (
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
    error_code,
    holder_of,
    parameters_of,
    trace_of,
)
from .examine import postgresql as examination
from .plans import Plans, Statement
from .stats import COUNTERS, LockStats, stats_of

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.backends.utils import CursorWrapper

    from ..findings import Finding


def _us(moment: str) -> str:
    return f"(extract(epoch FROM {moment}) * 1000000)::bigint"


IDENTITY = f"concat(to_regclass('{TABLE}')::oid, '@', current_database())"
COLUMNS = (
    f"l.name, l.owner, l.fencing_token, {_us('l.acquired_at')}, {_us('l.expires_at')}, "
    "l.host, l.pid, l.thread, l.note"
)
CLOCK = "SELECT clock_timestamp() AS now"
CLOCK_ASYNC = f"{CLOCK}, set_config('synchronous_commit', 'off', true) AS async"
SINCE = "LEAST(l.acquired_at, clock.now)"  # the clock may have been set back meanwhile
ROW = "l.name = %(name)s AND l.slot = %(slot)s"
NOBODYS = "(l.owner = '' AND l.ttl = 0)"  # see Note [Nobody's row]
RESUMED = "(l.owner = '' AND l.thread = %(thread)s AND %(resumes)s = 1)"
ALIVE = "l.owner = %(owner)s AND l.expires_at > clock.now"  # see Note [A grant is found again]
OURS = f"{ROW} AND (l.owner = %(owner)s OR (l.owner = '' AND l.fencing_token = %(token)s))"


def _grant(clock: str) -> str:
    return f"""
WITH clock AS MATERIALIZED ({clock}), free AS (
    SELECT l.id, {ALIVE} AS alive, (l.owner <> %(owner)s)::int AS anew,
        CASE WHEN l.owner IN ('', %(owner)s) THEN 0 ELSE 1 END AS lost
    FROM {TABLE} l, clock
    WHERE {ROW} AND (l.expires_at <= clock.now OR {NOBODYS} OR {RESUMED} OR l.owner = %(owner)s)
    FOR UPDATE OF l SKIP LOCKED
), upd AS (
    UPDATE {TABLE} l SET owner = %(owner)s,
        fencing_token = CASE WHEN free.alive THEN l.fencing_token
            ELSE GREATEST(l.fencing_token + 1, {_us("clock.now")}) END,
        acquired_at = clock.now,
        expires_at = clock.now + %(first)s * interval '1 microsecond', ttl = %(ttl)s,
        host = %(host)s, pid = %(pid)s, thread = %(thread)s, note = %(note)s,
        acquisitions = l.acquisitions + free.anew,
        waits = l.waits + free.anew * (%(waited)s > 0)::int,
        losses = l.losses + free.lost,
        lost_at = CASE WHEN free.lost = 1 THEN clock.now ELSE l.lost_at END,
        total_wait = l.total_wait + free.anew * %(waited)s,
        longest_wait = GREATEST(l.longest_wait, %(waited)s)
    FROM free, clock WHERE l.id = free.id
    RETURNING l.fencing_token, {_us("l.acquired_at")}, {_us("l.expires_at")}
), ins AS (
    INSERT INTO {TABLE} (name, slot, owner, fencing_token, acquired_at, expires_at, ttl,
        host, pid, thread, note, acquisitions, waits, losses,
        total_hold, longest_hold, total_wait, longest_wait)
    SELECT %(name)s, %(slot)s, %(owner)s,
        GREATEST({_us("clock.now")}, (SELECT l.fencing_token + 1 FROM {TABLE} l
            WHERE l.name = '' AND l.slot = 0)),
        clock.now, clock.now + %(first)s * interval '1 microsecond', %(ttl)s,
        %(host)s, %(pid)s, %(thread)s, %(note)s, 1, (%(waited)s > 0)::int, 0, 0, 0,
        %(waited)s, %(waited)s
    FROM clock WHERE NOT EXISTS (SELECT FROM {TABLE} l WHERE {ROW})
    ON CONFLICT (name, slot) DO NOTHING
    RETURNING fencing_token, {_us("acquired_at")}, {_us("expires_at")}
) SELECT granted.*, {IDENTITY} FROM (SELECT * FROM upd UNION ALL SELECT * FROM ins) AS granted"""


def _release(clock: str, unheld: str = "l.owner = ''", lost: str = "") -> str:
    return f"""
UPDATE {TABLE} l SET owner = '',
    expires_at = GREATEST(clock.now, {SINCE} + %(min_hold)s * interval '1 microsecond'),
    ttl = CASE WHEN {_us(f"clock.now - {SINCE}")} < %(min_hold)s THEN %(min_hold)s ELSE 0 END,
    total_hold = l.total_hold + CASE WHEN {unheld} THEN 0
        ELSE {_us(f"clock.now - {SINCE}")} END,
    longest_hold = GREATEST(l.longest_hold, CASE WHEN {unheld} THEN 0
        ELSE {_us(f"clock.now - {SINCE}")} END){lost}
FROM ({clock}) clock WHERE """


LATE = "l.owner <> '' AND l.expires_at <= clock.now"  # see Note [What counts] in `stats.py`
LOST_BY_RELEASE = f""",
    losses = l.losses + ({LATE})::int,
    lost_at = CASE WHEN {LATE} THEN clock.now ELSE l.lost_at END"""
RELEASE_ALONE = _release(CLOCK_ASYNC, "l.owner = '' OR l.expires_at <= clock.now", LOST_BY_RELEASE)


FIELD = re.compile(r"%\((\w+)\)s")
TYPES = {
    **dict.fromkeys(("name", "owner", "host", "thread", "note"), "varchar"),
    **dict.fromkeys(("pid", "token", "ttl", "first", "waited", "min_hold"), "bigint"),
    **dict.fromkeys(("slot", "resumes"), "integer"),
}


def _planned(name: str, sql: str) -> Statement:
    names = list(dict.fromkeys(FIELD.findall(sql)))
    numbered = FIELD.sub(lambda field: f"${names.index(field[1]) + 1}", sql)
    types = ", ".join(TYPES[each] for each in names)
    values = ", ".join(f"%({each})s" for each in names)
    return Statement(
        sql,
        prepare=f"PREPARE {name} ({types}) AS {numbered}",
        execute=f"EXECUTE {name} ({values})",
        forget=f"DEALLOCATE {name}",
    )


GRANT = _planned("distlock_grant", _grant(CLOCK))
GRANT_ASYNC = _planned("distlock_grant_async", _grant(CLOCK_ASYNC))

NOTIFY = (  # see Note [Wanted]
    f"CASE WHEN l.wanted_until > clock.now THEN pg_notify('{TABLE}', l.slot || ' ' || l.name) END"
)
RENEW = f"""
WITH clock AS MATERIALIZED ({CLOCK}), wanted AS (
    SELECT * FROM unnest(%(names)s::varchar[], %(slots)s::int[], %(owners)s::varchar[])
        AS wanted (name, slot, owner)
), alive AS (
    SELECT l.id, l.expires_at FROM {TABLE} l JOIN wanted USING (name, slot, owner), clock
    WHERE l.expires_at > clock.now
    FOR NO KEY UPDATE OF l SKIP LOCKED
), upd AS (
    UPDATE {TABLE} l SET ttl = COALESCE(%(ttl)s, l.ttl),
        expires_at = clock.now + COALESCE(%(ttl)s, l.ttl) * interval '1 microsecond'
    FROM alive, clock WHERE l.id = alive.id
    RETURNING l.owner, {_us("l.expires_at")} AS expires,
        CASE WHEN l.expires_at < alive.expires_at THEN {NOTIFY} END AS sooner
) SELECT owner, expires, sooner FROM upd UNION ALL
SELECT l.owner, NULL, NULL FROM {TABLE} l JOIN wanted USING (name, slot, owner), clock
WHERE l.expires_at > clock.now AND l.owner NOT IN (SELECT owner FROM upd)"""
# No join with upd: its rows are estimated at one, and thousands would be joined in nested loops.

RELEASE = f"{_release(CLOCK)}{OURS} RETURNING {NOTIFY}"
RELEASE_ASYNC = _planned("distlock_release", f"{RELEASE_ALONE}{OURS} RETURNING {NOTIFY}")

FREE = f"""
WITH mine AS (
    SELECT l.id FROM {TABLE} l WHERE {ROW} AND l.owner = %(owner)s FOR UPDATE SKIP LOCKED
), upd AS (
    {_release(CLOCK_ASYNC)} l.id IN (SELECT id FROM mine) RETURNING {NOTIFY}
) SELECT EXISTS (SELECT FROM upd),
    EXISTS (SELECT FROM {TABLE} l WHERE {ROW} AND l.owner = %(owner)s)"""

TRACE = f"""
WITH seen AS (
    SELECT l.owner, l.fencing_token FROM {TABLE} l WHERE {ROW} FOR SHARE SKIP LOCKED
) SELECT seen.owner, seen.fencing_token, EXISTS (SELECT FROM {TABLE} l WHERE {ROW})
FROM (SELECT) AS one LEFT JOIN seen ON true"""

GUARD = f"""
SELECT 1 FROM {TABLE} l WHERE {ROW} AND l.owner = %(owner)s AND l.fencing_token = %(token)s
FOR KEY SHARE"""

HOLDER = f"""
SELECT {COLUMNS} FROM {TABLE} l
WHERE {ROW} AND l.expires_at > clock_timestamp() AND NOT {NOBODYS}"""

STATS = f"SELECT {COUNTERS}, {_us('l.lost_at')} FROM {TABLE} l WHERE {ROW}"

LOOK = f"""
WITH clock AS MATERIALIZED ({CLOCK}), awaited AS (
    SELECT * FROM unnest(%(names)s::varchar[], %(slots)s::int[]) AS awaited (name, slot)
), busy AS (
    SELECT l.id FROM {TABLE} l JOIN awaited USING (name, slot), clock
    WHERE %(mark)s AND l.expires_at > clock.now AND NOT {NOBODYS}
        AND l.wanted_until < l.expires_at
    FOR NO KEY UPDATE OF l SKIP LOCKED
), marked AS (
    UPDATE {TABLE} l SET wanted_until = l.expires_at + interval '1 second'
    FROM busy, clock WHERE l.id = busy.id
    RETURNING l.id, {_us("l.expires_at - clock.now")} AS time_left
) SELECT l.name, l.slot, l.fencing_token,
    COALESCE(marked.time_left,
        CASE WHEN {NOBODYS} THEN 0 ELSE {_us("l.expires_at - clock.now")} END),
    marked.id IS NOT NULL OR l.wanted_until >= l.expires_at
FROM awaited JOIN {TABLE} l USING (name, slot) LEFT JOIN marked USING (id), clock"""

FORCE_RELEASE = f"""
WITH clock AS MATERIALIZED ({CLOCK}), shown AS (
    SELECT l.id FROM {TABLE} l, clock
    WHERE {ROW} AND l.fencing_token = %(token)s AND l.expires_at > clock.now AND NOT {NOBODYS}
        AND l.owner = COALESCE(%(owner)s::text, l.owner)
    FOR UPDATE OF l NOWAIT
) UPDATE {TABLE} l SET owner = '', expires_at = clock.now, ttl = 0,
    losses = l.losses + CASE WHEN l.owner = '' THEN 0 ELSE 1 END,
    lost_at = CASE WHEN l.owner = '' THEN l.lost_at ELSE clock.now END,
    fencing_token = GREATEST(l.fencing_token + 1, {_us("clock.now")})
FROM shown, clock WHERE l.id = shown.id
RETURNING l.fencing_token, {NOTIFY}"""

TIMEOUT = """
SELECT value, extract(epoch FROM value::interval)::float
FROM current_setting('statement_timeout') AS value"""

PURGE = f"""
WITH ended AS (
    SELECT l.id, l.fencing_token FROM {TABLE} l,
        (SELECT clock_timestamp() - %(older_than)s * interval '1 microsecond' AS bound) b
    WHERE l.name <> '' AND l.expires_at <= b.bound AND l.id > %(after)s
    ORDER BY l.id LIMIT %(limit)s
    FOR UPDATE OF l SKIP LOCKED
), mark AS (
    INSERT INTO {TABLE} AS m (name, slot, fencing_token)
    SELECT '', 0, max(fencing_token) FROM ended HAVING count(*) > 0
    ON CONFLICT (name, slot) DO UPDATE
        SET fencing_token = GREATEST(m.fencing_token, EXCLUDED.fencing_token)
), del AS (
    DELETE FROM {TABLE} WHERE id IN (SELECT id FROM ended) RETURNING id
) SELECT count(*), max(id) FROM del"""


class PostgreSQLPlans(Plans):
    """A plan of an empty table is of no use for a full one, so it is made anew now and then."""

    lasts = 60.0
    gone = ("26000", "0A000", "42P05")
    """The plan does not exist, does not fit any more, or exists."""

    def may_fail(self, connection: BaseDatabaseWrapper) -> bool:
        """Whether it may be sent: EXECUTE takes no values that do not stand in its text, either."""
        return connection.connection.autocommit and not connection.settings_dict["OPTIONS"].get(
            "server_side_binding"
        )

    def is_direct(self, connection: BaseDatabaseWrapper, cursor: CursorWrapper) -> bool:
        """Whether it is the session that the driver has opened."""
        cursor.execute("SELECT pg_backend_pid()")
        return bool(cursor.fetchone()[0] == connection.connection.info.backend_pid)


class PostgreSQL(Backend):
    """PostgreSQL 14 and later, with psycopg 3."""

    exact_collation = "C"
    release_keeps_snapshot = True
    guard_blocks_renewal = False
    notifies = True
    batch = 2_000
    overdue = frozenset({"57014"})

    share_sql = "FOR KEY SHARE SKIP LOCKED"

    def __init__(self) -> None:
        self._isolation: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
        self._plans = PostgreSQLPlans()
        self._messages: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()

    def grant(self, connection: BaseDatabaseWrapper, claim: Claim, waited: float) -> Grant | None:
        grant = GRANT if claim.durable else GRANT_ASYNC
        with connection.cursor() as cursor:
            self._plans.run(connection, cursor, grant, claim.parameters(waited))
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
        parameters: dict[str, Any] = {
            "names": [lease.name for lease in held],
            "slots": [lease.slot for lease in held],
            "owners": [lease.owner for lease in held],
            "ttl": ttl,
        }
        with connection.cursor() as cursor:
            cursor.execute(RENEW, parameters)
            return {owner: expires for owner, expires, _ in cursor.fetchall()}

    def release(self, connection: BaseDatabaseWrapper, held: Held, *, alone: bool) -> bool:
        parameters = parameters_of(held)
        with connection.cursor() as cursor:
            if not alone:
                cursor.execute(RELEASE, parameters)
                return bool(cursor.rowcount == 1)
            try:
                self._plans.run(connection, cursor, RELEASE_ASYNC, parameters)
            except DatabaseError as error:
                if error_code(error) != "40001":
                    raise
                cursor.execute(
                    RELEASE_ASYNC.sql, parameters
                )  # above READ COMMITTED: it had to wait
            return bool(cursor.rowcount == 1)

    def free(self, connection: BaseDatabaseWrapper, held: Held) -> Unlock:
        with connection.cursor() as cursor:
            cursor.execute(FREE, parameters_of(held))
            freed, ours = cursor.fetchone()
        if freed:
            return Unlock.FREED
        return Unlock.PINNED if ours else Unlock.GONE

    def trace(self, connection: BaseDatabaseWrapper, held: Held) -> Trace:
        with connection.cursor() as cursor:
            cursor.execute(TRACE, parameters_of(held))
            owner, token, exists = cursor.fetchone()
        if owner is not None:
            return trace_of(owner, token, held)
        return Trace.PINNED if exists else Trace.GONE

    def guard(self, connection: BaseDatabaseWrapper, held: Held) -> bool:
        with connection.cursor() as cursor:
            cursor.execute(GUARD, parameters_of(held))
            return cursor.fetchone() is not None

    def holder(self, connection: BaseDatabaseWrapper, name: str, slot: int) -> Holder | None:
        with connection.cursor() as cursor:
            cursor.execute(HOLDER, {"name": name, "slot": slot})
            row = cursor.fetchone()
        return holder_of(row) if row else None

    def stats(self, connection: BaseDatabaseWrapper, name: str, slot: int) -> LockStats | None:
        with connection.cursor() as cursor:
            cursor.execute(STATS, {"name": name, "slot": slot})
            row = cursor.fetchone()
        return stats_of(name, row) if row else None

    def look(
        self, connection: BaseDatabaseWrapper, keys: Sequence[tuple[str, int]], *, mark: bool = True
    ) -> Mapping[tuple[str, int], Seen]:
        names, slots = map(list, zip(*keys, strict=True))
        with connection.cursor() as cursor:
            cursor.execute(LOOK, {"names": names, "slots": slots, "mark": mark})
            return {
                (name, slot): Seen(token, max(0, time_left), marked)
                for name, slot, token, time_left, marked in cursor.fetchall()
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
        with connection.cursor() as cursor:
            try:
                cursor.execute(
                    FORCE_RELEASE, {"name": name, "slot": slot, "token": token, "owner": owner}
                )
            except DatabaseError as error:
                if self.is_contention(error):
                    raise Pinned(
                        f"The lock {name!r} is in use by a running transaction."
                    ) from error
                raise
            row = cursor.fetchone()
        return row[0] if row else None

    def purge(
        self, connection: BaseDatabaseWrapper, older_than: int, after: int, limit: int
    ) -> tuple[int, int] | None:
        with connection.cursor() as cursor:
            cursor.execute(PURGE, {"older_than": older_than, "after": after, "limit": limit})
            count, last = cursor.fetchone()
        return (count, last) if count else None

    def age(
        self,
        connection: BaseDatabaseWrapper,
        table: str,
        columns: Sequence[str],
        microseconds: int,
    ) -> None:
        older = ", ".join(
            f"{name} = {name} - %(us)s * interval '1 microsecond'" for name in columns
        )
        unlocked = f"SELECT id FROM {table} FOR NO KEY UPDATE SKIP LOCKED"
        with connection.cursor() as cursor:
            cursor.execute(
                f"UPDATE {table} SET {older} WHERE id IN ({unlocked})", {"us": microseconds}
            )

    # -- what the database can do ----------------------------------------------------------------

    def clock(self, connection: BaseDatabaseWrapper) -> int:
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT {self.clock_us(connection)}")
            return int(cursor.fetchone()[0])

    def clock_us(self, connection: BaseDatabaseWrapper) -> str:
        return _us("clock_timestamp()")

    def now(self, connection: BaseDatabaseWrapper) -> str:
        return "clock_timestamp()"

    def identity(self, connection: BaseDatabaseWrapper) -> Any:
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT {IDENTITY}")
            return cursor.fetchone()[0]

    def snapshot_isolation(self, connection: BaseDatabaseWrapper) -> bool:
        connection.ensure_connection()
        physical = connection.connection
        if physical not in self._isolation:
            if physical.isolation_level is not None:  # Django's OPTIONS["isolation_level"]
                level = physical.isolation_level.name.replace("_", " ").lower()
            else:
                with connection.cursor() as cursor:
                    cursor.execute("SELECT current_setting('default_transaction_isolation')")
                    level = cursor.fetchone()[0]
            self._isolation[physical] = level in ("repeatable read", "serializable")
        return self._isolation[physical]

    def transaction_failed(self, connection: BaseDatabaseWrapper) -> bool:
        from psycopg.pq import TransactionStatus

        physical = connection.connection
        return physical is not None and (
            physical.closed or physical.info.transaction_status == TransactionStatus.INERROR
        )

    def commit_done(self, connection: BaseDatabaseWrapper) -> bool | None:
        from psycopg.pq import TransactionStatus

        # Idle says only that it is over: psycopg cancels a COMMIT that Ctrl-C interrupts.
        status = connection.connection.info.transaction_status
        return False if status == TransactionStatus.INTRANS else None

    def listen(self, connection: BaseDatabaseWrapper) -> bool:
        connection.ensure_connection()
        physical = connection.connection
        if physical not in self._messages:
            messages: list[str] = []
            self._messages[physical] = messages
            physical.add_notify_handler(lambda message: messages.append(message.payload))
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            # A pooler makes up a pid of its own, and would hand the session to others.
            if cursor.fetchone()[0] != physical.info.backend_pid:
                return False
            cursor.execute(f"LISTEN {TABLE}")
            return True

    def heard(self, connection: BaseDatabaseWrapper) -> list[tuple[str, int]]:
        physical = connection.connection
        messages = self._messages[physical]  # those that came during a statement
        physical.pgconn.consume_input()
        while message := physical.pgconn.notifies():
            messages.append(message.extra.decode())
        said, messages[:] = messages[:], []
        parts = [message.partition(" ") for message in said]
        return [(name, int(slot)) for slot, _, name in parts]

    def private_settings(self, settings_dict: dict[str, Any]) -> dict[str, Any]:
        options = settings_dict["OPTIONS"]
        for shared in ("pool", "server_side_binding", "isolation_level"):
            options.pop(shared, None)
        options["connect_timeout"] = min(int(options.get("connect_timeout") or 5), 5)
        options.setdefault("keepalives_idle", 15)
        options.setdefault("keepalives_interval", 5)
        options.setdefault("keepalives_count", 3)
        options["application_name"] = "distlock"
        return settings_dict

    @contextmanager
    def bounded(self, connection: BaseDatabaseWrapper, seconds: float) -> Iterator[None]:
        """Send the limits with each statement, in one message and for that transaction only.

        A SET for the session would outlive its owner behind PgBouncer in transaction mode.
        """
        limit = (
            "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; "
            f"SET LOCAL statement_timeout = {max(1, int(seconds * 1000))}; "
        )

        def execute(run: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            result = run(limit + sql, params, many, context)
            while context["cursor"].nextset():
                pass
            return result

        with connection.execute_wrapper(execute):
            yield

    @contextmanager
    def _patient(self, connection: BaseDatabaseWrapper, seconds: float) -> Iterator[None]:
        with transaction.atomic(using=connection.alias), connection.cursor() as cursor:
            cursor.execute(TIMEOUT)
            before, own = cursor.fetchone()
            # A limit of the session or the role that is stricter stays.
            limit = f"{max(1, int(min(seconds, own or seconds) * 1000))}ms"
            cursor.execute("SELECT set_config('statement_timeout', %s, true)", [limit])
            yield
            # A transaction around this one goes on with it; after an error the rollback does so.
            cursor.execute("SELECT set_config('statement_timeout', %s, true)", [before])

    def examine_settings(self, connection: BaseDatabaseWrapper, threads: int) -> Iterator[Finding]:
        return examination.examine_settings(connection.settings_dict, threads)

    def examine(self, connection: BaseDatabaseWrapper, tables: Sequence[str]) -> Iterator[Finding]:
        return examination.examine(connection, tables)

    def moment_to_db(self, moment: datetime) -> Any:
        return moment

    def moment_from_db(self, value: Any) -> datetime:
        assert isinstance(value, datetime)
        return value  # naive only with USE_TZ off, and then in Django's convention already
