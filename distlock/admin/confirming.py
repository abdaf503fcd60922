"""Asking before something is done: to the rows that are shown then, and only as they are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.core.exceptions import BadRequest
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.translation import gettext_lazy

AT_ONCE = 100
"""How many rows one confirmation lists at most: more than that nobody reads."""
TOO_MANY = gettext_lazy("Select at most %s at a time.")

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

    Raises `BadRequest` unless each is a list of so many texts and numbers.
    """
    if CHOSEN not in request.POST:
        return None
    return [_parsed(value, length) for value in request.POST.getlist(CHOSEN)]


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
