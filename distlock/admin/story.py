"""What is known of a lock's story: of its holder, of its last loss, and of who took it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib.admin.models import LogEntry
from django.contrib.admin.options import get_content_type_for_model
from django.utils.html import format_html, format_html_join
from django.utils.translation import gettext as _

from ..backends.base import moment_of
from ..models import DistributedLock
from ..states import LockState, duration, microseconds, moment
from .columns import renewed_at
from .common import NOTHING

if TYPE_CHECKING:
    from datetime import datetime

    from .columns import Row

LATEST = 20
"""Entries of the audit log."""


def story_of(row: Row) -> str:
    """Return the story as a list, the latest first. One query, for the audit log."""
    told = [*_events(row), *_entries(row)]
    if not told:
        return NOTHING
    told.sort(key=lambda event: event[0], reverse=True)
    items = [(duration(row.now - at), moment(when), text) for at, when, text in told if when]
    # A span of its own for the time, so that a narrow page can break the line behind it.
    return format_html(
        '<ol class="distlock-story">{}</ol>',
        format_html_join(
            "",
            '<li><span class="distlock-small">{} <span class="distlock-line">{}</span></span>'
            "<div>{}</div></li>",
            ((when, _("(%s ago)") % ago, text) for ago, when, text in items),
        ),
    )


def _events(row: Row) -> list[tuple[int, Any, str]]:
    """Return what the row itself says."""
    told: list[tuple[int, Any, str]] = []

    def tell(when: datetime | None, text: str) -> None:
        if when is not None and microseconds(when) <= row.now:
            told.append((microseconds(when), when, text))

    who = {"who": row.thread, "pid": str(row.pid), "host": row.host}
    tell(row.acquired_at, _("acquired by %(who)s, process %(pid)s on %(host)s") % who)
    lost = _(
        "a lease was found lost: it had ended, or was taken by force, before its holder was done"
    )
    tell(row.lost_at, lost)
    if row.state == LockState.EXPIRED:
        tell(row.expires_at, _("the lease ended, neither renewed nor released"))
    elif row.state == LockState.FREE and row.acquired_at is not None:
        kept = row.ttl > 0  # a release writes there for how long min_hold keeps it
        over = _("min_hold was over; its holder had released it before") if kept else ""
        tell(row.expires_at, over or _("released, by its holder or by force"))
    renewed = renewed_at(row)
    if renewed is not None:
        told.append((renewed, moment_of(renewed), _("renewed")))
    return told


def _entries(row: Row) -> list[tuple[int, Any, str]]:
    """Return what the audit log of the admin says."""
    about = get_content_type_for_model(DistributedLock)
    entries = LogEntry.objects.filter(object_id=str(row.pk), content_type=about)
    return [
        (
            microseconds(entry.action_time),
            entry.action_time,
            f"{entry.user.get_username()}: {entry.get_change_message()}",
        )
        for entry in entries.select_related("user").order_by("-action_time")[:LATEST]
    ]
