"""The rows of jobs: what counts as a receipt, and who may write one.

Only whoever holds a job's lock writes its row, and says so with the lock's token: a row that bears
a newer one is left alone. A holder that was paused and has lost its lock changes nothing, even if
it wakes up in the middle of a write.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from django.db import connections, transaction
from django.db.models import Exists, F, OuterRef, TextField, Value
from django.db.models.functions import Concat

from .backends import backend_for
from .backends.base import moment_of
from .exceptions import LockLost
from .fields import DatabaseNow

if TYPE_CHECKING:
    from django.db.models import QuerySet

    from .models import Job


PREFIX = "once:"
"""What the name of a job's lock begins with; the key follows."""

TRIES = 2
"""An expired row may be purged between two statements."""


@dataclass(frozen=True)
class Run:
    """One run of a job, under its lock: what its row is to say. `keep` is in seconds."""

    alias: str
    key: str
    token: int
    started: datetime
    task: str
    keep: float


def find(alias: str, key: str) -> Job | None:
    """Return the receipt for a key, if there is one that has not expired: one statement."""
    jobs = _jobs(alias)
    done = jobs.filter(key=key, state=jobs.model.State.DONE)
    return done.filter(expires_at__gt=DatabaseNow()).first()


def purge(alias: str, after: int, limit: int) -> tuple[int, int] | None:
    """Delete up to `limit` rows, in order of id, that have expired.

    Return how many, and the last id to go on after; `None` at the end. A row that is locked, or was
    written meanwhile, is passed over.
    """
    found = expired(alias).filter(pk__gt=after).order_by("pk").values_list("pk", flat=True)
    ids = list(found[:limit])
    if not ids:
        return None
    skip = connections[alias].features.has_select_for_update_skip_locked
    with transaction.atomic(using=alias):
        # Whoever writes a row moves its expiry into the future.
        still = _jobs(alias).filter(pk__in=ids, expires_at__lte=DatabaseNow())
        rows = list(still.select_for_update(skip_locked=skip).values_list("pk", flat=True))
        if rows:
            table = _jobs(alias).model._meta.db_table
            backend_for(connections[alias]).delete(connections[alias], table, rows)
    return len(rows), ids[-1]


def expired(alias: str) -> QuerySet[Job]:
    """Return the rows that are of no use any more: not what is queued, nor what still runs."""
    jobs = _jobs(alias)
    over = jobs.filter(expires_at__lte=DatabaseNow()).exclude(state=jobs.model.State.QUEUED)
    return over.exclude(is_locked(DatabaseNow()), state=jobs.model.State.RUNNING)


def is_locked(at: datetime | DatabaseNow) -> Exists:
    """Return the expression for whether somebody holds a job's lock at that moment."""
    from .models import DistributedLock

    name = Concat(Value(PREFIX), OuterRef("key"))
    rows = DistributedLock._default_manager.filter(name=name, slot=0).exclude(owner="")
    return Exists(rows.filter(expires_at__gt=at))


def begin(run: Run) -> None:
    """Write that the job runs. Raises `LockLost` if a newer token has written before."""
    state = _jobs(run.alias).model.State.RUNNING
    _write(run, _now(run), state=state, finished_at=None, result=None, **_begun(run))


def finish(run: Run, result: str, *, begun: bool) -> None:
    """Write the receipt, with the result in JSON. Raises `LockLost` as `begin` does.

    The caller must do so in the transaction that releases the lock. `begun`: `begin` has counted
    this run.
    """
    now, state = _now(run), _jobs(run.alias).model.State.DONE
    text = Value(result, output_field=TextField())
    more = {} if begun else _begun(run)
    _write(run, now, state=state, finished_at=moment_of(now), result=text, **more)


def add(run: Run, task_id: str, finished: datetime) -> None:
    """Write a receipt that has no result, over one that has expired: in one statement.

    The caller must do so in the transaction that releases the lock, which is the fence here.
    """
    features, state = connections[run.alias].features, _jobs(run.alias).model.State.DONE
    if not features.supports_update_conflicts:
        finish(run, "null", begun=False)
        return
    values = {
        "state": state,
        "task": run.task,
        "task_id": task_id,
        "token": run.token,
        "attempts": 1,
        "started_at": run.started,
        "result": None,
        "finished_at": finished,
        "expires_at": finished + timedelta(seconds=run.keep),
    }
    jobs = _jobs(run.alias)
    target = ["key"] if features.supports_update_conflicts_with_target else None
    jobs.bulk_create(
        [jobs.model(key=run.key, created_at=run.started, **values)],
        update_conflicts=True,
        update_fields=list(values),
        unique_fields=target,
    )


def _jobs(alias: str) -> QuerySet[Job]:
    """Return all jobs. Models need Django's apps; `once` is imported before those are loaded."""
    from .models import Job

    return Job._default_manager.using(alias)


def _now(run: Run) -> int:
    connection = connections[run.alias]
    return backend_for(connection).clock(connection)


def _begun(run: Run) -> dict[str, Any]:
    return {"task": run.task, "started_at": run.started, "attempts": F("attempts") + 1}


def _write(run: Run, now: int, **values: Any) -> None:
    """Write the row, unless it bears a newer token."""
    values["token"] = run.token
    values["expires_at"] = moment_of(now + int(run.keep * 1_000_000))
    jobs = _jobs(run.alias)
    with transaction.atomic(using=run.alias, savepoint=False):
        for _ in range(TRIES):
            # First: an update that finds nothing locks a gap on InnoDB, and two of those deadlock.
            new = jobs.model(key=run.key, created_at=moment_of(now))
            jobs.bulk_create([new], ignore_conflicts=True)
            if jobs.filter(key=run.key, token__lte=run.token).update(**values):
                return
        raise LockLost(
            f"The job {run.key!r} was left as it is: a later holder of its lock than token "
            f"{run.token} has written about it.",
            name=PREFIX + run.key,
            token=run.token,
            reason="a later holder has written",
        )
