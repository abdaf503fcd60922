"""Locks that live in the database of a Django project, and can be released with its work.

What is importable from here is public, with `distlock.signals`, `distlock.testing`, and what stands
in `distlock.contrib` and, because it needs Django's apps, in `distlock.fencing`.
"""

from __future__ import annotations

from .backends.base import Holder
from .backends.stats import LockStats
from .exceptions import (
    AlreadyHeld,
    CommitOutcomeUnknown,
    JobDuplicate,
    LockBusy,
    LockError,
    LockLost,
    StaleToken,
)
from .jobs import once
from .leases import Lease
from .locks import Lock, lock

__all__ = [
    "AlreadyHeld",
    "CommitOutcomeUnknown",
    "Holder",
    "JobDuplicate",
    "Lease",
    "Lock",
    "LockBusy",
    "LockError",
    "LockLost",
    "LockStats",
    "StaleToken",
    "lock",
    "once",
]
