"""Orders: what somebody wants done, and how it comes into the outbox; see `outbox.py`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from django.db import DatabaseError, OperationalError, connections
from django.db.models import BooleanField, ExpressionWrapper, Q

from .backends import backend_for
from .backends.base import moment_of
from .conf import settings
from .connections import in_transaction
from .deadlines import Deadline, seconds
from .exceptions import LockBusy
from .fields import DatabaseNow
from .locks import lock
from .outbox import SOON, jobs_of, moment_in, now_of, unchanged
from .receipts import is_locked

if TYPE_CHECKING:
    from .models import Job

Until = Literal["start", "finish"]

LOOK = 0.25
"""Seconds after which who waits for a turn looks whether somebody has queued the same: then there
is no need of a turn any more."""


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
            except LockBusy:
                if alone or not deadline.left:
                    turn._give_up(deadline)
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
        features, rows = connections[self.alias].features, unchanged(self.alias, found)
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
