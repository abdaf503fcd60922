"""celery-once with its keys in the database.

    app.conf.ONCE = {
        "backend": "distlock.contrib.celery_once.DatabaseBackend",
        "settings": {"default_timeout": 3600},
    }

Also `import distlock.contrib.celery_once` where the Celery app is made: a worker's main process
then clears the keys of tasks that are revoked or expire.

# Note [Whose key]
celery-once takes a key before the message has an id, and clears it by its name alone: a run that
outlives its timeout would clear the key of the next one. So each key gets an owner, whose nonce
goes along in a header of the message, through retries, too. The run that ends clears the key of its
own message and no other.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Mapping
from typing import Any

from celery._state import get_current_task
from celery.signals import before_task_publish, task_revoked
from celery_once import AlreadyQueued  # type: ignore[import-untyped]
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from ..deadlines import Seconds
from ..events import log
from ._keys import Keys

HEADER = "distlock_once"
PREFIX = "qo_"


class _Taken(threading.local):
    """The keys that this thread has taken, and not yet sent along with a message."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}


_taken = _Taken()


class DatabaseBackend:
    """What celery-once asks for a key. Settings: `default_timeout` is celery-once's; `using`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        if settings.get("blocking"):
            raise ImproperlyConfigured(
                "ONCE['settings']['blocking'] is not there with keys in the database: delay() "
                "would wait for a task to end. Remove it, and let AlreadyQueued tell the caller."
            )
        self._keys = Keys(settings.get("using"))

    def raise_or_lock(self, key: str, timeout: Seconds | None) -> None:
        """Take a key for the message that is about to be published. Raises `AlreadyQueued`."""
        owner = uuid.uuid4().hex
        if not self._keys.take(key, owner, timeout, note="queued by celery-once"):
            raise AlreadyQueued(self._keys.left(key))
        _taken.owners.pop(key, None)
        _taken.owners[key] = owner

    def clear_lock(self, key: str) -> bool:
        """Clear the key of the message that this worker is about to end, or to run.

        What is called outside of a run, or finds another message's key, leaves it alone.
        """
        request = getattr(get_current_task(), "request", None)
        found, owner = _key_of(request.headers if request else None)
        if found != key:
            owner = _taken.owners.pop(key, "")  # run by task_always_eager: it was never sent
        if owner and self._keys.give_back(key, owner):
            return True
        log(logging.INFO, "once_key_kept name=%r: it is not, or no longer, this run's", key=key)
        return False

    def forget(self, headers: Mapping[str, Any] | None) -> None:
        """Clear the key of a message that will not be run."""
        key, owner = _key_of(headers)
        if owner:
            self._keys.give_back(key, owner)
            connections[self._keys.alias].close()  # a worker's main process needs it no more


def _key_of(headers: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return the key and the owner that came with a message, or two empty ones."""
    key, owner = (headers or {}).get(HEADER) or ("", "")
    return key, owner


@before_task_publish.connect(dispatch_uid=__name__)
def _send_along(sender: str, headers: dict[str, Any], **kwargs: Any) -> None:
    """Put the key that was taken last into its message, which this thread publishes next."""
    key = next(reversed(_taken.owners), "")
    if HEADER not in headers and f"{key}_".startswith(f"{PREFIX}{sender}_"):
        headers[HEADER] = [key, _taken.owners.pop(key)]


@task_revoked.connect(dispatch_uid=__name__)
def _revoked(sender: Any, request: Any, **kwargs: Any) -> None:
    """Clear the key of a task that was revoked or has expired: no hook of celery-once is called."""
    if _key_of(request.headers)[1] and isinstance(sender.once_backend, DatabaseBackend):
        sender.once_backend.forget(request.headers)
