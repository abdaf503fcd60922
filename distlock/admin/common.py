"""What the pages of the admin have in common.

State and times are those of one moment on the database's clock, read once per request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.db import connections
from django.db.models import Model, QuerySet, TextChoices
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html

from ..backends import backend_for
from ..conf import settings

if TYPE_CHECKING:
    ModelAdmin = admin.ModelAdmin[Any]
else:
    ModelAdmin = admin.ModelAdmin

NOTHING = "\N{EN DASH}"


class ReadOnlyAdmin(ModelAdmin):
    """Rows that people look at and only the library writes, on the alias of the settings."""

    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER  # each count would read the table
    change_list_template = "distlock/admin/locks.html"

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Nobody: an acquisition or a job makes the row."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody: the row is its holder's."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody: `purge_locks` deletes, and keeps the tokens growing."""
        return False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Return the rows of the alias in the settings."""
        return super().get_queryset(request).using(settings().USING)


def now_of(request: HttpRequest) -> int:
    """Return the database's clock, read once for this request."""
    if "distlock.now" not in request.META:
        connection = connections[settings().USING]
        request.META["distlock.now"] = backend_for(connection).clock(connection)
    now: int = request.META["distlock.now"]
    return now


def unmistakable(name: str) -> str:
    """Return a name so that it is seen if it has blanks at its ends or cannot be printed."""
    return name if name.isprintable() and name.split() == name.split(" ") else repr(name)


def badge_of(state: TextChoices, meaning: Mapping[Any, Any]) -> str:
    """Return a state as a badge."""
    return format_html(
        '<span class="distlock-badge {}" title="{}">{}</span>',
        state.value,
        meaning[state],
        state.label,
    )


def link_to(row: Model | None) -> str:
    """Return a link to the page of a row, if there is one."""
    if row is None:
        return NOTHING
    view = f"admin:{row._meta.app_label}_{row._meta.model_name}_change"
    return format_html('<a href="{}">{}</a>', reverse(view, args=[row.pk]), unmistakable(str(row)))
