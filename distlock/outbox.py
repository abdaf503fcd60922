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
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.db import DatabaseError, connections, transaction
from django.db.models import F

from .backends import backend_for
from .backends.base import Pinned, moment_of
from .deadlines import Deadline, jitter

if TYPE_CHECKING:
    from django.db.models import QuerySet

    from .models import Job

SOON = 0.01
"""Seconds until the next try at a row that somebody else writes."""

PATIENCE = 1.0
"""Seconds that a worker tries to start what a transaction has locked, before it comes again."""

KEEP = 30 * 86400.0
"""Seconds that a run that was broken off may be delivered again."""


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
        seen = unchanged(alias, job).filter(unpublished_since=job.unpublished_since)
        if write_unlocked(alias, seen, {"unpublished_since": now}) is not None:
            job.unpublished_since = now
            yield job


def _unpublished(alias: str, older_than: float) -> QuerySet[Job]:
    before = moment_in(alias, -older_than)
    return jobs_of(alias).filter(state="queued", unpublished_since__lte=before)


def unsent(alias: str, key: str, task_id: str) -> bool:
    """Note that a message which had to go back to the queue could not: it is published again.

    `False`: its run has started, or is not wanted any more, or a transaction has the row locked.
    """
    waiting = _wanted(alias, key, task_id).filter(state="queued")
    values = {"unpublished_since": moment_in(alias, 0)}
    return write_unlocked(alias, waiting, values, past_shares=True) is not None


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


def write_unlocked(
    alias: str, rows: QuerySet[Job], values: dict[str, Any], *, past_shares: bool = False
) -> Job | None:
    """Write one row in a transaction of its own, unless it is locked; see Note [Two locks].

    past_shares: also if it is only shared, where the database can tell that (PostgreSQL).

    A row that is locked at the end of its run is being taken by somebody else. If their transaction
    is rolled back, it says "running" while nobody holds the lock, and the key is free as well.
    """
    features = connections[alias].features
    unlocked = rows.select_for_update(
        skip_locked=features.has_select_for_update_skip_locked,
        no_key=past_shares and features.has_select_for_no_key_update,
    )
    try:
        with transaction.atomic(using=alias):
            job = unlocked.first()
            if job is not None:
                jobs_of(alias).filter(pk=job.pk).update(**values)
            return job
    except DatabaseError as error:
        if backend_for(connections[alias]).is_contention(error):
            return None
        raise


def unchanged(alias: str, job: Job) -> QuerySet[Job]:
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
