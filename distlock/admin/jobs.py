"""The admin of jobs: what was done once and when, and what has begun and was not finished."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from django.contrib import admin
from django.core.serializers.json import DjangoJSONEncoder
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.translation import gettext_lazy

from ..backends.base import EPOCH, MICROSECOND
from ..conf import settings
from ..models import DistributedLock, Job
from ..receipts import PREFIX
from ..states import MEANING_OF_JOB, JobState, job_state_at, job_state_of, moment
from .common import (
    NOTHING,
    SearchFilter,
    badge_of,
    labelled,
    link_to,
    may_view,
    now_of,
    unmistakable,
)
from .rerunning import Rerunning

if TYPE_CHECKING:
    from django_stubs_ext import WithAnnotations

    class _Live(TypedDict):
        status: str

    Row = WithAnnotations[Job, _Live]

RUN = (("task", "task_id"), ("attempts_shown", "created"), ("started", "finished"), "unpublished")


class StateFilter(admin.SimpleListFilter):
    """Jobs in one state. There is no index for it: it reads the table."""

    title = gettext_lazy("state")
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Sequence[tuple[str, Any]]:
        """Return the states."""
        return JobState.choices

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any] | None:
        """Return the jobs in the chosen state."""
        if not self.value():
            return None
        jobs: QuerySet[Any] = queryset.annotate(status=job_state_at(now_of(request)))
        return jobs.filter(status=self.value())


def _moment_of(field: str, description: Any) -> Any:
    """Return a column that shows a moment."""

    @admin.display(description=description, ordering=field)
    def column(self: Any, row: Any) -> str:
        value = getattr(row, field)
        return labelled(description, NOTHING if value is None else moment(value))

    return column


def _json_of(field: str, description: Any) -> Any:
    """Return a field that shows a value as JSON, for people."""

    @admin.display(description=description)
    def shown(self: Any, row: Any) -> str:
        value = getattr(row, field)
        if value is None:
            return NOTHING
        text = json.dumps(value, cls=DjangoJSONEncoder, ensure_ascii=False, indent=2)
        # Half of a surrogate pair is no text that a page could have.
        printable = text.encode("utf-8", "backslashreplace").decode()
        return format_html('<pre class="distlock-json">{}</pre>', printable)

    return shown


@admin.register(Job)
class JobAdmin(Rerunning):
    """Shows jobs and their receipts, frees them and lets them run again."""

    keys = (("pk",), ("key",))
    name_field = "key"
    unlisted = ("arguments", "result")

    list_display = ("key_and_task", "badge", "attempts_shown", "finished", "expires")
    list_filter = (StateFilter, SearchFilter)
    ordering = ("-pk",)
    search_fields = ("key", "task", "task_id")
    search_help_text = gettext_lazy(
        "Finds keys that begin so. To search task and task id, too, choose “anywhere” among the "
        "filters."
    )
    actions = ("free", "rerun")

    def complete(self, request: HttpRequest, rows: Sequence[Any]) -> None:
        """Add the state of each at this request, with one query for the locks of those that run.

        For a column of the list, PostgreSQL would read all locks that are held, and look there.
        """
        now = now_of(request)
        names = [PREFIX + row.key for row in rows if row.state == Job.State.RUNNING]
        locks = DistributedLock._default_manager.using(settings().USING).exclude(owner="")
        held = locks.filter(name__in=names, slot=0, expires_at__gt=EPOCH + now * MICROSECOND)
        running = set(held.values_list("name", flat=True)) if names else set()
        for row in rows:
            row.status = job_state_of(row, now, locked=PREFIX + row.key in running)

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """Return what the detail view shows, with the lock if somebody may see that."""
        first: list[Any] = ["job", ("badge", "expires"), "token_shown"]
        if may_view(request, DistributedLock):
            first.append("lock")
        return [
            (None, {"fields": first}),
            (gettext_lazy("Run"), {"fields": RUN}),
            (gettext_lazy("Data"), {"fields": ("arguments_shown", "result_shown")}),
        ]

    # -- columns ---------------------------------------------------------------------------------

    @admin.display(description=gettext_lazy("job"), ordering="key")
    def key_and_task(self, row: Row) -> str:
        """Return the key, and the task in small."""
        return format_html(
            '<div class="distlock-name" title="{0}">{0}</div><div class="distlock-small">{1}</div>',
            self.job(row),
            row.task,
        )

    @admin.display(description=gettext_lazy("job"))
    def job(self, row: Row) -> str:
        """Return the key."""
        return unmistakable(row.key)

    @admin.display(description=gettext_lazy("state"), ordering="state")
    def badge(self, row: Row) -> str:
        """Return the state as a badge."""
        return badge_of(JobState(row.status), MEANING_OF_JOB)

    @admin.display(description=gettext_lazy("attempts"), ordering="attempts")
    def attempts_shown(self, row: Row) -> str:
        """Return how often it was begun."""
        return labelled(gettext_lazy("attempts"), str(row.attempts))

    created = _moment_of("created_at", gettext_lazy("first seen"))
    started = _moment_of("started_at", gettext_lazy("started"))
    finished = _moment_of("finished_at", gettext_lazy("finished"))
    expires = _moment_of("expires_at", gettext_lazy("expires"))
    unpublished = _moment_of("unpublished_since", gettext_lazy("unpublished since"))

    # -- the detail view -------------------------------------------------------------------------

    @admin.display(description=gettext_lazy("token"))
    def token_shown(self, row: Row) -> str:
        """Return the fencing token of the last run, its digits not grouped."""
        return str(row.token)

    @admin.display(description=gettext_lazy("lock"))
    def lock(self, row: Row) -> str:
        """Return a link to the job's lock, unless that was purged."""
        locks = DistributedLock._default_manager.using(settings().USING)
        return link_to(locks.filter(name=PREFIX + row.key, slot=0).first(), self.admin_site.name)

    arguments_shown = _json_of("arguments", gettext_lazy("arguments"))
    result_shown = _json_of("result", gettext_lazy("result"))
