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
from .common import NOTHING, ReadOnlyAdmin, badge_of, link_to, now_of, unmistakable

if TYPE_CHECKING:
    from django_stubs_ext import WithAnnotations

    class _Live(TypedDict):
        status: str

    Row = WithAnnotations[Job, _Live]

RUN = ("task", "task_id", "attempts", "created", "started", "finished")


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
        return NOTHING if value is None else moment(value)

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
class JobAdmin(ReadOnlyAdmin):
    """Shows jobs and their receipts."""

    list_display = ("key_and_task", "badge", "attempts", "finished", "expires")
    list_filter = (StateFilter,)
    ordering = ("-pk",)
    search_fields = ("key", "task", "task_id")
    search_help_text = gettext_lazy("Key, task or task id")
    change_form_template = "distlock/admin/job.html"
    fieldsets = (
        (None, {"fields": ("job", "badge", "expires", "token", "lock")}),
        (gettext_lazy("Run"), {"fields": RUN}),
        (gettext_lazy("Data"), {"fields": ("arguments_shown", "result_shown")}),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Job]:
        """Return the jobs, each with its state at this request."""
        rows: QuerySet[Job] = super().get_queryset(request)
        return rows.annotate(status=job_state_at(now_of(request)))

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

    created = _moment_of("created_at", gettext_lazy("first seen"))
    started = _moment_of("started_at", gettext_lazy("started"))
    finished = _moment_of("finished_at", gettext_lazy("finished"))
    expires = _moment_of("expires_at", gettext_lazy("expires"))

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
