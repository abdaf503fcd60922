"""PostgreSQL's plans of the statements that are sent again and again, kept by each session.

To plan a grant takes the server longer than to execute it. So a session that is used often has the
statement planned once, by PREPARE. Not psycopg's way, for Django turns that off; and not through a
pooler, which hands the session to others: its process id is then not what the driver was told.

Only outside a transaction, where an error costs nothing: if the plan is gone (DISCARD, a pooler
that does pass the id on) or of no use any more (a migration), the statement is sent as it is, and
so it is from then on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from django.db import DatabaseError

from ..deadlines import clock
from .base import error_code

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.backends.utils import CursorWrapper

THRESHOLD = 5
"""How often a session sends a statement before it is worth a plan. Most live for one request."""
LASTS = 60.0
"""Seconds that a plan is used: that of an empty table is of no use for a full one."""
GONE = ("26000", "0A000", "42P05")
"""The plan does not exist, does not fit any more, or exists: the session is not ours alone."""
FIELD = re.compile(r"%\((\w+)\)s")


class Statement:
    """A statement, and how to prepare and execute it. `types`: those of its parameters."""

    def __init__(self, name: str, sql: str, types: Mapping[str, str]) -> None:
        names = list(dict.fromkeys(FIELD.findall(sql)))
        numbered = FIELD.sub(lambda field: f"${names.index(field[1]) + 1}", sql)
        kinds = ", ".join(types[each] for each in names)
        values = ", ".join(f"%({each})s" for each in names)
        self.sql = sql
        self.deallocate = f"DEALLOCATE {name}"
        self.prepare = f"PREPARE {name} ({kinds}) AS {numbered}"
        self.execute = f"EXECUTE {name} ({values})"


@dataclass
class Session:
    """What is known of a session."""

    uses: dict[str, int] = field(default_factory=dict)
    planned: dict[str, float] = field(default_factory=dict)
    is_direct: bool | None = None

    def plan(self, statement: Statement, cursor: CursorWrapper) -> None:
        """Have a statement planned, if that was not done lately."""
        planned = self.planned.get(statement.sql)
        if planned is not None and clock() - planned < LASTS:
            return
        if planned is not None:
            cursor.execute(statement.deallocate)
        cursor.execute(statement.prepare)
        self.planned[statement.sql] = clock()


class Plans:
    """The sessions of this process, by the driver's connection."""

    def __init__(self) -> None:
        self._sessions: WeakKeyDictionary[Any, Session] = WeakKeyDictionary()

    def run(
        self,
        connection: BaseDatabaseWrapper,
        cursor: CursorWrapper,
        statement: Statement,
        parameters: Mapping[str, Any],
    ) -> None:
        """Execute a statement, by its plan if there is one."""
        session = self._sessions.setdefault(connection.connection, Session())
        if session.is_direct is False or not _may_fail(connection):
            cursor.execute(statement.sql, parameters)
            return
        uses = session.uses[statement.sql] = session.uses.get(statement.sql, 0) + 1
        try:
            if uses >= THRESHOLD and self._is_direct(connection, cursor, session):
                session.plan(statement, cursor)
                cursor.execute(statement.execute, parameters)
            else:
                cursor.execute(statement.sql, parameters)
        except DatabaseError as error:
            if error_code(error) not in GONE:
                raise
            session.is_direct = False
            cursor.execute(statement.sql, parameters)

    def _is_direct(
        self, connection: BaseDatabaseWrapper, cursor: CursorWrapper, session: Session
    ) -> bool:
        """Whether the driver speaks to the server itself, as far as one can tell."""
        if session.is_direct is None:
            cursor.execute("SELECT pg_backend_pid()")
            session.is_direct = cursor.fetchone()[0] == connection.connection.info.backend_pid
        return session.is_direct


def _may_fail(connection: BaseDatabaseWrapper) -> bool:
    """Whether an error would end nothing but the statement, and its values stand in its text."""
    return connection.connection.autocommit and not connection.settings_dict["OPTIONS"].get(
        "server_side_binding"
    )
