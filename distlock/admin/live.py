"""What `admin.js` asks for every few seconds: the rows that are on the page, and no others.

One query by primary key, and one, by its index, for who waits in line. Who may not see the page
sees nothing here either, and what comes back is what the page itself would show, escaped as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.contrib.admin.utils import flatten_fieldsets
from django.core.exceptions import BadRequest, PermissionDenied
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path, reverse
from django.utils.html import conditional_escape
from django.views.decorators.cache import never_cache

from .common import ReadOnlyAdmin, now_of

EVERY = 5
"""Seconds between two questions of one page."""
AT_MOST = 200


class Live(ReadOnlyAdmin):
    """The view, and what the pages need to know of it."""

    live_in_list: Sequence[str]
    live_in_detail: Sequence[str]

    def get_urls(self) -> Any:
        """Return the addresses, with the live view before that of one row."""
        view = never_cache(self.admin_site.admin_view(self.live_view))
        return [path("live/", view, name=self._live_name), *super().get_urls()]

    @property
    def _live_name(self) -> str:
        return f"{self.opts.app_label}_{self.opts.model_name}_live"

    def live_context(self, request: HttpRequest) -> dict[str, Any]:
        """Return what a page tells the script."""
        address = reverse(f"admin:{self._live_name}", current_app=self.admin_site.name)
        return {"live": {"url": address, "now": str(now_of(request)), "every": str(EVERY)}}

    def live_view(self, request: HttpRequest) -> HttpResponse:
        """Return the columns that change, and the database's clock."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        rows = list(self.get_queryset(request).filter(pk__in=_keys(request)))
        self.complete(request, rows)
        said = {
            str(row.pk): {
                "token": str(row.fencing_token),
                "cells": {
                    column: conditional_escape(self.column(column, row))
                    for column in self._live_columns(request, row)
                },
            }
            for row in rows
        }
        return JsonResponse({"now": now_of(request), "rows": said})

    def _live_columns(self, request: HttpRequest, row: Any) -> list[str]:
        """Return the columns that change, of those that the page shows."""
        if "detail" in request.GET:
            shown = flatten_fieldsets(self.get_fieldsets(request, row))
            return [column for column in self.live_in_detail if column in shown]
        listed = self.get_list_display(request)
        return [column for column in self.live_in_list if column in listed]


def _keys(request: HttpRequest) -> list[int]:
    given = request.GET.getlist("pk")
    if len(given) > AT_MOST or not all(key.isdecimal() and len(key) < 19 for key in given):
        raise BadRequest(f"Not up to {AT_MOST} primary keys.")
    return [int(key) for key in given]
