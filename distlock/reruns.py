"""What people may do with a job: free its key, or let it run again. For the admin.

# Note [As shown]
Each is a compare-and-set on what the person has seen: the row, its task id, its state, the token of
its last run and the moment when it expires. A run that starts writes its own token. Whoever queues
the job anew writes another moment, and mostly another task id: what has waited past its time keeps
that one. So what has changed is left alone. So is a job whose lock is held, and a row that a
transaction has locked. Nothing here waits, and nothing takes the lock.

# Note [Again]
A message that waits may be published once more under its id: the row starts one run of it. What is
over is queued under a new id: results and receipts that bear the old one would answer for it, and
a copy of the old message, should it still come, finds another id in the row and does not run.
"""

from __future__ import annotations

import enum
import uuid
from datetime import timezone
from typing import TYPE_CHECKING, Any

from django.db import connections
from django.utils.dateparse import parse_datetime

from .backends.base import microseconds_of, moment_of
from .fields import DatabaseNow
from .outbox import jobs_of, moment_in, now_of, write_unlocked
from .receipts import is_locked
from .states import JobState

if TYPE_CHECKING:
    from django.db.models import QuerySet

    from .models import Job

STORED = {"args", "kwargs", "options", "ttl"}
"""What `enqueue_once` keeps of a call."""
TIMES = ("eta", "expires")
"""Options that have had their day."""


class Way(str, enum.Enum):
    """How a job can be let run again."""

    PUBLISH = "publish"  # it waits: its message is sent once more, under the same id
    QUEUE = "queue"  # it is over: it is queued with its stored arguments, under a new id
    FORGET = "forget"  # its receipt is forgotten, and the next call runs it
    NONE = "none"


def is_queueable(job: Job) -> bool:
    """Whether the row has what it takes to send a message: `enqueue_once` has written it."""
    return isinstance(job.arguments, dict) and job.arguments.keys() >= STORED


def way_of(job: Any) -> Way:
    """Return how a job, whose row has its `status`, can be let run again."""
    if job.status == JobState.RUNNING:
        return Way.NONE
    if is_queueable(job):
        return Way.PUBLISH if job.status == JobState.QUEUED else Way.QUEUE
    return Way.FORGET if job.status == JobState.DONE else Way.NONE


def can_be_freed(job: Any) -> bool:
    """Whether a job, whose row has its `status`, waits or was broken off, with a message to come.

    The key of any other is free already, or its lock is held.
    """
    return is_queueable(job) and job.status in (JobState.QUEUED, JobState.BROKEN)


def free(alias: str, job: Job) -> bool:
    """Free the key: the job's message, should it come, does not run. `False`: see Note [As shown].

    The caller must have shown the job.
    """
    now = moment_in(alias, 0)
    values = {"state": "done", "finished_at": now, "expires_at": now, "unpublished_since": None}
    return write_unlocked(alias, _as_shown(alias, job), values) is not None


def forget(alias: str, job: Job) -> bool:
    """Let a receipt have expired: the next call runs the job. `False`: see Note [As shown]."""
    return (
        write_unlocked(alias, _as_shown(alias, job), {"expires_at": moment_in(alias, 0)})
        is not None
    )


def again(alias: str, job: Job, way: Way) -> Job | None:
    """Say that a job is queued, and return it: its message is to be published on commit.

    The caller must be in a transaction. `None`: see Note [As shown]. If nobody publishes it,
    `resend_jobs` does.
    """
    now, arguments = now_of(alias), job.arguments
    values: dict[str, Any] = {
        "unpublished_since": moment_of(now),
        "expires_at": moment_of(now + int(arguments["ttl"] * 1_000_000)),
    }
    if way is Way.QUEUE:
        options = {name: of for name, of in arguments["options"].items() if name not in TIMES}
        values |= {
            "state": "queued",
            "task_id": str(uuid.uuid4()),
            "arguments": {**arguments, "options": options},
            "result": None,
            "attempts": 0,
            "started_at": None,
            "finished_at": None,
        }
    else:
        if _has_passed(arguments["options"].get("expires"), now):
            if (latest := _latest(alias, job)) is None:
                return None
            values["arguments"] = _without_expires(latest.arguments)
        values["expires_at"] = max(values["expires_at"], job.expires_at)
    if write_unlocked(alias, _as_shown(alias, job), values) is None:
        return None
    for name, value in values.items():
        setattr(job, name, value)
    return job


def _latest(alias: str, job: Job) -> Job | None:
    """Return the row as it is, with the arguments that a call has replaced meanwhile."""
    skip = connections[alias].features.has_select_for_update_skip_locked
    return _as_shown(alias, job).select_for_update(skip_locked=skip).first()


def _without_expires(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what is stored of a call without a limit: a worker would throw the message away."""
    options = {name: of for name, of in arguments["options"].items() if name != "expires"}
    return {**arguments, "options": options}


def _has_passed(stored: Any, now: int) -> bool:
    """Whether a moment has, as it is stored of the options of a message."""
    text = stored.get("__value__") if isinstance(stored, dict) else stored
    try:
        at = parse_datetime(text) if isinstance(text, str) else None
    except ValueError:
        return False
    if at is not None and at.tzinfo is None:
        at = at.replace(tzinfo=timezone.utc)
    return at is not None and microseconds_of(at) <= now


def _as_shown(alias: str, job: Job) -> QuerySet[Job]:
    same = jobs_of(alias).filter(pk=job.pk, task_id=job.task_id, state=job.state, token=job.token)
    return same.filter(expires_at=job.expires_at).exclude(is_locked(DatabaseNow()))
