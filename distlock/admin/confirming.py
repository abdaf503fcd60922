"""Asking before something is done: to the rows that are shown then, and only as they are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.contrib import messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.core.exceptions import BadRequest
from django.db import connections
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.translation import gettext_lazy

from ..backends import backend_for
from ..backends.base import Overdue
from .paging import PATIENCE

AT_ONCE = 100
"""How many rows one confirmation lists at most: more than that nobody reads."""
TOO_MANY = gettext_lazy("Select at most %s at a time.")
OVERDUE = gettext_lazy(
    "The database looked for longer than it may, and was stopped. Search for the beginning of a "
    "name, which is quick, or choose fewer filters."
)

CHOSEN = "chosen"


@dataclass(frozen=True)
class Question:
    """What is asked: `action` is what is posted if the answer is yes."""

    action: str
    title: Any
    text: Any
    button: Any
    columns: Sequence[str]
    """What is shown of each row."""


def selected(admin: Any, request: HttpRequest, queryset: QuerySet[Any]) -> list[Any] | None:
    """Return the rows that an action is for, or `None` if they are too many: that is said then.

    All that a filter finds may be selected: the database is stopped as it is for a page.
    """
    connection = connections[queryset.db]
    try:
        with backend_for(connection).patient(connection, PATIENCE):
            rows = list(queryset[: AT_ONCE + 1])
    except Overdue:
        admin.message_user(request, OVERDUE, messages.WARNING)
        return None
    if len(rows) <= AT_ONCE:
        return rows
    admin.message_user(request, TOO_MANY % AT_ONCE, messages.WARNING)
    return None


def ask(
    admin: Any, request: HttpRequest, question: Question, rows: list[tuple[Any, Any]], others: str
) -> HttpResponse:
    """Return the page that asks. Each row comes with what must still be so when it is confirmed."""
    shown = [
        {
            "pk": row.pk,
            # JSON, because a browser changes the line breaks in what it posts.
            "chosen": json.dumps(chosen),
            "cells": [admin.column(column, row) for column in question.columns],
        }
        for row, chosen in rows
    ]
    context = {
        **admin.admin_site.each_context(request),
        "title": question.title,
        "question": question,
        "opts": admin.opts,
        "media": admin.media,
        "headers": admin.headers(question.columns),
        "rows": [
            {**row, "cells": list(zip(admin.headers(question.columns), row["cells"], strict=True))}
            for row in shown
        ],
        "others": others,
        "checkbox": ACTION_CHECKBOX_NAME,
    }
    return TemplateResponse(request, "distlock/admin/confirm.html", context)


def confirmed(request: HttpRequest, length: int) -> list[list[Any]] | None:
    """Return what was confirmed, row by row, or `None` if nobody has been asked yet.

    Raises `BadRequest` unless each is a list of so many texts and numbers, and for more rows than
    one page lists.
    """
    given = request.POST.getlist(CHOSEN)
    if len(given) > AT_ONCE:
        raise BadRequest(f"More than the {AT_ONCE} rows that are asked about at once.")
    return [_parsed(value, length) for value in given] if given else None


def _parsed(value: str, length: int) -> list[Any]:
    try:
        chosen = json.loads(value)
        if not isinstance(chosen, list) or len(chosen) != length or not all(map(_is_plain, chosen)):
            raise ValueError(value)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"Nothing that was asked about: {value!r}.") from error
    return chosen


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is int and 0 <= value < 2**63)
