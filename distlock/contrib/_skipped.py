"""The result of a task that did not run because somebody else had the lock: plain JSON."""

from __future__ import annotations

from typing import Any

from ..backends.base import Holder


def reason_of(holder: Holder | None) -> str:
    """Return why the lock was not to be had: somebody is at work, or `min_hold` keeps it."""
    return "busy" if holder is None or holder.owner else "too_soon"


def skipped(reason: str, name: str, holder: Holder | None = None) -> dict[str, Any]:
    """Return what tells a program, by its key "distlock", and a person that a task did not run."""
    shown = None if holder is None else str(holder)
    return {"distlock": "skipped", "reason": reason, "lock": name, "holder": shown}
