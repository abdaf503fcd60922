"""What the pages say of a lock: each column once, for the list, the detail view and the live view.

What changes with the time bears the moment that it counts from or to, in microseconds since 1970 on
the database's clock: `admin.js` counts on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

from django.contrib import admin
from django.utils.html import format_html
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from ..listing import stats_in
from ..models import DistributedLock
from ..states import MEANING, LockState, duration, microseconds, moment
from .common import NOTHING, badge_of, bar, labelled, unmistakable

if TYPE_CHECKING:
    from django_stubs_ext import WithAnnotations

    class _Live(TypedDict):
        state: str
        now: int
        queued: int
        knows_waiters: bool

    Row = WithAnnotations[DistributedLock, _Live]

TAKEN = (LockState.HELD, LockState.KEPT)
ROUNDED = 10_000
"""Microseconds by which two moments that were written as one may differ."""
ROUND = 100_000
"""Microseconds of which a `min_hold` is taken to be a multiple."""


class LockColumns:
    """The columns of a lock, whose row has its `state` at the moment `now`."""

    @admin.display(description=gettext_lazy("lock and token"), ordering="name")
    def lock_and_token(self, row: Row) -> str:
        """Return the name, and the token in small: it needs no column of its own."""
        return format_html(
            '<div class="distlock-name" title="{0}" data-distlock-pk="{2}">{0}</div>'
            '<div class="distlock-small distlock-token">{1}</div>',
            self.lock(row),
            row.fencing_token,
            str(row.pk),
        )

    @admin.display(description=gettext_lazy("lock"))
    def lock(self, row: Row) -> str:
        """Return the name, unmistakable also if it has blanks at its ends or cannot be printed."""
        return unmistakable(str(row))

    @admin.display(description=gettext_lazy("token"))
    def token(self, row: Row) -> str:
        """Return the fencing token, its digits not grouped."""
        return str(row.fencing_token)

    # -- state -----------------------------------------------------------------------------------

    @admin.display(description=gettext_lazy("state"), ordering="state")
    def badge(self, row: Row) -> str:
        """Return the state as a badge, and whether somebody waits, if so."""
        waits = self.waiting(row) if _waiters(row) else ""
        return format_html('{}<div class="distlock-waits">{}</div>', self.state_shown(row), waits)

    @admin.display(description=gettext_lazy("state"))
    def state_shown(self, row: Row) -> str:
        """Return the state alone, where `waiting` stands beside it."""
        return badge_of(LockState(row.state), MEANING)

    @admin.display(description=gettext_lazy("waiting"))
    def waiting(self, row: Row) -> str:
        """Return whether somebody waits, as far as the database knows."""
        if row.queued:
            return ngettext("%d waits in line", "%d wait in line", row.queued) % row.queued
        if row.state not in TAKEN:
            return NOTHING
        if not row.knows_waiters:
            return _("not known: this database notes only those who wait in line (fair=True)")
        return _("somebody waits") if _waiters(row) else _("nobody")

    # -- the holder ------------------------------------------------------------------------------

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

    @admin.display(description=gettext_lazy("process id"))
    def process_id(self, row: Row) -> str:
        """Return the process id, its digits not grouped."""
        return str(row.pid) if row.pid else NOTHING

    # -- times -----------------------------------------------------------------------------------

    @admin.display(description=gettext_lazy("held since"), ordering="acquired_at")
    def held_since(self, row: Row) -> str:
        """Return for how long the holder has had it, and since when."""
        if not row.owner or row.acquired_at is None:
            return labelled(gettext_lazy("held since"), NOTHING)
        return labelled(
            gettext_lazy("held since"),
            format_html(
                '{}<div class="distlock-small" title="{}">{}</div>',
                _counting(row, microseconds(row.acquired_at), "since"),
                moment(row.acquired_at),
                moment(row.acquired_at, zone=False),
            ),
        )

    @admin.display(description=gettext_lazy("time left"), ordering="expires_at")
    def time_left(self, row: Row) -> str:
        """Return how long the lease still lasts, or how long it has been over."""
        if row.state == LockState.FREE:
            return labelled(gettext_lazy("time left"), NOTHING)
        ends = microseconds(row.expires_at)
        if ends <= row.now:
            over = format_html("{} {}", _("over for"), _counting(row, ends, "since"))
            return labelled(gettext_lazy("lease"), over)
        whole = max(row.ttl, 1)
        left = format_html(
            '<span data-distlock-whole="{}">{}{}</span>',
            str(whole),
            _counting(row, ends, "until"),
            bar((ends - row.now) / whole),
        )
        return labelled(gettext_lazy("time left"), left)

    @admin.display(description=gettext_lazy("lease ends"))
    def expires(self, row: Row) -> str:
        """Return when the lease ends or ended."""
        return moment(row.expires_at)

    @admin.display(description=gettext_lazy("ttl"))
    def lease(self, row: Row) -> str:
        """Return the holder's ttl; a release puts something else there."""
        return duration(row.ttl) if row.owner else NOTHING

    @admin.display(description=gettext_lazy("last renewed"))
    def renewed(self, row: Row) -> str:
        """Return when the lease was renewed last, which follows from when it ends."""
        at = renewed_at(row)
        return NOTHING if at is None else _counting(row, at, "since", ago=True)

    # -- figures ---------------------------------------------------------------------------------

    @admin.display(description=gettext_lazy("holds"), ordering="acquisitions")
    def holds(self, row: Row) -> str:
        """Return how often it was granted, how long it was held, and how often it was lost."""
        if not row.acquisitions:
            return labelled(gettext_lazy("holds"), NOTHING)
        lost = ""
        if row.losses:
            text = ngettext("%d lost", "%d lost", row.losses) % row.losses
            lost = format_html('<div class="distlock-lost">{}</div>', text)
        count = ngettext("%d grant", "%d grants", row.acquisitions) % row.acquisitions
        cell = _figures(count, self.mean_held(row), duration(row.longest_hold))
        return labelled(gettext_lazy("holds"), format_html("{}{}", cell, lost))

    @admin.display(description=gettext_lazy("waits"), ordering="waits")
    def waits_shown(self, row: Row) -> str:
        """Return which share of the grants waited, and for how long."""
        cell = self.share(row)
        if row.total_wait:
            cell = _figures(cell, self.mean_waited(row), duration(row.longest_wait))
        return labelled(gettext_lazy("waits"), cell)

    @admin.display(description=gettext_lazy("grants that waited"))
    def share(self, row: Row) -> str:
        """Return which share of the grants waited, as a number and as a bar."""
        if not row.acquisitions:
            return NOTHING
        part = stats_in(row).share_waited
        shown = "< 1" if 0 < part < 0.01 else str(int(100 * part))
        text = _("%(share)s %% waited") % {"share": shown}
        return format_html('<span class="distlock-line">{}</span>{}', text, bar(part))

    @admin.display(description=gettext_lazy("mean time held"))
    def mean_held(self, row: Row) -> str:
        """Return the mean over what was released: not over what was lost, or goes on."""
        stats = stats_in(row)
        return _duration(stats.mean_held) if stats.releases else NOTHING

    @admin.display(description=gettext_lazy("longest time held"))
    def longest_held(self, row: Row) -> str:
        """Return the longest time."""
        return duration(row.longest_hold)

    @admin.display(description=gettext_lazy("mean wait"))
    def mean_waited(self, row: Row) -> str:
        """Return the mean over all grants."""
        return _duration(stats_in(row).mean_waited) if row.acquisitions else NOTHING

    @admin.display(description=gettext_lazy("longest wait"))
    def longest_waited(self, row: Row) -> str:
        """Return the longest wait."""
        return duration(row.longest_wait)


def renewed_at(row: Row) -> int | None:
    """Return when a lease that is held was renewed last, if it was and that can be told.

    The first expiry may be that of a `min_hold`, which the row does not keep, and then never was
    renewed what ends a round time after it was acquired. A renewal hits that hardly ever.
    """
    if row.state != LockState.HELD or row.acquired_at is None:
        return None
    begun, ends = microseconds(row.acquired_at), microseconds(row.expires_at)
    at = ends - row.ttl
    told = (ends - begun) % ROUND != 0
    return at if told and begun + ROUNDED < at <= row.now else None


def _waiters(row: Row) -> bool:
    """Whether it is known that somebody waits."""
    wanted = row.state in TAKEN and microseconds(row.wanted_until) > row.now
    return bool(row.queued) or (row.knows_waiters and wanted)


def _counting(row: Row, at: int, direction: str, *, ago: bool = False) -> str:
    """Return the time since a moment, or until it, which goes on."""
    text = duration(abs(row.now - at))
    shown = format_html(
        '<span class="distlock-line" data-distlock-{}="{}">{}</span>', direction, str(at), text
    )
    return format_html(_("{} ago"), shown) if ago else shown


def _figures(first: Any, mean: str, longest: str) -> str:
    small = _("mean %(mean)s, longest %(longest)s") % {"mean": mean, "longest": longest}
    return format_html("{}<div class='distlock-small'>{}</div>", first, small)


def _duration(seconds: float) -> str:
    return duration(round(seconds * 1_000_000))
