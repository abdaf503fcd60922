"""Every metric there is. Labels are bounded: `group` is of `groups.py`, and never a lock's name."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

WAITS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
HOLDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)

attempts = Counter(
    "distlock_acquire_attempts_total", "Acquires that have ended, however they did.", ["group"]
)
grants = Counter("distlock_grants_total", "Acquires that were granted the lock.", ["group"])
busy = Counter("distlock_busy_total", "Acquires that gave up a busy lock.", ["group"])
failures = Counter(
    "distlock_acquire_failures_total",
    "Acquires that broke off: the database had no answer, or the task was cancelled.",
    ["group"],
)
releases = Counter("distlock_releases_total", "Leases that were released.", ["group"])
losses = Counter("distlock_losses_total", "Leases that were lost before their release.", ["group"])
drops = Counter(
    "distlock_drops_total", "Leases that nobody can release any more, found dropped.", ["group"]
)
renewals = Counter("distlock_renewals_total", "Leases that were renewed.", ["database"])
renewal_failures = Counter(
    "distlock_renewal_failures_total",
    "Leases whose renewal had no answer; it is tried again.",
    ["database"],
)
renewals_locked = Counter(
    "distlock_renewals_locked_total",
    "Leases whose row a transaction had locked at their renewal; it is tried again.",
    ["database"],
)
wait_seconds = Histogram(
    "distlock_wait_seconds",
    "Seconds from the call of an acquire to its grant, or until it gave up.",
    ["group", "outcome"],
    buckets=WAITS,
)
hold_seconds = Histogram(
    "distlock_hold_seconds", "Seconds from a grant to the release.", ["group"], buckets=HOLDS
)
held = Gauge(
    "distlock_leases_held",
    "Leases that this process holds now.",
    ["group"],
    multiprocess_mode="livesum",
)
jobs = Counter(
    "distlock_jobs_total", "Calls of jobs under once: done, or a duplicate.", ["group", "outcome"]
)
