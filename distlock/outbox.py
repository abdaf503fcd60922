"""Jobs that wait for a worker: one row per key, written in the transaction that wants the job done.

What carries the job's message to the worker is the adapter's (`contrib/_enqueue.py`); here is who
may write the row when.

# Note [Outbox]
The row and the caller's work become facts together, or not at all; the message is sent when they
have. `unpublished_since` is empty as soon as the broker has the message: what is not, a process
that died or a broker that was down has left behind, and it is published again. That may be once too
often, which does no harm, since a message is good for nothing but to start the job whose id the row
bears.

    queued    it waits for a worker: who wants the same finds it taken, until it expires
    running   by whoever holds the job's lock. With until="start" the key is free again; with
              "finish" it is taken while that lock is held. Who was killed has lost it, and whoever
              comes next may have the key; until then a message with the same id starts it again
    done      the key is free; the row stays for the next one, until it is purged

# Note [Two locks]
Those who write a row into the outbox take turns by a lock that bears the row's key, up to the end
of their transactions: whoever comes second waits, and finds a row or, after a rollback, none. So no
two insert at once, which deadlocks on InnoDB and waits without end on PostgreSQL. Runs take turns
by the job's own lock, as those of `once()` do. Between the two only compare-and-sets decide, on id
and state. Who finds, inside a transaction, that the same is queued shares the row until that ends:
the run that it counts on must begin after its commit, or it would miss what it was asked for. A
worker waits for a row that a transaction has locked only for a moment: that may take long, but of
several that follow each other it must find the gap.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from django.db import DatabaseError, Error, OperationalError, connections, transaction
from django.db.models import BooleanField, ExpressionWrapper, F, Q

from . import signals
from .backends import backend_for
from .backends.base import Pinned, moment_of
from .conf import settings
from .connections import in_transaction
from .deadlines import Deadline, jitter, seconds
from .exceptions import LockBusy, LockError
from .fields import DatabaseNow
from .locks import Lock, lock
from .receipts import is_locked

if TYPE_CHECKING:
    from django.db.models import QuerySet

    from .models import Job

Until = Literal["start", "finish"]

LOOK = 0.25
"""Seconds after which who waits for a turn looks whether somebody has queued the same: then there
is no need of a turn any more."""

SOON = 0.01

PATIENCE = 1.0
"""Seconds that a worker tries to start what a transaction has locked, before it comes again."""

KEEP = 30 * 86400.0
"""Seconds that a run that was broken off may be delivered again."""


@dataclass(frozen=True)
class Order:
    """What somebody wants done, once: the row that is to be queued. `ttl` is in seconds.

    is_over: tells of a task id whether its result says that it will not run any more.
    """

    alias: str
    key: str
    task: str
    arguments: dict[str, Any]
    ttl: float
    until: Until
    replace: bool
    is_over: Callable[[str], bool]

    def put(self) -> tuple[Job, bool]:
        """Return the key's row, and whether it is a new one that is to be published on commit.

        Raises `LockBusy` if somebody else's transaction is about to queue the same for too long,
        and `OperationalError` if the row itself is locked for so long.
        """
        wait = settings().WAIT
        deadline = Deadline(None if wait is None else seconds(wait, "WAIT"))
        connection = connections[self.alias]
        joins = in_transaction(connection)
        backend = backend_for(connection)
        alone = joins and not backend.private_connection
        # What an old snapshot says may long be over: the lock refuses it.
        looks = not (self.replace or (joins and backend.snapshot_isolation(connection)))
        while True:
            found = self._find() if looks else None
            if found is not None and self._is_taken(found) and self._is_awaited(found):
                return found, False
            turn = lock(
                self.key,
                atomic=not joins,
                wait=min(LOOK, deadline.left),
                note=self.task,
                using=self.alias,
            )
            try:
                with replace(turn, quiet=True):  # a look in between is nobody's busy lock
                    if put := self._try():
                        return put
            except LockBusy as error:
                if alone or not deadline.left:
                    raise self._busy(deadline) from error
            except DatabaseError as error:
                if joins or not backend.is_contention(error):
                    raise
            # Somebody has changed the row since it was read: look again, in a new snapshot.
            if not deadline.left:
                raise OperationalError(
                    f"The row of the job {self.key!r} was locked or written by others for "
                    f"{deadline.passed:.3g} s. End such transactions sooner, or call again."
                )
            time.sleep(SOON)

    def _busy(self, deadline: Deadline) -> LockBusy:
        """Tell who has the turn, once."""
        holder, waited = None, deadline.passed
        with suppress(Error, LockError):
            holder = lock(self.key, using=self.alias).holder()
        signals.lock_busy.send_robust(sender=Lock, name=self.key, holder=holder, waited=waited)
        return LockBusy(
            f"A transaction that is about to queue {self.key!r} was not over within "
            f"{waited:.3g} s: {holder}. End it sooner, or call again.",
            name=self.key,
            holder=holder,
            waited=waited,
        )

    def _try(self) -> tuple[Job, bool] | None:
        found = self._find()
        if found is None:
            new = jobs_of(self.alias).model(key=self.key, **self._values())
            new.save(using=self.alias, force_insert=True)
            return new, True
        if not self._is_taken(found):
            return self._take(found)
        if not self.replace or found.state != "queued":
            return (found, False) if self._is_awaited(found) else None
        # Its message keeps its options, and may have to wait for longer than ours would.
        arguments = {**self.arguments, "options": found.arguments["options"]}
        expires = max(found.expires_at, moment_in(self.alias, self.ttl))
        values = {"arguments": arguments, "expires_at": expires}
        return (found, False) if self._write(found, values) else None

    def _find(self) -> Job | None:
        """Return the row, and whether its time is not over."""
        in_time = ExpressionWrapper(Q(expires_at__gt=DatabaseNow()), BooleanField())
        return jobs_of(self.alias).filter(key=self.key).annotate(in_time=in_time).first()

    def _is_taken(self, found: Job) -> bool:
        """Whether the key is; see Note [Outbox]."""
        if found.state == "queued":
            taken: bool = found.in_time  # type: ignore[attr-defined]
        elif found.state == "running" and self.until == "finish":
            taken = jobs_of(self.alias).filter(is_locked(DatabaseNow()), pk=found.pk).exists()
        else:
            return False
        return taken and not (self.until == "finish" and self.is_over(found.task_id))

    def _is_awaited(self, found: Job) -> bool:
        """Whether what a row says still holds, and will until the caller's transaction has ended.

        A run that is to see what the caller has written must not begin before that is committed.
        """
        connection = connections[self.alias]
        if found.state != "queued" or not in_transaction(connection):
            return True
        same = jobs_of(self.alias).filter(task_id=found.task_id, state=found.state)
        return backend_for(connection).share(connection, same, found.pk)

    def _take(self, found: Job) -> tuple[Job, bool] | None:
        """Write over a row whose key is free.

        One that has waited too long keeps its id: its message may still be on its way, in a queue
        that is longer than the ttl, and then it is served in its old place.
        """
        values = self._values()
        if found.state == "queued" and not self.is_over(found.task_id):
            values["task_id"] = found.task_id
        if not self._write(found, values):
            return None
        for name, value in values.items():
            setattr(found, name, value)
        return found, True

    def _write(self, found: Job, values: dict[str, Any]) -> bool:
        """Write over an unchanged row. `False`: it has changed, or a transaction has it locked.

        InnoDB would wait for who shares it, for longer than the caller wants to.
        """
        features, rows = connections[self.alias].features, _unchanged(self.alias, found)
        free = rows.select_for_update(
            skip_locked=features.has_select_for_update_skip_locked,
            no_key=features.has_select_for_no_key_update,
        )
        return free.first() is not None and bool(rows.update(**values))

    def _values(self) -> dict[str, Any]:
        now = now_of(self.alias)
        return {
            "state": "queued",
            "task": self.task,
            "task_id": str(uuid.uuid4()),
            "arguments": self.arguments,
            "result": None,
            "attempts": 0,
            "created_at": moment_of(now),
            "started_at": None,
            "finished_at": None,
            "expires_at": moment_of(now + int(self.ttl * 1_000_000)),
            "unpublished_since": moment_of(now),
        }


# -- the message ---------------------------------------------------------------------------------


def published(alias: str, job: Job) -> None:
    """Note that the broker has the job's message, unless a transaction has the row locked.

    Then it is published once more, and whoever has just committed waits for nobody.
    """
    same = jobs_of(alias).filter(key=job.key, task_id=job.task_id)
    mine = same.filter(unpublished_since=job.unpublished_since)
    write_unlocked(alias, mine, {"unpublished_since": None})


def unpublished_tasks(alias: str, older_than: float) -> set[str]:
    """Return the names of the tasks of what waits to be published since that many seconds."""
    return set(_unpublished(alias, older_than).values_list("task", flat=True).distinct())


def unpublished(
    alias: str, older_than: float, tasks: Collection[str] | None = None
) -> Iterator[Job]:
    """Yield what waits to be published since that many seconds, each to one caller only.

    The caller must publish it and say so. What it does not, waits that long again: whoever lacks
    some tasks names those that it has. A row that a transaction has locked is passed over.
    """
    after, waiting = 0, _unpublished(alias, older_than).order_by("pk")
    if tasks is not None:
        waiting = waiting.filter(task__in=tasks)
    while job := waiting.filter(pk__gt=after).first():
        after, now = job.pk, moment_in(alias, 0)
        seen = _unchanged(alias, job).filter(unpublished_since=job.unpublished_since)
        if write_unlocked(alias, seen, {"unpublished_since": now}) is not None:
            job.unpublished_since = now
            yield job


def _unpublished(alias: str, older_than: float) -> QuerySet[Job]:
    before = moment_in(alias, -older_than)
    return jobs_of(alias).filter(state="queued", unpublished_since__lte=before)


def unsent(alias: str, key: str, task_id: str) -> bool:
    """Note that a message which had to go back to the queue could not: it is published again.

    Waits for who has the row locked: somebody may count on the run.
    """
    waiting = _wanted(alias, key, task_id).filter(state="queued")
    return bool(waiting.update(unpublished_since=moment_in(alias, 0)))


# -- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of a job, under its lock. `token` is that of its lease."""

    alias: str
    key: str
    task_id: str
    token: int

    def start(self) -> Job | None:
        """Say that the job runs, and return it with its latest arguments.

        `None`: the row is another's, or done, or a later holder of the lock has started it. Raises
        `Pinned` if a transaction has it locked, and the caller must come again.
        """
        deadline = Deadline(PATIENCE)
        while (job := self._start()) is None and self._startable().exists():
            if not deadline.left:
                raise Pinned(f"The row of the job {self.key!r} is locked by a running transaction.")
            time.sleep(jitter(SOON))
        return job

    def _start(self) -> Job | None:
        now = now_of(self.alias)
        values = {
            "state": "running",
            "token": self.token,
            "attempts": F("attempts") + 1,
            "started_at": moment_of(now),
            "expires_at": moment_of(now + int(KEEP * 1_000_000)),
            "unpublished_since": None,  # the broker had it, whether that was noted or not
        }
        return write_unlocked(self.alias, self._startable(), values)

    def _startable(self) -> QuerySet[Job]:
        return _wanted(self.alias, self.key, self.task_id).filter(token__lte=self.token)

    def finish(self) -> None:
        """Say that it is done, and that the row is of no use after this moment."""
        now = moment_in(self.alias, 0)
        values = {"state": "done", "finished_at": now, "expires_at": now}
        write_unlocked(self.alias, self._running(), values)

    def wait(self, ttl: float) -> None:
        """Say that its message is in the queue again, and its key taken for that many seconds."""
        values = {"state": "queued", "expires_at": moment_in(self.alias, ttl)}
        write_unlocked(self.alias, self._running(), values)

    def _running(self) -> QuerySet[Job]:
        mine = jobs_of(self.alias).filter(key=self.key, task_id=self.task_id)
        return mine.filter(token=self.token, state="running")


def is_wanted(alias: str, key: str, task_id: str) -> bool:
    """Whether a message with that id has something to start."""
    return _wanted(alias, key, task_id).exists()


def free(alias: str, key: str, task_id: str, *, running: bool = True) -> bool:
    """Free a key whose job will not run any more; `False` if it has gone to another id.

    running: also if it says that it runs.
    """
    now = moment_in(alias, 0)
    mine = _wanted(alias, key, task_id)
    if not running:
        mine = mine.filter(state="queued")
    values = {"state": "done", "finished_at": now, "expires_at": now, "unpublished_since": None}
    return bool(mine.update(**values))


def _wanted(alias: str, key: str, task_id: str) -> QuerySet[Job]:
    return jobs_of(alias).filter(key=key, task_id=task_id, state__in=("queued", "running"))


def write_unlocked(alias: str, rows: QuerySet[Job], values: dict[str, Any]) -> Job | None:
    """Write one row in a transaction of its own, unless it is locked; see Note [Two locks].

    A row that is locked at the end of its run is being taken by somebody else. If their transaction
    is rolled back, it says "running" while nobody holds the lock, and the key is free as well.
    """
    skip = connections[alias].features.has_select_for_update_skip_locked
    try:
        with transaction.atomic(using=alias):
            job = rows.select_for_update(skip_locked=skip).first()
            if job is not None:
                jobs_of(alias).filter(pk=job.pk).update(**values)
            return job
    except DatabaseError as error:
        if backend_for(connections[alias]).is_contention(error):
            return None
        raise


def _unchanged(alias: str, job: Job) -> QuerySet[Job]:
    return jobs_of(alias).filter(pk=job.pk, task_id=job.task_id, state=job.state)


def jobs_of(alias: str) -> QuerySet[Job]:
    from .models import Job

    return Job._default_manager.using(alias)


def now_of(alias: str) -> int:
    connection = connections[alias]
    return backend_for(connection).clock(connection)


def moment_in(alias: str, seconds: float) -> datetime:
    """Return the moment in that many seconds, on the database's clock."""
    return moment_of(now_of(alias) + int(seconds * 1_000_000))
