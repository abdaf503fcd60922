"""The admin of locks: who holds which and since when, and a way to take it from them.

Nothing can be edited: a row belongs to its holder.

# Note [Forced release and transactions]
The release and its audit entry are one transaction: both happen, or neither does. With
ATOMIC_REQUESTS that is the request's, and the lock is free when the request commits; until then
its row is locked, which others see as busy. So what says that it happened, the log line and the
message to the user, is sent on commit. An audit log on another database than the locks cannot be
part of it: there the entry is written first, and a COMMIT that then fails leaves one too many.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.core.exceptions import BadRequest
from django.db import DatabaseError, connections, transaction
from django.db.models import BigIntegerField, QuerySet, Value
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.html import format_html
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from ..arguments import checked_name
from ..backends import backend_for
from ..backends.base import EPOCH, MICROSECOND
from ..conf import settings
from ..models import NAMED, DistributedLock, Job
from ..receipts import PREFIX
from ..states import MEANING, LockState, duration, microseconds, moment, state_at
from .common import NOTHING, ReadOnlyAdmin, badge_of, link_to, now_of, unmistakable

if TYPE_CHECKING:
    from django_stubs_ext import WithAnnotations

    class _Live(TypedDict):
        state: str
        now: int

    Row = WithAnnotations[DistributedLock, _Live]

logger = logging.getLogger("distlock")

AT_ONCE = 100
"""How many locks one confirmation lists at most: more than that nobody reads."""

CHOSEN = "chosen"

HOLDER = ("thread", "process", "note", "held_since", "lease", "owner")
LAST_HOLDER = gettext_lazy("Of a lock that is not held: the last one.")
TOTALS = ("acquisitions", "losses", "mean_held", "longest_held", "mean_waited", "longest_waited")


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


def _duration_of(field: str, description: Any) -> Any:
    """Return a column that shows a field of microseconds."""

    @admin.display(description=description)
    def column(self: Any, row: Any) -> str:
        return duration(getattr(row, field))

    return column


def _mean(total: int, count: int) -> str:
    return duration(total // count) if count > 0 else NOTHING


@admin.register(DistributedLock)
class DistributedLockAdmin(ReadOnlyAdmin):
    """Shows locks and their holders, and takes a lock from its holder on demand."""

    list_display = ("lock_and_token", "badge", "holder", "held_since", "time_left")
    list_filter = (StateFilter, HeldForFilter)
    ordering = ("name", "slot")
    search_fields = ("name", "host", "pid", "thread", "note")
    search_help_text = gettext_lazy("Name, host, process id, thread or task, or note")
    actions = ("force_release",)
    change_form_template = "distlock/admin/lock.html"
    fieldsets = (
        (None, {"fields": ("lock", "badge", "time_left", "expires", "token")}),
        (gettext_lazy("Holder"), {"fields": HOLDER, "description": LAST_HOLDER}),
        (gettext_lazy("So far"), {"fields": TOTALS}),
    )

    # -- what may be done ------------------------------------------------------------------------

    def has_force_release_permission(self, request: HttpRequest) -> bool:
        """Whoever has the permission of that name."""
        return request.user.has_perm("distlock.force_release")

    def get_queryset(self, request: HttpRequest) -> QuerySet[DistributedLock]:
        """Return the locks of the alias in the settings, each with its state at this request."""
        now = now_of(request)
        rows: QuerySet[DistributedLock] = super().get_queryset(request).filter(NAMED)
        return rows.annotate(state=state_at(now), now=Value(now, output_field=BigIntegerField()))

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """Return what the detail view shows, with a link to the job if the lock is one's."""
        first, *others = super().get_fieldsets(request, obj)
        if obj is None or not obj.name.startswith(PREFIX):
            return [first, *others]
        return [(None, {"fields": (*first[1]["fields"], "job")}), *others]

    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        """Show one lock."""
        more = {"may_force_release": self.has_force_release_permission(request)}
        return super().change_view(request, object_id, form_url, {**(extra_context or {}), **more})

    # -- columns ---------------------------------------------------------------------------------

    @admin.display(description=gettext_lazy("lock and token"), ordering="name")
    def lock_and_token(self, row: Row) -> str:
        """Return the name, and the token in small: it needs no column of its own."""
        return format_html(
            '<div class="distlock-name" title="{0}">{0}</div><div class="distlock-small">{1}</div>',
            self.lock(row),
            row.fencing_token,
        )

    @admin.display(description=gettext_lazy("lock"))
    def lock(self, row: Row) -> str:
        """Return the name, unmistakable also if it has blanks at its ends or cannot be printed."""
        return unmistakable(str(row))

    @admin.display(description=gettext_lazy("state"), ordering="state")
    def badge(self, row: Row) -> str:
        """Return the state as a badge."""
        return badge_of(LockState(row.state), MEANING)

    @admin.display(description=gettext_lazy("holder"), ordering="host")
    def holder(self, row: Row) -> str:
        """Return who holds it, or who held it last, and why."""
        if row.acquired_at is None:
            return NOTHING
        note = format_html('<div class="distlock-note">{}</div>', row.note) if row.note else ""
        return format_html(
            '<div class="distlock-holder{}">{}{}<div class="distlock-small">{}</div>{}</div>',
            "" if row.owner else " distlock-gone",
            "" if row.owner else _("last: "),
            row.thread,
            self.process(row),
            note,
        )

    @admin.display(description=gettext_lazy("process"))
    def process(self, row: Row) -> str:
        """Return the process id and the host."""
        return _("process %(pid)s on %(host)s") % {"pid": str(row.pid), "host": row.host}

    @admin.display(description=gettext_lazy("held since"), ordering="acquired_at")
    def held_since(self, row: Row) -> str:
        """Return for how long the holder has had it, and since when."""
        if not row.owner or row.acquired_at is None:
            return NOTHING
        return format_html(
            '<span class="distlock-line">{}</span><div class="distlock-small" title="{}">{}</div>',
            duration(row.now - microseconds(row.acquired_at)),
            moment(row.acquired_at),
            moment(row.acquired_at, zone=False),
        )

    @admin.display(description=gettext_lazy("time left"), ordering="expires_at")
    def time_left(self, row: Row) -> str:
        """Return how long the lease still lasts, or how long it has been over."""
        left = microseconds(row.expires_at) - row.now
        if row.state == LockState.FREE:
            return NOTHING
        line = format_html('<span class="distlock-line">{}</span>', duration(abs(left)))
        return line if left > 0 else format_html("{} {}", _("over for"), line)

    @admin.display(description=gettext_lazy("token"))
    def token(self, row: Row) -> str:
        """Return the fencing token, its digits not grouped."""
        return str(row.fencing_token)

    # -- the detail view -------------------------------------------------------------------------

    @admin.display(description=gettext_lazy("job"))
    def job(self, row: Row) -> str:
        """Return a link to the job that the lock is for, once there is a row of it."""
        jobs = Job._default_manager.using(settings().USING)
        return link_to(jobs.filter(key=row.name.removeprefix(PREFIX)).first())

    @admin.display(description=gettext_lazy("lease ends"))
    def expires(self, row: Row) -> str:
        """Return when the lease ends or ended."""
        return moment(row.expires_at)

    @admin.display(description=gettext_lazy("mean time held"))
    def mean_held(self, row: Row) -> str:
        """Return the mean over what was released: not over what was lost, or goes on."""
        return _mean(row.total_hold, row.acquisitions - row.losses - (row.owner != ""))

    @admin.display(description=gettext_lazy("mean wait"))
    def mean_waited(self, row: Row) -> str:
        """Return the mean over all grants."""
        return _mean(row.total_wait, row.acquisitions)

    @admin.display(description=gettext_lazy("ttl"))
    def lease(self, row: Row) -> str:
        """Return the holder's ttl; a release puts something else there."""
        return duration(row.ttl) if row.owner else NOTHING

    longest_held = _duration_of("longest_hold", gettext_lazy("longest time held"))
    longest_waited = _duration_of("longest_wait", gettext_lazy("longest wait"))

    # -- force-release ---------------------------------------------------------------------------

    @admin.action(
        permissions=["force_release"],
        description=gettext_lazy("Force-release the selected locks"),
    )
    def force_release(self, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        """Ask first; then take each lock from the holder that was shown, and from no other."""
        if CHOSEN in request.POST:
            # All are read before the first is taken.
            for chosen in list(map(_chosen, request.POST.getlist(CHOSEN))):
                self._take(request, *chosen)
            return None
        rows: list[Row] = list(queryset[: AT_ONCE + 1])
        held = [row for row in rows if row.state in (LockState.HELD, LockState.KEPT)]
        if len(rows) > AT_ONCE:
            text = _("Select at most %s locks at a time.") % AT_ONCE
        elif not held:
            text = _("None of the selected locks is held: there is nothing to release.")
        else:
            return self._confirmation(request, held, len(rows) - len(held))
        self.message_user(request, text, messages.WARNING)
        return None

    def _confirmation(self, request: HttpRequest, held: list[Row], others: int) -> HttpResponse:
        columns = ("lock", "holder", "held_since", "time_left", "token")
        locks = [
            {
                "pk": row.pk,
                # JSON, because a browser changes the line breaks in what it posts.
                "chosen": json.dumps([row.name, row.slot, row.fencing_token]),
                "cells": [getattr(self, column)(row) for column in columns],
            }
            for row in held
        ]
        context = {
            **self.admin_site.each_context(request),
            "title": _("Take these locks from their holders?"),
            "opts": self.opts,
            "headers": [getattr(self, column).short_description for column in columns],
            "locks": locks,
            "others": others,
            "checkbox": ACTION_CHECKBOX_NAME,
        }
        return TemplateResponse(request, "distlock/admin/force_release.html", context)

    def _take(self, request: HttpRequest, name: str, slot: int, token: int) -> None:
        """Take one lock; see Note [Forced release and transactions]."""
        alias = settings().USING
        connection = connections[alias]
        backend = backend_for(connection)
        try:
            with transaction.atomic(using=alias):
                row = self.model._default_manager.using(alias).filter(name=name, slot=slot).first()
                if row and backend.force_release(connection, name, slot, token) is not None:
                    who = f"{row.thread} of process {row.pid} on {row.host}"
                    self.log_change(request, row, f"Force-released: token {token}, {who}.")
                    told = partial(self._tell, request, name, token, who, held=bool(row.owner))
                    transaction.on_commit(told, using=alias, robust=True)
                    return
            text = _("The lock %(name)r was left alone: its holder has changed or is done.")
        except DatabaseError as error:
            if not backend.is_contention(error):
                raise
            text = _("The lock %(name)r was left alone: it is in use by a running transaction.")
        self.message_user(request, text % {"name": name}, messages.ERROR)

    def _tell(self, request: HttpRequest, name: str, token: int, who: str, *, held: bool) -> None:
        by = request.user.get_username()
        logger.warning("lock_force_released name=%r token=%s by=%r holder=%r", name, token, by, who)
        text = _("The lock %(name)r was taken from %(who)s.")
        if not held:
            text = _("The lock %(name)r is free: min_hold kept it after %(who)s.")
        self.message_user(request, text % {"name": name, "who": who}, messages.SUCCESS)


def _chosen(value: str) -> tuple[str, int, int]:
    """Return name, slot and token of a lock that was confirmed."""
    try:
        name, slot, token = json.loads(value)
        if not all(type(number) is int and 0 <= number < 2**63 for number in (slot, token)):
            raise ValueError(value)
        return checked_name(name), slot, token
    except (TypeError, ValueError) as error:
        raise BadRequest(f"Not the name, slot and token of a lock: {value!r}.") from error
