"""The contract of a store: the verbs on the row, and what a database can do.

Every verb is one statement where the vendor allows it, and one transaction everywhere. Each is a
compare-and-set on name, slot and owner, and reads the database's clock once. None waits for a row
lock that somebody's transaction holds, for a pinned row is simply busy, but two: `release` and
`guard` act on a row that ought to be their own, and wait as any UPDATE does, as long as the
connection's lock timeout allows. (Two purges at once may wait for each other's mark, too.)

# Note [High-water mark]
A fencing token is GREATEST(previous + 1, microseconds since 1970 by the database's clock). A
counter that died with its row would start again, so `purge` writes the highest token that it
deletes to one reserved row, whose name is empty, in the same transaction, and a new row starts
above it. Tokens of a name therefore grow across release, expiry, purge and restart, whatever the
clock does.

# Note [FOR UPDATE]
On PostgreSQL every statement that gives a row to another owner, takes it away or raises its token
first locks it FOR UPDATE. A plain UPDATE or an ON CONFLICT DO UPDATE locks it FOR NO KEY UPDATE,
which does not conflict with the FOR KEY SHARE of a guard: the guard would be passed by.

# Note [A grant is found again]
The answer to a grant may be lost, too, and it is then asked for again by the same owner. A grant
that finds its owner's lease alive keeps its token: the first request may also arrive after the
second, when that one's answer is already in use.

# Note [A release is found again]
The answer to a release may be lost with the connection, and a savepoint rollback may undo it. So
it matches its own trace too: no owner, and still this token, which nobody else can have been
granted since. Writing it twice counts the time held once. `stats.py` says what else counts.

# Note [Nobody's row]
A release leaves in `ttl` the min_hold that goes on keeping the row, and mostly that is 0. A row
without an owner whose ttl is 0 is free whatever its expiry says, which lies ahead if the clock was
set back after the release. A min_hold is for others: a claim that resumes may pass the one that its
own `thread`, which is then the name of a job, has left behind.
"""

from __future__ import annotations

import enum
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from django.conf import settings
from django.db import DatabaseError, OperationalError
from django.utils import timezone as django_timezone

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import QuerySet

    from ..findings import Finding
    from .stats import LockStats

TABLE = "distlock_distributedlock"
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MICROSECOND = timedelta(microseconds=1)


def in_convention(moment: datetime) -> datetime:
    """Return an aware moment as Django keeps them: aware with USE_TZ, else naive in TIME_ZONE."""
    if settings.USE_TZ:
        return moment
    return django_timezone.make_naive(moment, django_timezone.get_default_timezone())


def moment_of(microseconds: int) -> datetime:
    """Return the moment that many microseconds after 1970, in Django's convention."""
    return in_convention(EPOCH + microseconds * MICROSECOND)


def microseconds_of(moment: datetime) -> int:
    """Return the microseconds since 1970 of an aware moment."""
    return (moment - EPOCH) // MICROSECOND


@dataclass(frozen=True)
class Holder:
    """Who holds a lock now, as its row says. An empty `owner`: nobody, but `min_hold` keeps it."""

    name: str
    owner: str
    token: int
    acquired_at: datetime
    expires_at: datetime
    host: str
    pid: int
    thread: str
    note: str

    def __str__(self) -> str:
        if not self.owner:
            return f"nobody (kept until {self.expires_at} by min_hold)"
        note = f", {self.note}" if self.note else ""
        return f"{self.thread} of process {self.pid} on {self.host}{note}"


class Claim(NamedTuple):
    """What one acquisition asks for. `owner` is its nonce, made before a statement is sent.

    `ttl` and `min_hold` are microseconds. `durable=False`: the grant may be forgotten if the
    server crashes within the next moment. `resumes`: see Note [Nobody's row].
    """

    name: str
    slot: int
    owner: str
    ttl: int
    min_hold: int = 0
    note: str = ""
    thread: str = ""
    durable: bool = True
    resumes: bool = False

    def parameters(self, waited: float) -> dict[str, Any]:
        """Return the parameters of a grant; `waited` in seconds."""
        return {
            "name": self.name,
            "slot": self.slot,
            "owner": self.owner,
            "ttl": self.ttl,
            "first": max(self.ttl, self.min_hold),
            "host": this_host(),
            "pid": os.getpid(),
            "thread": _storable(self.thread or threading.current_thread().name),
            "note": self.note,
            "waited": int(waited * 1_000_000),
            "resumes": int(self.resumes),
        }


class Held(Protocol):
    """What a verb needs to know of a lease to act for its owner, and for no other."""

    name: str
    slot: int
    owner: str
    token: int
    expires_us: int
    min_hold_us: int


class Grant(NamedTuple):
    """A lock was given. Moments are microseconds on the database's clock."""

    token: int
    acquired_us: int
    expires_us: int
    table: Any = None
    """Which table the row stands in: what `identity` says on a connection that reaches it."""


@dataclass(frozen=True)
class Seen:
    """What a look at a row tells whoever waits for it."""

    token: int
    time_left: int
    """Microseconds until its lease ends; 0 if it is free."""
    wanted: bool = False
    """Whether a release before that moment will notify."""


class Unlock(enum.Enum):
    """What `free` found."""

    FREED = "freed"
    PINNED = "pinned"
    GONE = "gone"


class Trace(enum.Enum):
    """What a release that was written inside a transaction left behind, once that is over."""

    RELEASED = "released"  # no owner, and still the token: it was committed
    HELD = "held"  # still the owner's: it was rolled back
    PINNED = "pinned"  # a transaction has the row locked: it may not be over
    GONE = "gone"  # granted to another since, or purged: nothing is left that could tell


class Pinned(OperationalError):
    """The row is locked by a running transaction."""


class Overdue(OperationalError):
    """A statement was stopped because it took too long."""


class Backend:
    """One database's way to keep the contract. Stateless; shared by all threads."""

    exact_collation: ClassVar[str | None] = None
    """The collation that compares names exactly; `None` where the default does."""

    private_connection: ClassVar[bool] = True
    """Whether a lock taken inside a transaction is granted on another connection."""

    release_keeps_snapshot: ClassVar[bool] = False
    """Whether an UPDATE fails at REPEATABLE READ once the row was renewed after the snapshot."""

    guard_blocks_renewal: ClassVar[bool] = True
    """Whether the row lock of a guard keeps the keeper from renewing."""

    notifies: ClassVar[bool] = False
    """Whether a release tells those who listen."""

    ddl_commits: ClassVar[bool] = False
    """Whether a statement, or an error, may end a transaction behind Django's back."""

    share_sql: ClassVar[str | None] = None
    """What ends a SELECT that shares rows; `None`: it locks them, and only one may at a time."""

    share_lookups: ClassVar[tuple[str, ...]] = ("pk",)
    """How that SELECT finds its row."""

    batch: ClassVar[int] = 500
    """How many leases one statement renews."""

    contention: ClassVar[frozenset[str | int]] = frozenset({"40001", "40P01", "55P03"})
    """The codes of errors which say that somebody else was there first."""

    overdue: ClassVar[frozenset[str | int]] = frozenset()
    """The codes of errors which say that a statement was stopped because it took too long."""

    # -- the verbs -------------------------------------------------------------------------------

    def grant(self, connection: BaseDatabaseWrapper, claim: Claim, waited: float) -> Grant | None:
        """Give the lock if it is free, or if this very claim has it already; else return `None`."""
        raise NotImplementedError

    def renew(
        self,
        connection: BaseDatabaseWrapper,
        held: Sequence[Held],
        ttl: int | None = None,
        *,
        pinned: bool = False,
    ) -> Mapping[str, int | None]:
        """Extend every lease that is alive and still its owner's, and pass over locked rows.

        Return, by owner, the new expiry in microseconds, or `None` where the row was locked. An
        owner that is missing has lost its lease. `pinned`: the caller's own transaction has the
        rows locked, so nobody can have been granted them, even if they look expired.
        """
        raise NotImplementedError

    def release(self, connection: BaseDatabaseWrapper, held: Held, *, alone: bool) -> bool:
        """Take the owner off the row; `False` if it is not the owner's any more.

        `alone`: the release is a transaction of its own. Otherwise it belongs to the caller's,
        whose settings it must not touch.
        """
        raise NotImplementedError

    def free(self, connection: BaseDatabaseWrapper, held: Held) -> Unlock:
        """Release after a transaction that may have ended, passing over a row that is pinned."""
        raise NotImplementedError

    def trace(self, connection: BaseDatabaseWrapper, held: Held) -> Trace:
        """Tell how a transaction ended in which a release was written, passing over a pin."""
        raise NotImplementedError

    def guard(self, connection: BaseDatabaseWrapper, held: Held) -> bool:
        """Lock the row against grants until the transaction ends; `False` if it has another owner.

        The expiry does not matter: nobody else was granted the lock, and from now on nobody can
        be. Under an old snapshot it could not be read anyway.
        """
        raise NotImplementedError

    def holder(self, connection: BaseDatabaseWrapper, name: str, slot: int) -> Holder | None:
        """Return who holds the lock now."""
        raise NotImplementedError

    def stats(self, connection: BaseDatabaseWrapper, name: str, slot: int) -> LockStats | None:
        """Return what the row has counted; `None` if there is no row."""
        raise NotImplementedError

    def look(
        self, connection: BaseDatabaseWrapper, keys: Sequence[tuple[str, int]], *, mark: bool = True
    ) -> Mapping[tuple[str, int], Seen]:
        """Return what these rows say to those who wait for them; `mark` them as wanted.

        What has no row is missing, and free. Only a database that notifies has such a mark; a row
        that is locked cannot be given one.
        """
        raise NotImplementedError

    def force_release(
        self,
        connection: BaseDatabaseWrapper,
        name: str,
        slot: int,
        token: int,
        *,
        owner: str | None = None,
    ) -> int | None:
        """Take the lock from its holder and raise its token, if that is still `token`.

        With `owner`, only if the row has that owner, too: "" for what only `min_hold` keeps, under
        its holder's token. Return the new token, or `None` if the holder changed. Raises `Pinned`
        if a running transaction has the row locked.
        """
        raise NotImplementedError

    def purge(
        self, connection: BaseDatabaseWrapper, older_than: int, after: int, limit: int
    ) -> tuple[int, int] | None:
        """Delete up to `limit` rows, in order of id, whose lease ended `older_than` us ago.

        Return how many, and the last id to go on after; `None` at the end.
        """
        raise NotImplementedError

    def delete(self, connection: BaseDatabaseWrapper, table: str, ids: Sequence[int]) -> None:
        """Delete rows that this transaction has locked, and wait for no other row."""
        among = ", ".join(["%s"] * len(ids))
        with connection.cursor() as cursor:
            cursor.execute(f"DELETE FROM {table} WHERE id IN ({among})", ids)

    def share(self, connection: BaseDatabaseWrapper, rows: QuerySet[Any], pk: int) -> bool:
        """Keep a row from whoever locks it for an update, until the transaction ends.

        Many may do so at once. `False`: it is not among `rows`, and stays as free as it was, or it
        is being written; it is not waited for.
        """
        rows = rows.filter(**dict.fromkeys(self.share_lookups, pk))
        if self.share_sql is None:
            skip = connection.features.has_select_for_update_skip_locked
            return rows.select_for_update(skip_locked=skip).first() is not None
        sql, parameters = rows.values("pk").query.get_compiler(connection=connection).as_sql()
        with connection.cursor() as cursor:
            cursor.execute(f"{sql} {self.share_sql}", parameters)
            return cursor.fetchone() is not None

    def age(
        self,
        connection: BaseDatabaseWrapper,
        table: str,
        columns: Sequence[str],
        microseconds: int,
    ) -> None:
        """Let the moments in these columns be that much longer ago, as a test's fake clock wants.

        Rows that a running transaction has locked are passed over.
        """
        raise NotImplementedError

    # -- what the database can do ----------------------------------------------------------------

    def clock(self, connection: BaseDatabaseWrapper) -> int:
        """Return the database's clock, now, in microseconds since 1970."""
        raise NotImplementedError

    def clock_us(self, connection: BaseDatabaseWrapper) -> str:
        """Return the SQL for what `clock` says; a number, if the database cannot count so."""
        return str(self.clock(connection))

    def now(self, connection: BaseDatabaseWrapper) -> str:
        """Return the SQL for that moment, as columns keep it. Never when a transaction began."""
        raise NotImplementedError

    def identity(self, connection: BaseDatabaseWrapper) -> Any:
        """Return what tells the lock table from one of the same name; `None` if nothing can.

        A grant says it too, of the table that it was written to.
        """
        return None

    def snapshot_isolation(self, connection: BaseDatabaseWrapper) -> bool:
        """Whether transactions of this connection read from one snapshot (REPEATABLE READ, ..)."""
        return False

    def transaction_failed(self, connection: BaseDatabaseWrapper) -> bool:
        """Whether the server has already given up the open transaction."""
        return False

    def commit_done(self, connection: BaseDatabaseWrapper) -> bool | None:
        """Whether an interrupted COMMIT took effect, as far as the driver knows: maybe `None`."""
        return None

    def is_contention(self, error: BaseException) -> bool:
        """Whether an error only says that somebody else was there first."""
        return isinstance(error, Pinned) or error_code(error) in self.contention

    def is_overdue(self, error: BaseException) -> bool:
        """Whether an error says that a statement was stopped because it took too long."""
        return error_code(error) in self.overdue

    def listen(self, connection: BaseDatabaseWrapper) -> bool:
        """Begin to listen for releases; `False` if messages would not reach this connection."""
        raise NotImplementedError

    def heard(self, connection: BaseDatabaseWrapper) -> list[tuple[str, int]]:
        """Return which names and slots were released, as far as it has been said. Does not wait.

        Raises `DatabaseError`, or the driver's own error, if the connection is gone.
        """
        raise NotImplementedError

    def private_settings(self, settings_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a private connection: unpooled, and bounded in time."""
        return settings_dict

    @contextmanager
    def bounded(self, connection: BaseDatabaseWrapper, seconds: float) -> Iterator[None]:
        """Bound each statement on a private connection to about that long on the server."""
        yield

    @contextmanager
    def patient(self, connection: BaseDatabaseWrapper, seconds: float) -> Iterator[None]:
        """Stop each SELECT in the block that takes longer than that. Raises `Overdue`.

        The connection is the caller's own: its settings, and a transaction that is open on it, are
        afterwards as they were.
        """
        try:
            with self._patient(connection, seconds):
                yield
        except DatabaseError as error:
            if not self.is_overdue(error):
                raise
            raise Overdue(f"It took longer than {seconds:.3g} s and was stopped.") from error

    @contextmanager
    def _patient(self, connection: BaseDatabaseWrapper, seconds: float) -> Iterator[None]:
        yield

    def in_memory(self, connection: BaseDatabaseWrapper) -> bool:
        """Whether another connection would see another database."""
        return False

    def examine_settings(self, connection: BaseDatabaseWrapper, threads: int) -> Iterator[Finding]:
        """Yield what is wrong with an alias's settings, without asking the database.

        `threads`: how many of one process use the database at once.
        """
        return iter(())

    def examine(self, connection: BaseDatabaseWrapper, tables: Sequence[str]) -> Iterator[Finding]:
        """Yield what is wrong with the database and these tables, as it says itself."""
        return iter(())

    def moment_to_db(self, moment: datetime) -> Any:
        """Return an aware UTC moment as the column takes it."""
        return moment.replace(tzinfo=None).isoformat(" ", "microseconds")

    def moment_from_db(self, value: Any) -> datetime:
        """Return an aware moment for what the driver gave."""
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        assert isinstance(moment, datetime)
        return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def error_code(error: BaseException) -> Any:
    """Return the vendor's code of a database error: an SQLSTATE, or MySQL's number."""
    cause = error.__cause__ or error
    code = getattr(cause, "sqlstate", None)
    if code is None and cause.args and isinstance(cause.args[0], int):
        code = cause.args[0]
    return code


def trace_of(owner: str, token: int, held: Held) -> Trace:
    """Return what a row that nobody has locked tells of a lease's release."""
    if owner == held.owner:
        return Trace.HELD
    return Trace.RELEASED if owner == "" and token == held.token else Trace.GONE


def parameters_of(held: Held) -> dict[str, Any]:
    """Return the parameters of a statement that acts for a lease's owner."""
    return {
        "name": held.name,
        "slot": held.slot,
        "owner": held.owner,
        "token": held.token,
        "min_hold": held.min_hold_us,
    }


def holder_of(row: Sequence[Any]) -> Holder:
    """Return a `Holder` from the columns of a `HOLDER` statement."""
    name, owner, token, acquired, expires, host, pid, thread, note = row
    return Holder(
        name=name,
        owner=owner,
        token=int(token),
        acquired_at=moment_of(int(acquired or 0)),
        expires_at=moment_of(int(expires)),
        host=host,
        pid=int(pid),
        thread=thread,
        note=note,
    )


_host_name: str | None = None


def this_host() -> str:
    """Return what the rows say of where their holder runs."""
    global _host_name
    if _host_name is None:
        _host_name = _storable(socket.gethostname())
    return _host_name


def _storable(text: str) -> str:
    """Return a text that was not checked, such as a task's name, as every database takes it."""
    return text.replace("\0", "?").encode(errors="replace").decode()[:255]
