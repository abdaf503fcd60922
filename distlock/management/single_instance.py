"""A management command that runs once at a time, over all hosts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

from django.apps import apps
from django.core.management.base import BaseCommand, CommandError

from ..arguments import DEFAULT, Default
from ..deadlines import Seconds
from ..exceptions import LockBusy, LockLost
from ..leases import Lease
from ..locks import Lock, lock

LOST = 69
BUSY = 75
"""Exit statuses, as in sysexits.h: something was not available, and: try again later."""


class SingleInstanceMixin(BaseCommand):
    """Hold a lock while `handle` runs: `class Command(SingleInstanceMixin, BaseCommand)`.

    lock_name: default: the app's label and the command's name, as in "shop.report"; see
        `get_lock_name`.
    lock_wait: how long to wait while another one runs (0); `None` waits for ever.
    lock_ttl, lock_min_hold, lock_note, lock_using: as in `lock()`.
    lock_on_busy: "raise" is a `CommandError` with exit status 75; "skip" ends well, with a line on
        stderr unless the verbosity is 0.

    In `handle`, `self.lease` has the token, `check()` and `guard()`. A lock that was lost makes
    the command fail with exit status 69, whatever `handle` has done.
    """

    lock_name: str | None = None
    lock_ttl: Seconds | Default = DEFAULT
    lock_wait: Seconds | None = 0
    lock_min_hold: Seconds | None = None
    lock_note: str = ""
    lock_using: str | None = None
    lock_on_busy: Literal["raise", "skip"] = "raise"

    lease: Lease

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Not `execute`, which first looks for migrations and opens the streams; and not `handle`
        # of the class: the one of a subclass would stand before it.
        self.handle = self._locked(self.handle)  # type: ignore[method-assign]

    def get_lock_name(self, *args: Any, **options: Any) -> str:
        """Return the lock's name. Override it for one lock per value of an option."""
        if self.lock_name is not None:
            return self.lock_name
        module = type(self).__module__
        app = apps.get_containing_app_config(module)
        return f"{app.label}.{module.rpartition('.')[2]}" if app else module

    def _locked(self, handle: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handle)
        def locked(*args: Any, **options: Any) -> Any:
            held = self._lock(*args, **options)
            try:
                with held as self.lease:
                    return handle(*args, **options)
            except LockBusy as error:
                if error.name != held.name:  # of a lock that handle() takes itself
                    raise
                return self._busy(error, options.get("verbosity", 1))
            except LockLost as error:
                raise CommandError(str(error), returncode=LOST) from error

        return locked

    def _lock(self, *args: Any, **options: Any) -> Lock:
        return lock(
            self.get_lock_name(*args, **options),
            ttl=self.lock_ttl,
            wait=self.lock_wait,
            min_hold=self.lock_min_hold,
            on_busy=self.lock_on_busy,
            note=self.lock_note,
            using=self.lock_using,
        )

    def _busy(self, error: LockBusy, verbosity: int) -> None:
        message = f"Not run: {error}"
        if self.lock_on_busy == "raise":
            raise CommandError(message, returncode=BUSY) from error
        if verbosity:
            self.stderr.write(message)
