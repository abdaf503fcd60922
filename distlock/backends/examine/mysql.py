"""MySQL and MariaDB: the session's variables, and the storage engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ...findings import Code, Finding
from . import dead_sessions, short_sessions, version

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

# Those that the server does not have are missing in the answer.
VARIABLES = """
SHOW SESSION VARIABLES WHERE variable_name IN ('read_only', 'super_read_only', 'tx_read_only',
    'transaction_read_only', 'innodb_flush_log_at_trx_commit', 'innodb_doublewrite', 'log_bin',
    'sync_binlog', 'wait_timeout', 'idle_transaction_timeout', 'idle_write_transaction_timeout',
    'default_storage_engine')"""
IN_TRANSACTION = ("idle_transaction_timeout", "idle_write_transaction_timeout")
ENGINES = """
SELECT table_name, engine FROM information_schema.tables
WHERE table_schema = DATABASE() AND table_name IN ({}) AND engine <> 'InnoDB'
ORDER BY table_name"""
DURABLE = ("1", "3")  # 3 is MariaDB's, and waits for the disk once more
READ_ONLY = ("read_only", "super_read_only", "tx_read_only", "transaction_read_only")


def examine(
    connection: BaseDatabaseWrapper, tables: Sequence[str], needed: tuple[int, ...]
) -> Iterator[Finding]:
    """Yield what is wrong with the server and with this session."""
    yield from version(connection, needed)
    with connection.cursor() as cursor:
        cursor.execute(VARIABLES)
        found = {name: str(value).upper() for name, value in cursor.fetchall()}
        cursor.execute(ENGINES.format(", ".join(["%s"] * len(tables))), list(tables))
        others = cursor.fetchall()
    yield from _engines(others, found["default_storage_engine"])
    yield from _read_only(found)
    yield from _durability(found)
    yield from _idle(found)


def _engines(others: Sequence[tuple[str, str]], default: str) -> Iterator[Finding]:
    for table, engine in others:
        yield Finding(
            Code.NO_TRANSACTIONS,
            f"The table {table} is kept by {engine}, which has no transactions and no row locks.",
            f"ALTER TABLE {table} ENGINE=InnoDB.",
        )
    if not others and default != "INNODB":
        yield Finding(
            Code.NO_TRANSACTIONS,
            f"New tables are kept by {default} here (default_storage_engine), which may have no "
            "transactions and no row locks.",
            "Set default_storage_engine = InnoDB, before manage.py migrate.",
        )


def _read_only(found: Mapping[str, str]) -> Iterator[Finding]:
    on = [name for name in READ_ONLY if found.get(name, "OFF") not in ("OFF", "0", "NO_LOCK")]
    if on:
        yield Finding(
            Code.READ_ONLY,
            f"The server takes no writes, as a replica does ({on[0]}).",
            "Let DISTLOCK['USING'] name an alias of the primary.",
        )


def _durability(found: Mapping[str, str]) -> Iterator[Finding]:
    flush = found["innodb_flush_log_at_trx_commit"]
    if flush not in DURABLE:
        yield Finding(
            Code.FORGETFUL,
            f"innodb_flush_log_at_trx_commit is {flush}: a crash may forget grants that were made "
            "just before, and give the same locks to others.",
            "Set innodb_flush_log_at_trx_commit = 1.",
        )
    if found.get("innodb_doublewrite") in ("OFF", "0"):
        yield Finding(
            Code.CORRUPTIBLE,
            "innodb_doublewrite is off: a crash of the machine may corrupt the whole database.",
            "Set innodb_doublewrite = ON, but where the file system never writes half a page.",
        )
    if found.get("log_bin") == "ON" and found["sync_binlog"] != "1":
        yield Finding(
            Code.BINARY_LOG,
            f"sync_binlog is {found['sync_binlog']}: after a crash the binary log may lack the "
            "last grants, and a replica that takes over never heard of them.",
            "Set sync_binlog = 1.",
        )


def _idle(found: Mapping[str, str]) -> Iterator[Finding]:
    wait = int(found["wait_timeout"])
    limits = [int(found.get(name, 0)) for name in IN_TRANSACTION]
    yield from dead_sessions(
        "wait_timeout",
        min([wait, *filter(None, limits)]),
        "Set wait_timeout to more than the longest pause of a session, such as 60 s, for the user "
        "of the application. On MariaDB idle_transaction_timeout does it, too.",
    )
    yield from short_sessions("wait_timeout", wait)
