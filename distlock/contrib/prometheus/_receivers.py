"""What counts: receivers of the signals.

# Note [Leases held]
In one process the gauge is read off the leases themselves when it is collected. Where there is a
PROMETHEUS_MULTIPROC_DIR somebody else collects, from files, so each grant and each end writes to
one. A forked child begins with none: its file is new, and what it has of its parent's is forgotten
here without touching a metric, whose lock another thread may have held when the process forked.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from functools import partial
from typing import Any
from weakref import WeakSet

from ... import signals
from ...background import after_fork
from ...groups import group_of
from ...terms import Term
from . import _metrics as metrics

UID = "distlock.prometheus"

_held: defaultdict[str, WeakSet[Term]] = defaultdict(WeakSet)
"""By group; see Note [Leases held]."""
_begun: set[tuple[str, str]] = set()
_mutex = threading.Lock()


def install() -> None:
    """Count from now on. A second call does nothing."""
    signals.lock_acquired.connect(_acquired, dispatch_uid=UID)
    signals.lock_busy.connect(_busy, dispatch_uid=UID)
    signals.lock_failed.connect(_failed, dispatch_uid=UID)
    signals.lock_released.connect(_released, dispatch_uid=UID)
    signals.lock_lost.connect(_lost, dispatch_uid=UID)
    signals.lock_dropped.connect(_dropped, dispatch_uid=UID)
    signals.leases_renewed.connect(_renewed, dispatch_uid=UID)
    signals.job_done.connect(_job_done, dispatch_uid=UID)
    signals.job_duplicate.connect(_job_duplicate, dispatch_uid=UID)


def _acquired(sender: object, *, lease: Any, took: float, **kwargs: object) -> None:
    group, term = group_of(lease.name), lease._term
    _begin_at_zero(group, term.alias)
    metrics.attempts.labels(group).inc()
    metrics.grants.labels(group).inc()
    metrics.wait_seconds.labels(group, "granted").observe(took)
    with _mutex:
        _held[group].add(term)
    metrics.held.labels(group).inc()
    if term.over:  # its end may have been told before this
        _ended(group, lease)


def _busy(sender: object, *, name: str, waited: float, **kwargs: object) -> None:
    group = group_of(name)
    metrics.attempts.labels(group).inc()
    metrics.busy.labels(group).inc()
    metrics.wait_seconds.labels(group, "busy").observe(waited)


def _failed(sender: object, *, name: str, **kwargs: object) -> None:
    group = group_of(name)
    metrics.attempts.labels(group).inc()
    metrics.failures.labels(group).inc()


def _released(sender: object, *, lease: Any, held: float, **kwargs: object) -> None:
    group = group_of(lease.name)
    metrics.releases.labels(group).inc()
    metrics.hold_seconds.labels(group).observe(held)
    _ended(group, lease)


def _lost(sender: object, *, lease: Any, **kwargs: object) -> None:
    group = group_of(lease.name)
    metrics.losses.labels(group).inc()
    _ended(group, lease)


def _dropped(sender: object, *, lease: Any, **kwargs: object) -> None:
    group = group_of(lease.name)
    metrics.drops.labels(group).inc()
    _ended(group, lease)


def _renewed(
    sender: object, *, alias: str, renewed: int, failed: int, locked: int, **kwargs: object
) -> None:
    metrics.renewals.labels(alias).inc(renewed)
    metrics.renewal_failures.labels(alias).inc(failed)
    metrics.renewals_locked.labels(alias).inc(locked)


def _job_done(sender: object, *, name: str, **kwargs: object) -> None:
    metrics.jobs.labels(group_of(name), "done").inc()


def _job_duplicate(sender: object, *, name: str, **kwargs: object) -> None:
    metrics.jobs.labels(group_of(name), "duplicate").inc()


def _begin_at_zero(group: str, alias: str) -> None:
    """Show what has not happened yet: Prometheus takes no notice of a count that begins at one."""
    if (group, alias) in _begun:
        return
    _begun.add((group, alias))
    for metric in (metrics.busy, metrics.failures, metrics.losses, metrics.drops):
        metric.labels(group)
    metrics.held.labels(group).set_function(partial(_count, group))
    metrics.renewals.labels(alias)
    metrics.renewal_failures.labels(alias)
    metrics.renewals_locked.labels(alias)


# -- see Note [Leases held] ----------------------------------------------------------------------


def _ended(group: str, lease: Any) -> None:
    with _mutex:
        known = lease._term in _held[group]
        _held[group].discard(lease._term)
    if known:
        metrics.held.labels(group).dec()


def _count(group: str) -> float:
    with _mutex:
        return len(_held[group])


def _forget() -> None:
    global _mutex
    _mutex = threading.Lock()
    _begun.clear()  # a child of many processes has a file of its own
    for terms in list(_held.values()):
        terms.clear()


after_fork(_forget)
