"""The pages of a list that may be a million rows long.

# Note [Pages]
Nothing is counted. In an order for which there is a unique key a page begins behind the last row of
the one before: with that row in the address, each page takes as long as the first, and rows that
come or go meanwhile shift nothing. In any other order, and with anything else in the address that
may be a filter, the database reads the table: then it is stopped after `PATIENCE`, and the page
says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.views.main import PAGE_VAR, ChangeList
from django.core.paginator import Paginator
from django.db import connections
from django.db.models import IntegerField, Q, QuerySet
from django.http import HttpRequest

from ..backends import backend_for
from ..backends.base import Overdue

PATIENCE = 5.0
"""Seconds that the database may look for the rows of a page."""

AFTER, BEFORE = "after", "before"
FARTHEST = 1_000
"""Pages, where one is found by counting rows."""


class KeysetChangeList(ChangeList):
    """A list with links to the next page and the one before; see Note [Pages]."""

    model_admin: Any
    overdue = False
    first_url = previous_url = next_url = ""

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> QuerySet[Any]:
        """Return the rows of all pages. What says where a page begins is no filter."""
        for parameters in (self.params, self.filter_params):
            parameters.pop(AFTER, None)
            parameters.pop(BEFORE, None)
        return super().get_queryset(request, exclude_parameters)

    def get_ordering(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        """Return the order, with the whole of the key if it begins as one."""
        ordering = super().get_ordering(request, queryset)
        first = str(ordering[0])
        sign = "-" if first.startswith("-") else ""
        for key in self.model_admin.keys:
            if first.removeprefix("-") == key[0]:
                return [sign + field for field in key]
        return ordering

    def get_results(self, request: HttpRequest) -> None:
        """Read one page and no more."""
        ordering = [str(field) for field in self.queryset.query.order_by]
        key = tuple(field.removeprefix("-") for field in ordering)
        is_key = key in self.model_admin.keys
        connection = connections[self.queryset.db]
        plain = is_key and not self.get_filters_params()
        backend = backend_for(connection)
        try:
            with nullcontext() if plain else backend.patient(connection, PATIENCE):
                rows = self._by_key(request, key) if is_key else self._by_number()
        except Overdue:
            rows, self.overdue = [], True
            self.previous_url = self.next_url = ""
        self.model_admin.complete(request, rows)
        self.result_list: Any = rows
        self.result_count = self.full_result_count = len(rows)
        self.show_full_result_count = False
        self.show_admin_actions = bool(rows)
        self.can_show_all = self.multi_page = False
        self.paginator = Paginator(rows, self.list_per_page)

    def _by_key(self, request: HttpRequest, key: tuple[str, ...]) -> list[Any]:
        """Return the page behind, or before, the row that the address names."""
        after, before = request.GET.get(AFTER), request.GET.get(BEFORE)
        cursor, backward = before if after is None else after, after is None and before is not None
        rows = self.queryset
        if cursor is not None:
            down = str(rows.query.order_by[0]).startswith("-")
            rows = rows.filter(_beyond(key, self._values(cursor, key), up=backward == down))
        found, more = self._cut(rows.reverse() if backward else rows)
        if backward:
            found.reverse()
        if found and (more if backward else cursor is not None):
            self.previous_url = self.get_query_string({BEFORE: _cursor(found[0], key)})
        if found and (more or backward):
            self.next_url = self.get_query_string({AFTER: _cursor(found[-1], key)})
        if cursor is not None and (self.previous_url or not found):
            self.first_url = self.get_query_string()
        return found

    def _values(self, cursor: str, key: tuple[str, ...]) -> list[Any]:
        """Return what the address says of a row. Raises `IncorrectLookupParameters`."""
        fields = [self.opts.pk if name == "pk" else self.opts.get_field(name) for name in key]
        try:
            values = json.loads(cursor)
            if not all(_fits(*pair) for pair in zip(values, fields, strict=True)):
                raise ValueError(cursor)
        except (TypeError, ValueError, RecursionError):
            raise IncorrectLookupParameters from None
        return list(values)

    def _by_number(self) -> list[Any]:
        """Return the page with the number in the address."""
        number = self.page_num
        if not 1 <= number <= FARTHEST:
            raise IncorrectLookupParameters
        found, more = self._cut(self.queryset[(number - 1) * self.list_per_page :])
        if number > 1:
            self.first_url = self.get_query_string()
            self.previous_url = self.get_query_string({PAGE_VAR: number - 1})
        if more:
            self.next_url = self.get_query_string({PAGE_VAR: number + 1})
        return found

    def _cut(self, rows: QuerySet[Any]) -> tuple[list[Any], bool]:
        """Return as many rows as a page has, and whether there are more."""
        given = self.model_admin.unlisted
        unread = [name for name in given if not {name, f"{name}_shown"} & {*self.list_display}]
        found = list(rows.defer(*unread)[: self.list_per_page + 1])
        return found[: self.list_per_page], len(found) > self.list_per_page


def _beyond(key: Sequence[str], values: Sequence[Any], *, up: bool) -> Q:
    """Return the condition for what comes behind a row: a range of the key, which an OR is not."""
    than, past = ("gt", "lte") if up else ("lt", "gte")
    if len(key) == 1:
        return Q((f"{key[0]}__{than}", values[0]))
    same = Q((key[0], values[0]), (f"{key[1]}__{past}", values[1]))
    return Q((f"{key[0]}__{than}e", values[0])) & ~same


def _cursor(row: Any, key: Sequence[str]) -> str:
    return json.dumps([getattr(row, field) for field in key])


def _fits(value: Any, field: Any) -> bool:
    """Whether a value from an address may be one of a field."""
    if isinstance(field, IntegerField):
        return type(value) is int and 0 <= value < 2**63
    text = isinstance(value, str) and "\0" not in value
    return text and not any("\ud800" <= letter <= "\udfff" for letter in value)
