"""The one stream of events. Logs and metrics are receivers (`events.py` has the logs).

    lock_acquired(lease, waited)         waited: seconds
    lock_busy(name, holder, waited)      holder: a Holder, or None if it went away meanwhile
    lock_released(lease, held)           held: seconds; once the release is committed
    lock_lost(lease, reason)             once per lease, as soon as this process knows

A receiver that raises is logged by Django and changes nothing. `lock_lost` may be sent from a
thread of the library.
"""

from __future__ import annotations

from django.dispatch import Signal

__all__ = ["lock_acquired", "lock_busy", "lock_lost", "lock_released"]

lock_acquired = Signal()
lock_busy = Signal()
lock_released = Signal()
lock_lost = Signal()
