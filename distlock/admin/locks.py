"""The admin of locks: who holds which and since when, and a way to take it from them.

Nothing can be edited: a row belongs to its holder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.db import connections
from django.db.models import BigIntegerField, Count, QuerySet, Value
from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from ..backends import backend_for
from ..backends.base import EPOCH, MICROSECOND
from ..conf import settings
from ..models import NAMED, DistributedLock, Job, Ticket
from ..receipts import PREFIX
from ..states import LockState, state_at
from .columns import LockColumns
from .common import SearchFilter, link_to, may_view, now_of
from .live import Live
from .releasing import Releasing
from .story import story_of

if TYPE_CHECKING:
    from .columns import Row

TASK = re.compile(r"task .+\[(.+)\]")
"""How the holder is called that is a Celery task."""
RECEIPT_OF_TASK = "celery:"


class StateFilter(admin.SimpleListFilter):
    """Rows in one state. There is no index for it: it reads the table."""

    title = gettext_lazy("state")
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Sequence[tuple[str, Any]]:
        """Return the states."""
        return LockState.choices

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any] | None:
        """Return the rows in the chosen state."""
        return queryset.filter(state=self.value()) if self.value() else None


class HeldForFilter(admin.SimpleListFilter):
    """Locks that somebody has had for long. It reads the table, too."""

    title = gettext_lazy("time held")
    parameter_name = "held_for"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Sequence[tuple[str, Any]]:
        """Return the durations, in seconds."""
        return [("60", _("over 1 minute")), ("3600", _("over 1 hour")), ("86400", _("over 1 day"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any] | None:
        """Return the locks that are held since that long ago."""
        if self.value() not in {value for value, _title in self.lookup_choices}:
            return None
        since = now_of(request) - int(self.value() or 0) * 1_000_000
        return queryset.filter(state=LockState.HELD, acquired_at__lte=EPOCH + since * MICROSECOND)


@admin.register(DistributedLock)
class DistributedLockAdmin(Releasing, Live, LockColumns):
    """Shows locks and their holders, and takes a lock from its holder on demand."""

    keys = (("name", "slot"),)
    name_field = "name"

    list_display = (
        "lock_and_token",
        "badge",
        "holder",
        "held_since",
        "time_left",
        "holds",
        "waits_shown",
    )
    list_filter = (StateFilter, HeldForFilter, SearchFilter)
    ordering = ("name", "slot")
    search_fields = ("name", "host", "pid", "thread", "note")
    search_help_text = gettext_lazy(
        "Finds names that begin so. To search host, process id, thread or task, and note, too, "
        "choose “anywhere” among the filters."
    )
    actions = ("force_release",)
    live_in_list = list_display[1:]
    live_in_detail = ("state_shown", "waiting", "time_left", "expires", "renewed")

    # -- what is shown ---------------------------------------------------------------------------

    def get_queryset(self, request: HttpRequest) -> QuerySet[DistributedLock]:
        """Return the locks of the alias in the settings, each with its state at this request."""
        now = now_of(request)
        rows: QuerySet[DistributedLock] = super().get_queryset(request).filter(NAMED)
        return rows.annotate(state=state_at(now), now=Value(now, output_field=BigIntegerField()))

    def complete(self, request: HttpRequest, rows: Sequence[Any]) -> None:
        """Add how many wait in line, in one query by the names."""
        alias = settings().USING
        lines = Ticket._default_manager.using(alias).filter(
            name__in={row.name for row in rows}, alive_until__gt=now_of(request)
        )
        counted = lines.values_list("name", "slot").annotate(Count("pk")).order_by()
        queued = {(name, slot): count for name, slot, count in counted} if rows else {}
        for row in rows:
            row.queued = queued.get((row.name, row.slot), 0)
            row.knows_waiters = backend_for(connections[alias]).notifies

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """Return what the detail view shows, with the job if somebody may see that."""
        first: list[Any] = ["lock", ("state_shown", "waiting"), ("time_left", "expires"), "token"]
        if may_view(request, Job) and obj is not None and _may_have_job(obj):
            first.append("job")
        told = gettext_lazy("Of a lock that is not held: the last one.")
        process, times = ("host", "process_id"), ("held_since", "renewed")
        holder = (process, "thread", "note", times, ("lease", "owner"))
        figures = (("grants", "share"), "losses", ("mean_held", "longest_held"))
        return [
            (None, {"fields": first}),
            (gettext_lazy("Holder"), {"fields": holder, "description": told}),
            (gettext_lazy("Story"), {"fields": ("story",)}),
            (gettext_lazy("So far"), {"fields": (*figures, ("mean_waited", "longest_waited"))}),
        ]

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        """Show the list."""
        if not self.has_view_permission(request):
            return super().changelist_view(request, extra_context)
        live = self.live_context(request)
        return super().changelist_view(request, {**live, **(extra_context or {})})

    def detail_context(self, request: HttpRequest, row: Any) -> dict[str, Any]:
        """Return what the script needs to know, too."""
        return {**self.live_context(request), **super().detail_context(request, row)}

    # -- the detail view -------------------------------------------------------------------------

    @admin.display(description=gettext_lazy("job"))
    def job(self, row: Row) -> str:
        """Return a link to the job that the lock is for, once there is a row of it."""
        return link_to(_job_of(row), self.admin_site.name)

    @admin.display(description=gettext_lazy("story"))
    def story(self, row: Row) -> str:
        """Return what is known of its story."""
        return story_of(row)

    @admin.display(description=gettext_lazy("grants"))
    def grants(self, row: Row) -> str:
        """Return how often it was granted."""
        return str(row.acquisitions)


def _may_have_job(row: DistributedLock) -> bool:
    return row.name.startswith(PREFIX) or TASK.fullmatch(row.thread) is not None


def _job_of(row: DistributedLock) -> Job | None:
    """Return the job that a lock is for, or that of the task that has it, or the task's receipt."""
    jobs = Job._default_manager.using(settings().USING)
    if row.name.startswith(PREFIX):
        return jobs.filter(key=row.name.removeprefix(PREFIX)).first()
    task = TASK.fullmatch(row.thread)
    if task is None:
        return None
    # One after the other, and without an order: each is found by an index.
    ways = ({"task_id": task[1]}, {"key": RECEIPT_OF_TASK + task[1]})
    return next((job for way in ways for job in jobs.filter(**way)[:1]), None)
