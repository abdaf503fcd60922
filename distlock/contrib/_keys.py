"""Keys: locks that belong to a message, from the process that publishes it to the one that ends it.

For the packages that lock when they queue. A key is the row of a lock like any other, and shows in
the admin; but it is no lease of a process, so nobody renews it, and it ends with its expiry.
"""

from __future__ import annotations

from typing import Any

from django.db.models import Q

from ..arguments import checked_alias, checked_name, checked_note, known_alias
from ..backends import backend_for
from ..backends.base import Claim, Holder
from ..conf import settings
from ..deadlines import Seconds, seconds
from ..places import Bare, place
from ._canonical import fitting

DAY = 24 * 3600.0
"""The expiry of a key that was not given one: none is there for ever."""


class Keys:
    """The keys in one database; see `place` for which connection that uses."""

    def __init__(self, using: str | None) -> None:
        self.alias = checked_alias(using) or known_alias(settings().USING)

    def take(self, key: str, owner: str, expiry: Seconds | None, note: str) -> bool:
        """Let `owner` have a key, if it is free or his already; whether it is his now."""
        ttl = seconds(DAY if expiry is None else expiry, "expiry", positive=True)
        claim = Claim(
            checked_name(fitting(key)), 0, owner, int(ttl * 1_000_000), note=checked_note(note)
        )
        return place(self.alias).grant(claim, 0.0) is not None

    def give_back(self, key: str, owner: str) -> bool:
        """Free a key if it is the owner's; `False` if it is not any more."""
        where = place(self.alias)
        backend = backend_for(where.connection)
        held = Bare(fitting(key), 0, owner, token=0, expires_us=0, min_hold_us=0)
        return where.run(lambda connection: backend.release(connection, held, alone=not where.own))

    def force(self, key: str) -> None:
        """Take a key from whoever has it. Raises `Pinned` if a transaction has its row locked."""
        if holder := self.holder(key):
            where = place(self.alias)
            backend, name, token = backend_for(where.connection), holder.name, holder.token
            where.run(lambda connection: backend.force_release(connection, name, 0, token))

    def holder(self, key: str) -> Holder | None:
        """Return who has a key."""
        where, name = place(self.alias), fitting(key)
        backend = backend_for(where.connection)
        holder = where.run(lambda connection: backend.holder(connection, name, 0))
        return holder if holder and holder.owner else None

    def left(self, key: str) -> float:
        """Return the seconds until a key expires; 0 if it is free."""
        where, at = place(self.alias), (fitting(key), 0)
        backend = backend_for(where.connection)
        rows = where.run(lambda connection: backend.look(connection, [at], mark=False))
        return rows[at].time_left / 1_000_000 if at in rows else 0.0

    def beginning_with(self, prefix: str) -> list[str]:
        """Return the keys that somebody has."""
        from ..models import NAMED, DistributedLock  # those who import us may do so before Django

        rows: Any = DistributedLock.objects.using(self.alias)
        rows = rows.filter(NAMED, ~Q(owner=""), name__startswith=prefix)
        # SQLite's LIKE does not tell cases apart.
        return [name for name in rows.values_list("name", flat=True) if name.startswith(prefix)]
