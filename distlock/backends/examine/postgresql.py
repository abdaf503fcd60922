"""PostgreSQL: `pg_settings` as this session has them, whoever set them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...findings import Code, Finding
from . import LONG, dead_sessions, short_sessions, version

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

VERSION = (14,)
MILLISECONDS = ("idle_in_transaction_session_timeout", "idle_session_timeout")

SETTINGS = """
SELECT name, setting FROM pg_settings WHERE name IN ('synchronous_commit', 'fsync',
    'full_page_writes', 'transaction_read_only', 'default_transaction_read_only', 'TimeZone',
    'tcp_keepalives_idle', 'tcp_keepalives_interval', 'tcp_keepalives_count', 'autovacuum',
    'idle_in_transaction_session_timeout', 'idle_session_timeout')"""
SESSION = "SELECT pg_is_in_recovery(), pg_backend_pid(), inet_client_addr() IS NOT NULL"
NOT_VACUUMED = """
SELECT relname FROM pg_class
WHERE oid IN (SELECT to_regclass(quote_ident(name))::oid FROM unnest(%s::text[]) AS name)
    AND EXISTS (SELECT FROM pg_options_to_table(reloptions)
        WHERE option_name = 'autovacuum_enabled' AND NOT option_value::boolean)
ORDER BY relname"""


def examine_settings(given: Mapping[str, Any], threads: int) -> Iterator[Finding]:
    """Yield what the settings of an alias say, without a connection."""
    options = given["OPTIONS"]
    if "," in str(given["HOST"]) and options.get("target_session_attrs") not in (
        "read-write",
        "primary",
    ):
        yield Finding(
            Code.ROUTED_ELSEWHERE,
            f"HOST names several servers ({given['HOST']}), and the first one that answers is "
            "taken, which may be a replica.",
            'Add "target_session_attrs": "read-write" to its OPTIONS.',
        )
    pool = options.get("pool")
    if pool:
        pool = pool if isinstance(pool, Mapping) else {}
        size = pool.get("max_size") or pool.get("min_size", 4)
        if size < threads:
            yield Finding(
                Code.SMALL_POOL,
                f"The pool has {size} connections for {threads} threads of a process. One that "
                "waits for a lock keeps its connection, so others may get none.",
                "Raise max_size in OPTIONS['pool'] to the number of threads of a process that use "
                "the database at once. distlock's own connections do not come from the pool.",
            )


def examine(connection: BaseDatabaseWrapper, tables: Sequence[str]) -> Iterator[Finding]:
    """Yield what is wrong with the server and with this session."""
    yield from version(connection, VERSION)
    with connection.cursor() as cursor:
        cursor.execute(SETTINGS)
        found = dict(cursor.fetchall())
        cursor.execute(SESSION)
        in_recovery, pid, by_network = cursor.fetchone()
        cursor.execute(NOT_VACUUMED, [list(tables)])
        not_vacuumed = [name for (name,) in cursor.fetchall()]
    yield from _read_only(found, in_recovery)
    yield from _durability(found)
    yield from _time_zone(connection, found)
    if by_network:
        yield from _keepalives(found)
    yield from _idle(found)
    yield from _pooler(connection, pid)
    yield from _vacuum(found, not_vacuumed)


def _read_only(found: Mapping[str, str], in_recovery: bool) -> Iterator[Finding]:
    if in_recovery:
        yield Finding(
            Code.READ_ONLY,
            "The server is a replica (pg_is_in_recovery), which takes no locks.",
            "Let DISTLOCK['USING'] name an alias of the primary.",
        )
    elif "on" in (found["transaction_read_only"], found["default_transaction_read_only"]):
        yield Finding(
            Code.READ_ONLY,
            "Transactions are read-only here (default_transaction_read_only).",
            "Let DISTLOCK['USING'] name an alias of the primary, or reset that setting for the "
            "user of the application.",
        )


def _durability(found: Mapping[str, str]) -> Iterator[Finding]:
    if found["synchronous_commit"] == "off":
        yield Finding(
            Code.FORGETFUL,
            "synchronous_commit is off: a crash of the server may forget grants that were made "
            "just before, and give the same locks to others.",
            "Set synchronous_commit = on. Locks that may be forgotten are taken with "
            "crash_safe=False, one by one.",
        )
    for setting in ("fsync", "full_page_writes"):
        if found[setting] == "off":
            yield Finding(
                Code.CORRUPTIBLE,
                f"{setting} is off: a crash of the machine may corrupt the whole database.",
                f"Set {setting} = on, but on a machine whose data may be thrown away.",
            )


def _time_zone(connection: BaseDatabaseWrapper, found: Mapping[str, str]) -> Iterator[Finding]:
    if found["TimeZone"] != connection.timezone_name:
        yield Finding(
            Code.TIME_ZONE,
            f"The session's time zone is {found['TimeZone']!r}; Django set it to "
            f"{connection.timezone_name!r}. Leases do not depend on it; with USE_TZ off, the times "
            "that Django reads do.",
            "Look for what changes it after the connection is made: SET TIME ZONE, or a pooler "
            "that hands one session to several clients.",
        )


def _keepalives(found: Mapping[str, str]) -> Iterator[Finding]:
    idle, interval, count = (
        int(found[f"tcp_keepalives_{part}"]) for part in ("idle", "interval", "count")
    )
    if idle + interval * count > LONG:
        yield Finding(
            Code.KEEPALIVES,
            f"The server notices after {idle + interval * count} s that a client's host is gone "
            f"(tcp_keepalives_idle {idle}, _interval {interval}, _count {count}). Until then the "
            "locks that it was about to release may stay locked.",
            "Set tcp_keepalives_idle = 15, tcp_keepalives_interval = 5, tcp_keepalives_count = 3.",
        )


def _idle(found: Mapping[str, str]) -> Iterator[Finding]:
    in_transaction, idle = (int(found.get(name, 0)) / 1000 for name in MILLISECONDS)
    yield from dead_sessions(
        MILLISECONDS[0],
        in_transaction,
        f"Set {MILLISECONDS[0]} to more than the longest pause inside a transaction, such as 60 s.",
    )
    yield from short_sessions(MILLISECONDS[1], idle)


def _pooler(connection: BaseDatabaseWrapper, pid: int) -> Iterator[Finding]:
    """A pooler makes up a pid of its own."""
    if pid == connection.connection.info.backend_pid:
        return
    if not connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"):
        yield Finding(
            Code.POOLER,
            "A pooler stands before the server, and server-side cursors are not disabled. In its "
            "transaction mode they, and all that is set for a session, fail outside transactions.",
            'Add "DISABLE_SERVER_SIDE_CURSORS": True to the alias.',
        )


def _vacuum(found: Mapping[str, str], tables: Sequence[str]) -> Iterator[Finding]:
    where = "on this server" if found["autovacuum"] == "off" else f"of {', '.join(tables)}"
    if found["autovacuum"] == "off" or tables:
        yield Finding(
            Code.NOT_VACUUMED,
            f"Autovacuum {where} is off: each grant, renewal and release leaves an old version of "
            "its row behind, and the table grows.",
            "Set autovacuum = on, and reset autovacuum_enabled of these tables.",
        )
