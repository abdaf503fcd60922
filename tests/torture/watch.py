"""What the server says of one lock now, so that a nemesis can aim at its holder."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from tests.databases import connect
from tests.private_server import Server

TABLE = "distlock_distributedlock"
STATEMENTS = {
    "postgresql": {
        "begin": "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED",
        "now": "clock_timestamp()",
        "working": "SELECT 1 FROM pg_stat_activity WHERE pid = {} AND xact_start IS NOT NULL",
        "some": "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
        "AND datname = current_database() AND backend_type = 'client backend' "
        "ORDER BY random() LIMIT 1",
        "end": "SELECT pg_terminate_backend({})",
    },
    "mariadb": {
        "begin": "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
        "now": "UTC_TIMESTAMP(6)",
        "working": "SELECT 1 FROM information_schema.innodb_trx WHERE trx_mysql_thread_id = {}",
        "some": "SELECT id FROM information_schema.processlist WHERE db = DATABASE() "
        "AND id <> CONNECTION_ID() ORDER BY RAND() LIMIT 1",
        "end": "KILL {}",
    },
}
STALE = 0.12
"""MariaDB looks at its transactions anew only if nobody has asked for a tenth of a second."""


class Watch:
    """One lock's row, from a session of its own, which is opened again when it is gone."""

    def __init__(self, server: Server, name: str) -> None:
        self._server = server
        self._statements = STATEMENTS[server.scheme]
        self._connection: Any = None
        self._row = f"FROM {TABLE} WHERE name = '{name}' AND slot = 0"

    def close(self) -> None:
        """Close the session."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    def holder(self) -> tuple[int, int] | None:
        """The process that holds the lock, and its token."""
        now = self._statements["now"]
        return self._ask(
            f"SELECT pid, fencing_token {self._row} AND owner <> '' AND expires_at > {now}"
        )

    def token(self) -> int:
        """The token of the last grant."""
        return self._number(f"SELECT fencing_token {self._row}")

    def losses(self) -> int:
        """How many leases were ended by others."""
        return self._number(f"SELECT losses {self._row}")

    def pinned(self) -> bool:
        """Whether a transaction has the row locked."""
        return self._ask(f"SELECT id {self._row} FOR UPDATE SKIP LOCKED") is None

    def works(self, session: int) -> bool:
        """Whether a session, of a process that stands still, has a transaction open."""
        if self._server.scheme == "mariadb":
            time.sleep(STALE)
        return self._ask(self._statements["working"].format(session)) is not None

    def some_session(self) -> int:
        """Any session but this one."""
        return self._number(self._statements["some"])

    def end_session(self, session: int) -> None:
        """End a session on the server."""
        self._ask(self._statements["end"].format(session))

    def _number(self, sql: str) -> int:
        row = self._ask(sql)
        return int(row[0]) if row else 0

    def _ask(self, sql: str) -> Any:
        try:
            return self._run(sql)
        except Exception:  # the driver's own, whichever it is: once more, on a new session
            self.close()
            return self._run(sql)

    def _run(self, sql: str) -> Any:
        if self._connection is None:
            self._connection = connect(self._server.url)
            with contextlib.closing(self._connection.cursor()) as cursor:
                cursor.execute(self._statements["begin"])
        with contextlib.closing(self._connection.cursor()) as cursor:
            cursor.execute(sql)
            return cursor.fetchone() if cursor.description else None
