"""The action that takes locks from their holders.

# Note [Forced release and transactions]
The release and its audit entry are one transaction: both happen, or neither does. With
ATOMIC_REQUESTS that is the request's, and the lock is free when the request commits; until then
its row is locked, which others see as busy. So what says that it happened, the log line and the
message to the user, is sent on commit. An audit log on another database than the locks cannot be
part of it: there the entry is written first, and a COMMIT that then fails leaves one too many. With
ATOMIC_REQUESTS on that database alone, a request that fails later takes the entry back, and the
line in the log remains: so what the database says of one lock is told to the user, and the others
and their entries stand.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.admin.models import LogEntry
from django.core.exceptions import BadRequest
from django.db import DatabaseError, connections, router, transaction
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from ..arguments import checked_name
from ..backends import backend_for
from ..backends.base import Holder
from ..conf import settings
from ..events import log
from ..releases import described, take
from .columns import TAKEN
from .common import ReadOnlyAdmin, apart
from .confirming import Question, ask, confirmed, selected

if TYPE_CHECKING:
    from .columns import Row

Seen = tuple[str, int, int, str]
"""Name, slot, token and owner, which must still be so when it is confirmed."""

QUESTION = Question(
    action="force_release",
    title=gettext_lazy("Take these locks from their holders?"),
    text=gettext_lazy(
        "The holder is not stopped. It is told that it lost the lock at its next renewal, check or "
        "commit; whoever waits is let in at once, with a greater token. Do this if the holder is "
        "dead or does not come to an end."
    ),
    button=gettext_lazy("Yes, force-release"),
    columns=("lock", "holder", "held_since", "time_left", "token"),
)


class Releasing(ReadOnlyAdmin):
    """The action `force_release`."""

    def has_force_release_permission(self, request: HttpRequest) -> bool:
        """Whoever has the permission of that name."""
        return request.user.has_perm("distlock.force_release")

    def detail_context(self, request: HttpRequest, row: Any) -> dict[str, Any]:
        """Return the button of the detail view."""
        if row.state not in TAKEN or not self.has_force_release_permission(request):
            return {}
        return {"buttons": [("force_release", _("Force-release…"))]}

    @admin.action(
        permissions=["force_release"],
        description=gettext_lazy("Force-release the selected locks"),
    )
    def force_release(self, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        """Ask first; then take each lock from the holder that was shown, and from no other."""
        chosen = confirmed(request, 4)
        if chosen is not None:
            # All are read before the first is taken.
            for seen in list(map(_checked, chosen)):
                self._take_or_tell(request, seen)
            return None
        rows: list[Row] | None = selected(self, request, queryset)
        if rows is None:
            return None
        held = [row for row in rows if row.state in TAKEN]
        if not held:
            text = _("None of the selected locks is held: there is nothing to release.")
            self.message_user(request, text, messages.WARNING)
            return None
        shown = [(row, [row.name, row.slot, row.fencing_token, row.owner]) for row in held]
        return ask(self, request, QUESTION, shown, _left_out(len(rows) - len(held)))

    def _take_or_tell(self, request: HttpRequest, seen: Seen) -> None:
        """Take one lock, or tell why not; see Note [Forced release and transactions]."""
        alias, said = settings().USING, {"name": seen[0], "error": ""}
        try:
            with apart(alias):
                if self._take(request, alias, *seen):
                    return
            text = _("The lock %(name)r was left alone: its holder has changed or is done.")
        except DatabaseError as error:
            said["error"] = str(error)
            if backend_for(connections[alias]).is_contention(error):
                text = _("The lock %(name)r was left alone: it is in use by a running transaction.")
            else:
                log(logging.ERROR, "lock_not_released name=%r", lock=seen[0], exc_info=True)
                text = _("The lock %(name)r could not be taken. The database says: %(error)s")
        self.message_user(request, text % said, messages.ERROR)

    def _take(
        self, request: HttpRequest, alias: str, name: str, slot: int, token: int, owner: str
    ) -> bool:
        row = self.get_queryset(request).filter(name=name, slot=slot).first()

        def audit(holder: Holder) -> None:
            with apart(router.db_for_write(LogEntry)):
                message = f"Force-released: token {token}, {described(holder)}."
                self.log_change(request, row, message)
            transaction.on_commit(partial(self._tell, request, holder), using=alias, robust=True)

        by = request.user.get_username()
        if row is None:
            return False
        return take(alias, name, slot, token, owner, by=by, audit=audit) is not None

    def _tell(self, request: HttpRequest, holder: Holder) -> None:
        text = _("The lock %(name)r was taken from %(who)s.")
        if not holder.owner:
            text = _("The lock %(name)r is free: min_hold kept it after %(who)s.")
        said = text % {"name": holder.name, "who": described(holder)}
        self.message_user(request, said, messages.SUCCESS)


def _left_out(count: int) -> str:
    if not count:
        return ""
    text = ngettext(
        "%d more selected lock is not held and is left out.",
        "%d more selected locks are not held and are left out.",
        count,
    )
    return text % count


def _checked(chosen: list[Any]) -> Seen:
    """Return name, slot, token and owner of a lock that was confirmed. Raises `BadRequest`."""
    name, slot, token, owner = chosen
    try:
        if isinstance(slot, str) or isinstance(token, str) or not isinstance(owner, str):
            raise TypeError(chosen)
        return checked_name(name), slot, token, owner and checked_name(owner)
    except (TypeError, ValueError) as error:
        raise BadRequest(f"Not name, slot, token and owner of a lock: {chosen!r}.") from error
