"""Log lines are receivers of the signals: logger `distlock`, one stable event name per line."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from . import signals

if TYPE_CHECKING:
    from .backends.base import Holder

logger = logging.getLogger("distlock")


def connect() -> None:
    """Attach the log receivers; called once, when the app is ready."""
    signals.lock_acquired.connect(_acquired, dispatch_uid="distlock.log")
    signals.lock_busy.connect(_busy, dispatch_uid="distlock.log")
    signals.lock_released.connect(_released, dispatch_uid="distlock.log")
    signals.lock_lost.connect(_lost, dispatch_uid="distlock.log")


def _acquired(sender: object, *, lease: Any, waited: float, **kwargs: object) -> None:
    logger.debug("lock_acquired name=%r token=%s waited=%.3f", lease.name, lease.token, waited)


def _busy(
    sender: object, *, name: str, holder: Holder | None, waited: float, **kwargs: object
) -> None:
    logger.info("lock_busy name=%r waited=%.3f holder=%s", name, waited, holder or "-")


def _released(sender: object, *, lease: Any, held: float, **kwargs: object) -> None:
    logger.debug("lock_released name=%r token=%s held=%.3f", lease.name, lease.token, held)


def _lost(sender: object, *, lease: Any, reason: str, **kwargs: object) -> None:
    logger.error("lock_lost name=%r token=%s reason=%r", lease.name, lease.token, reason)
