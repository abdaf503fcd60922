"""The admin: who holds which lock, and which jobs were done."""

from __future__ import annotations

from .jobs import JobAdmin
from .locks import DistributedLockAdmin

__all__ = ["DistributedLockAdmin", "JobAdmin"]
