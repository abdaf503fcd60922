"""Log records: logger `distlock`, and one stable event name each, which its text begins with.

Each has its event and what belongs to it as attributes, too: `record.event`, `record.lock`. Some
are written by receivers of the signals, the others where it happens. docs/monitoring.md lists all.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from . import signals

if TYPE_CHECKING:
    from .backends.base import Holder

_logger = logging.getLogger("distlock")


def log(level: int, text: str, *, exc_info: bool = False, **fields: object) -> None:
    """Log an event: `log(logging.INFO, "lock_looked lock=%r: %s", lock=name, error=error)`.

    The text begins with the event's name and takes the fields in their order. The caller must not
    call a field what a `LogRecord` calls something else: a lock's name is `lock`.
    """
    if not _logger.isEnabledFor(level):
        return
    event = text.partition(" ")[0].rstrip(":")
    extra = {"event": event} | {key: _plain(value) for key, value in fields.items()}
    shown = ["-" if value is None else value for value in fields.values()]
    _logger.log(level, text, *shown, exc_info=exc_info, extra=extra, stacklevel=2)


def _plain(value: object) -> object:
    """Return what every formatter and handler can take: an error and a holder as their text."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def connect() -> None:
    """Attach the log receivers; called once, when the app is ready."""
    signals.lock_acquired.connect(_acquired, dispatch_uid="distlock.log")
    signals.lock_busy.connect(_busy, dispatch_uid="distlock.log")
    signals.lock_failed.connect(_failed, dispatch_uid="distlock.log")
    signals.lock_released.connect(_released, dispatch_uid="distlock.log")
    signals.lock_lost.connect(_lost, dispatch_uid="distlock.log")
    signals.lock_dropped.connect(_dropped, dispatch_uid="distlock.log")
    signals.job_done.connect(_job_done, dispatch_uid="distlock.log")
    signals.job_duplicate.connect(_job_duplicate, dispatch_uid="distlock.log")


def _acquired(sender: object, *, lease: Any, waited: float, **kwargs: object) -> None:
    text = "lock_acquired name=%r token=%s waited=%.3f"
    log(logging.DEBUG, text, lock=lease.name, token=lease.token, waited=waited)


def _busy(
    sender: object, *, name: str, holder: Holder | None, waited: float, **kwargs: object
) -> None:
    text = "lock_busy name=%r waited=%.3f holder=%s"
    log(logging.INFO, text, lock=name, waited=waited, holder=holder)


def _failed(
    sender: object, *, name: str, error: BaseException, waited: float, **kwargs: object
) -> None:
    text = "lock_failed name=%r waited=%.3f: %s"
    log(logging.INFO, text, lock=name, waited=waited, error=str(error) or type(error).__name__)


def _released(sender: object, *, lease: Any, held: float, **kwargs: object) -> None:
    text = "lock_released name=%r token=%s held=%.3f"
    log(logging.DEBUG, text, lock=lease.name, token=lease.token, held=held)


def _lost(sender: object, *, lease: Any, reason: str, **kwargs: object) -> None:
    text = "lock_lost name=%r token=%s reason=%r"
    log(logging.ERROR, text, lock=lease.name, token=lease.token, reason=reason)


def _dropped(sender: object, *, lease: Any, held: float, **kwargs: object) -> None:
    text = "lock_dropped name=%r token=%s held=%.3f: nobody can release it any more"
    log(logging.WARNING, text, lock=lease.name, token=lease.token, held=held)


def _job_done(sender: object, *, name: str, took: float, **kwargs: object) -> None:
    log(logging.DEBUG, "job_done name=%r took=%.3f", lock=name, took=took)


def _job_duplicate(sender: object, *, name: str, finished_at: Any, **kwargs: object) -> None:
    text = "job_duplicate name=%r finished_at=%s"
    log(logging.DEBUG, text, lock=name, finished_at=finished_at)
