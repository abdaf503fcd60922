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

from ..conf import settings
from ..models import DistributedLock, Job
from ..receipts import PREFIX
from ..states import MEANING_OF_JOB, JobState, job_state_at, moment
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

RUN = ("task", "task_id", "attempts_shown", "created", "started", "finished", "unpublished")


class StateFilter(admin.SimpleListFilter):
    """Jobs in one state. There is no index for it: it reads the table."""

    title = gettext_lazy("state")
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Sequence[tuple[str, Any]]:
        """Return the states."""
        return JobState.choices

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any] | None:
        """Return the jobs in the chosen state."""
        return queryset.filter(status=self.value()) if self.value() else None


def _moment_of(field: str, description: Any) -> Any:
    """Return a column that shows a moment."""

    @admin.display(description=description, ordering=field)
    def column(self: Any, row: Any) -> str:
        value = getattr(row, field)
        return NOTHING if value is None else labelled(description, moment(value))

    return column


def _json_of(field: str, description: Any) -> Any:
    """Return a field that shows a value as JSON, for people."""

    @admin.display(description=description)
    def shown(self: Any, row: Any) -> str:
        value = getattr(row, field)
        if value is None:
            return NOTHING
        text = json.dumps(value, cls=DjangoJSONEncoder, ensure_ascii=False, indent=2)
        return format_html('<pre class="distlock-json">{}</pre>', text)

    return shown


@admin.register(Job)
class JobAdmin(Rerunning):
    """Shows jobs and their receipts, frees them and lets them run again."""

    keys = (("pk",), ("key",))
    name_field = "key"

    list_display = ("key_and_task", "badge", "attempts_shown", "finished", "expires")
    list_filter = (StateFilter, SearchFilter)
    ordering = ("-pk",)
    search_fields = ("key", "task", "task_id")
    search_help_text = gettext_lazy(
        "The beginning of a key. Anywhere in key, task and task id: choose so beside the list."
    )
    actions = ("free", "rerun")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Job]:
        """Return the jobs, each with its state at this request."""
        rows: QuerySet[Job] = super().get_queryset(request)
        return rows.annotate(status=job_state_at(now_of(request)))

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """Return what the detail view shows, with the lock if somebody may see that."""
        first = ["job", "badge", "expires", "token"]
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

    @admin.display(description=gettext_lazy("state"), ordering="status")
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
    def token(self, row: Row) -> str:
        """Return the fencing token of the last run, its digits not grouped."""
        return str(row.token)

    @admin.display(description=gettext_lazy("lock"))
    def lock(self, row: Row) -> str:
        """Return a link to the job's lock, unless that was purged."""
        locks = DistributedLock._default_manager.using(settings().USING)
        return link_to(locks.filter(name=PREFIX + row.key, slot=0).first())

    arguments_shown = _json_of("arguments", gettext_lazy("arguments"))
    result_shown = _json_of("result", gettext_lazy("result"))
