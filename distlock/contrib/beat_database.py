"""The same over django-celery-beat: its table has the schedule, and when each entry ran last.

    celery -A proj beat -S distlock.contrib.celery:SingleDatabaseBeatScheduler

It writes that moment every few minutes; here it is written with every tick.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import router
from django_celery_beat.models import PeriodicTask
from django_celery_beat.schedulers import DatabaseScheduler, ModelEntry

from .beat import Leader


class Entry(ModelEntry):  # type: ignore[misc]
    """An entry that asks the app what time it is, which asks the database."""

    def __init__(self, model: Any, app: Any = None) -> None:
        super().__init__(model, app=app)
        if getattr(self, "schedule", None) is not None:
            self.schedule.nowfun = self.app.now

    def _default_now(self) -> datetime:
        now: datetime = self.app.now()
        if getattr(settings, "DJANGO_CELERY_BEAT_TZ_AWARE", True):
            return now
        return now.astimezone(timezone.utc).replace(tzinfo=None)

    default_now = _default_now

    def __next__(self) -> Entry:
        """Return the entry after a run, as its parent does, but with the same app."""
        self.model.last_run_at = self._default_now()
        self.model.total_run_count += 1
        self.model.no_changes = True
        return Entry(self.model, app=self.app)


class SingleDatabaseBeatScheduler(Leader, DatabaseScheduler):  # type: ignore[misc]
    """django-celery-beat's scheduler. The lock stands in the database of its table."""

    Entry = Entry

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.lock.alias != self.default_alias():
            raise ImproperlyConfigured(
                f"distlock_beat_using is {self.lock.alias!r}, but the schedule is in "
                f"{self.default_alias()!r}: a tick and its lock must be in one database."
            )

    def default_alias(self) -> str:
        """Return the database of the schedule."""
        return router.db_for_write(PeriodicTask)

    def recall(self) -> None:
        """Read the table again; what has never run counts from now on, whoever ticks then."""
        self._initial_read = True
        schedule = self.schedule
        for name in self.Model.objects.filter(last_run_at=None).values_list("name", flat=True):
            if name in schedule:
                self.remember(name)

    def remember(self, name: str) -> None:
        """Write when an entry ran last, and how often; nothing else that somebody may edit."""
        model = self._schedule[name].model
        with self.guarded():
            self.Model.objects.filter(pk=model.pk).update(
                last_run_at=model.last_run_at, total_run_count=model.total_run_count
            )

    def sync(self) -> None:
        """Write nothing: every tick has been, and a follower's moments are old."""
        self._dirty.clear()
