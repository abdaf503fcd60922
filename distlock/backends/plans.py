"""The plans of the statements that are sent again and again, kept by each session.

To read and plan a grant takes a server about as long as to execute it. So a session that is used
often has that done once, by PREPARE, and sends EXECUTE from then on. Not through a pooler, which
hands the session to others: its id is then not what the driver was told. And not by the driver:
Django turns psycopg's own way off, and where that has a plan, each rollback drops all of the
session's, the user's too; mysqlclient has none.

Only outside a transaction, where an error costs nothing but the statement: if the plan is gone (a
session that was reset, a pooler that does pass the id on) or of no use any more (a migration), the
statement is sent as it is, and so it is from then on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

from django.db import DatabaseError

from ..deadlines import clock
from .base import error_code

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.backends.utils import CursorWrapper

THRESHOLD = 10
"""How many statements a session sends before they are worth a plan. Most live for one request."""


class Statement(NamedTuple):
    """A statement, and how a session has it planned, executes the plan, and forgets it."""

    sql: str
    prepare: str
    execute: str
    forget: str


@dataclass
class Session:
    """What is known of a session."""

    uses: int = 0
    planned: dict[str, float] = field(default_factory=dict)
    is_direct: bool | None = None


class Plans(ABC):
    """The sessions of this process, by the driver's connection."""

    lasts: ClassVar[float] = math.inf
    """Seconds that a plan is used."""
    gone: ClassVar[tuple[int | str, ...]]
    """The errors that say that there is no plan: the session is not ours alone."""

    def __init__(self) -> None:
        self._sessions: WeakKeyDictionary[Any, Session] = WeakKeyDictionary()

    def may_fail(self, connection: BaseDatabaseWrapper) -> bool:
        """Whether an error would end nothing but the statement."""
        return connection.get_autocommit()

    def prepare(self, connection: BaseDatabaseWrapper, statement: Statement) -> str:
        """Return what has the statement planned."""
        return statement.prepare

    @abstractmethod
    def is_direct(self, connection: BaseDatabaseWrapper, cursor: CursorWrapper) -> bool:
        """Whether the driver speaks to the server itself, as far as one can tell."""

    def run(
        self,
        connection: BaseDatabaseWrapper,
        cursor: CursorWrapper,
        statement: Statement,
        parameters: Mapping[str, Any],
    ) -> None:
        """Execute a statement, by its plan if there is one."""
        session = self._sessions.setdefault(connection.connection, Session())
        if session.is_direct is False or not self.may_fail(connection):
            cursor.execute(statement.sql, parameters)
            return
        session.uses += 1
        try:
            if session.uses >= THRESHOLD and self._knows_direct(connection, cursor, session):
                self._plan(connection, cursor, session, statement)
                cursor.execute(statement.execute, parameters)
            else:
                cursor.execute(statement.sql, parameters)
        except DatabaseError as error:
            if error_code(error) not in self.gone:
                raise
            session.is_direct = False
            cursor.execute(statement.sql, parameters)

    def _knows_direct(
        self, connection: BaseDatabaseWrapper, cursor: CursorWrapper, session: Session
    ) -> bool:
        if session.is_direct is None:
            session.is_direct = self.is_direct(connection, cursor)
        return session.is_direct

    def _plan(
        self,
        connection: BaseDatabaseWrapper,
        cursor: CursorWrapper,
        session: Session,
        statement: Statement,
    ) -> None:
        """Have a statement planned, if that was not done lately."""
        planned = session.planned.get(statement.sql)
        if planned is not None and clock() - planned < self.lasts:
            return
        if planned is not None:
            cursor.execute(statement.forget)
        cursor.execute(self.prepare(connection, statement))
        session.planned[statement.sql] = clock()
