"""celery-singleton with its keys in the database.

    app.conf.singleton_backend_class = "distlock.contrib.celery_singleton.DatabaseBackend"

Also `import distlock.contrib.celery_singleton` where the Celery app is made: a worker's main
process then frees the keys of tasks that are revoked or expire.

# Note [Whose key]
The owner of a key is the task's id. celery-singleton unlocks by the key's name alone, at the end of
a run or where publishing failed: that is then the key of the running task, or of the one that this
thread was about to publish, and no other is freed. A task that retries takes the key that it has.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any

from celery._state import get_current_task
from celery.signals import after_task_publish, task_revoked
from celery_singleton import Singleton  # type: ignore[import-untyped]
from celery_singleton.backends import BaseBackend  # type: ignore[import-untyped]
from django.db import connections

from ..deadlines import Seconds
from ._keys import DAY, Keys

LONGEST_OWNER = 64


class _Unpublished(threading.local):
    """The ids for which this thread has taken keys, and which it has not published yet."""

    def __init__(self) -> None:
        self.ids: dict[str, str] = {}


_unpublished = _Unpublished()


class DatabaseBackend(BaseBackend):  # type: ignore[misc]
    """What celery-singleton asks for a lock. `singleton_backend_kwargs`: `using`, `expiry`.

    expiry: seconds for which a key is taken where neither the task's `lock_expiry` nor
        `singleton_lock_expiry` says it (a day).
    """

    def __init__(
        self, url: object = None, *, using: str | None = None, expiry: Seconds = DAY
    ) -> None:
        self.keys = Keys(using)
        self._expiry = expiry

    def lock(self, lock: str, task_id: str, expiry: Seconds | None = None) -> bool:
        """Take a key for a task; whether it is that task's now."""
        expiry = self._expiry if expiry is None else expiry
        if not self.keys.take(lock, _owner(task_id), expiry, note=task_id):
            return False
        _unpublished.ids[lock] = task_id
        return True

    def unlock(self, lock: str) -> None:
        """Free a key of the task that ends, or could not be published.

        Called by hand, with no task running, it takes the key from whoever has it.
        """
        request = getattr(get_current_task(), "request", None)
        task_id = _unpublished.ids.pop(lock, None) or (request and request.id)
        if task_id:
            self.keys.give_back(lock, _owner(task_id))
        else:
            self.keys.force(lock)

    def get(self, lock: str) -> str | None:
        """Return the id of the task that has a key."""
        holder = self.keys.holder(lock)
        return holder.note if holder else None

    def clear(self, key_prefix: str) -> None:
        """Take all keys that begin so from whoever has them."""
        for name in self.keys.beginning_with(key_prefix):
            self.keys.force(name)


def _owner(task_id: str) -> str:
    """Return a task's id, or a hash of one that the column would not take."""
    if len(task_id) <= LONGEST_OWNER:
        return task_id
    return hashlib.sha256(task_id.encode()).hexdigest()


@after_task_publish.connect(dispatch_uid=__name__)
def _published(headers: dict[str, Any], **kwargs: Any) -> None:
    """Note that a key is its message's from now on."""
    for lock, task_id in list(_unpublished.ids.items()):
        if task_id == headers.get("id"):
            del _unpublished.ids[lock]


@task_revoked.connect(dispatch_uid=__name__)
def _revoked(sender: Any, request: Any, **kwargs: Any) -> None:
    """Free the key of a task that was revoked or has expired: it calls no hook of its own."""
    if isinstance(sender, Singleton) and isinstance(sender.singleton_backend, DatabaseBackend):
        keys = sender.singleton_backend.keys
        lock = sender.generate_lock(sender.name, request.args, request.kwargs)
        keys.give_back(lock, _owner(request.id))
        connections[keys.alias].close()  # a worker's main process needs it no more
