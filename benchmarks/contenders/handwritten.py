"""A lock as a developer writes it in an afternoon: a row, select_for_update, and a save."""

from __future__ import annotations

import uuid
from datetime import timedelta

from .base import ALONE, CONTENDED, TTL, Contender, DjangoContender, polled

POLL = 0.1


class HandWritten(DjangoContender):
    title = "hand-written (`select_for_update` lease)"
    waits = "polls every 100 ms"
    workloads = (*ALONE, *CONTENDED, "churn")
    table = "benchmarks_lease"

    def acquire(self, name: str) -> str:
        owner = uuid.uuid4().hex
        return self._attempt(name, owner) or polled(lambda: self._attempt(name, owner), POLL)

    def _attempt(self, name: str, owner: str) -> str | None:
        from django.db.transaction import atomic
        from django.utils.timezone import now

        from ..models import Lease

        Lease.objects.get_or_create(name=name)
        with atomic():
            lease = Lease.objects.select_for_update().get(name=name)
            if lease.expires_at and lease.expires_at > now():
                return None
            lease.owner, lease.expires_at = owner, now() + timedelta(seconds=TTL)
            lease.save()
        return owner

    def release(self, name: str, held: str) -> None:
        from django.db.transaction import atomic

        from ..models import Lease

        with atomic():
            lease = Lease.objects.select_for_update().get(name=name)
            if lease.owner != held:
                raise RuntimeError(f"{name} was not held")
            lease.owner, lease.expires_at = "", None
            lease.save()


class HandWrittenOnPostgreSQL(HandWritten):
    key = "pg-handwritten"
    server = "postgresql"


class HandWrittenOnMariaDB(HandWritten):
    key = "mariadb-handwritten"
    server = "mariadb"


CONTENDERS: list[type[Contender]] = [HandWrittenOnPostgreSQL, HandWrittenOnMariaDB]
