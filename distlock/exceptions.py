"""What can go wrong.

    LockError
    ├── LockBusy                 not granted before the end of the wait; also a TimeoutError
    ├── AlreadyHeld              this thread or task holds it already
    ├── LockLost                 the lease is not provably ours any more; also a DatabaseError
    ├── StaleToken               a later holder has written already; also a DatabaseError
    └── CommitOutcomeUnknown     the answer to COMMIT never came; also a DatabaseError
    JobDuplicate                 the job was done before: no fault of a lock

Each carries one message in `args`, so that pickle, copy and Celery's `cls(*args)` can make it
again; what programs read stands in attributes.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.db import DatabaseError

if TYPE_CHECKING:
    from .backends.base import Holder

__all__ = [
    "AlreadyHeld",
    "CommitOutcomeUnknown",
    "JobDuplicate",
    "LockBusy",
    "LockError",
    "LockLost",
    "StaleToken",
]


class LockError(Exception):
    """The base of every error that this library raises about a lock."""

    name: str | None = None

    def __init__(self, message: str = "", *, name: str | None = None) -> None:
        super().__init__(message)
        self.name = name


class LockBusy(LockError, TimeoutError):
    """Somebody else holds the lock, and the wait is over. `waited` is in seconds.

    `holder` is `None` if it could not be told, or had gone by then.
    """

    holder: Holder | None = None
    waited: float = 0.0

    def __init__(
        self,
        message: str = "",
        *,
        name: str | None = None,
        holder: Holder | None = None,
        waited: float = 0.0,
    ) -> None:
        super().__init__(message, name=name)
        self.holder = holder
        self.waited = waited


class AlreadyHeld(LockError):
    """This thread or task holds the lock already: waiting for it would never end."""


class LockLost(LockError, DatabaseError):
    """The lease ended before its holder was done. What was done since may have been done twice.

    `token` is that of the lost lease, and `reason` says how it was lost.

    A `DatabaseError`, because any other exception that is raised while Django commits does not
    stop the commit on MariaDB and SQLite.
    """

    token: int | None = None
    reason: str = ""

    def __init__(
        self,
        message: str = "",
        *,
        name: str | None = None,
        token: int | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(message, name=name)
        self.token = token
        self.reason = reason


class StaleToken(LockError, DatabaseError):
    """A write under a fence came too late: `seen`, a newer token than `token`, was there first.

    A `DatabaseError` for the same reason as `LockLost`. `name` is `None` where only the token is
    known.
    """

    token: int | None = None
    seen: int | None = None

    def __init__(
        self,
        message: str = "",
        *,
        name: str | None = None,
        token: int | None = None,
        seen: int | None = None,
    ) -> None:
        super().__init__(message, name=name)
        self.token = token
        self.seen = seen


class CommitOutcomeUnknown(LockError, DatabaseError):
    """The connection broke during COMMIT and nothing is left that tells how it ended.

    Not a `LockLost`: unknown is not lost, and a blind retry might do the work twice.
    """


class JobDuplicate(Exception):
    """The job was done before, and `once(.., on_duplicate="raise")` did not run it again.

    Not a `LockError`: no lock failed, and whoever tries again on those must not do so on this.
    `result` is what the first run returned, as JSON gives it back; `finished_at` is when that was,
    on the database's clock.
    """

    key: str | None = None
    result: Any = None
    finished_at: datetime | None = None

    def __init__(
        self,
        message: str = "",
        *,
        key: str | None = None,
        result: Any = None,
        finished_at: datetime | None = None,
    ) -> None:
        super().__init__(message)
        self.key = key
        self.result = result
        self.finished_at = finished_at
