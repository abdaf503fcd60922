"""Settings of the workers: those of the tests, with the databases that pytest made.

DISTLOCK_WORKER_DATABASE_<alias>   the name of each
DISTLOCK_WORKER_TTL                the default ttl of locks
"""

from __future__ import annotations

import os

from tests.settings import *  # noqa: F403
from tests.settings import DATABASES

for alias, settings in DATABASES.items():
    settings["NAME"] = os.environ[f"DISTLOCK_WORKER_DATABASE_{alias}"]

SILENCED_SYSTEM_CHECKS = ["distlock.W002"]  # SQLite: all that takes locks runs on this host
DISTLOCK = {"TTL": float(os.environ.get("DISTLOCK_WORKER_TTL", "30"))}
