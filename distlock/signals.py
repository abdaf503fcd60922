"""The one stream of events. Logs, metrics and traces are receivers (`events.py` has the logs).

    lock_acquired(lease, waited, took)   waited: seconds; took: those from the call to the grant
    lock_busy(name, holder, waited)      holder: a Holder, or None if it went away meanwhile, and
                                         from `try_acquire`, which asks for nobody
    lock_failed(name, error, waited)     it could not be told whether the lock is free: the database
                                         did not answer or has no table, or the task was cancelled
    lock_released(lease, held)           held: seconds; once the release is committed
    lock_lost(lease, reason)             once per lease, as soon as this process knows
    lock_dropped(lease, held)            its last handle was collected without a release, told
                                         within a minute; or the database did not answer to its
                                         release until its expiry: nobody freed it sooner
    leases_renewed(alias, renewed, failed, locked)
                                         for each statement that renews: how many leases it has
                                         renewed, or, if it had no answer, how many it was for;
                                         locked: how many it left as they are, because a
                                         transaction had their rows locked
    job_done(name, took)                 a call of a job under `once` has run it; name: its lock's
    job_duplicate(name, finished_at)     a call of it found it done, and ran nothing

Each `lock_acquired` is followed by one of `lock_released`, `lock_lost` and `lock_dropped`, unless
the process ends before. A receiver that raises is logged by Django and changes nothing. What is
told of a lease after its grant may come from a thread of the library. `lock_failed` may come in the
thread of an event loop: its receivers must not use the database, and those that are `async def` are
not called then, which is logged.
"""

from __future__ import annotations

from django.dispatch import Signal

__all__ = [
    "job_done",
    "job_duplicate",
    "leases_renewed",
    "lock_acquired",
    "lock_busy",
    "lock_dropped",
    "lock_failed",
    "lock_lost",
    "lock_released",
]

lock_acquired = Signal()
lock_busy = Signal()
lock_failed = Signal()
lock_released = Signal()
lock_lost = Signal()
lock_dropped = Signal()
leases_renewed = Signal()
job_done = Signal()
job_duplicate = Signal()
