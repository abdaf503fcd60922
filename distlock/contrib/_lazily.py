"""The schedulers of beat, imported when somebody asks for one: workers have no use for them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

SCHEDULERS = {
    "SingleBeatScheduler": "distlock.contrib.beat",
    "SingleDatabaseBeatScheduler": "distlock.contrib.beat_database",
}


def __getattr__(name: str) -> Any:
    """Stand for that of `distlock.contrib.celery`."""
    if name in SCHEDULERS:
        return getattr(import_module(SCHEDULERS[name]), name)
    raise AttributeError(f"module 'distlock.contrib.celery' has no attribute {name!r}")
