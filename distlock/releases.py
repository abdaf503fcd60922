"""Taking a lock from whoever holds it, once: for the admin and for `manage.py release_lock`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from django.db import connections, transaction

from .backends import backend_for
from .backends.base import Holder
from .events import log


def take(
    alias: str,
    name: str,
    slot: int,
    token: int,
    owner: str,
    *,
    by: str,
    audit: Callable[[Holder], object] | None = None,
) -> int | None:
    """Take a lock from the holder that has this token and owner, and raise the token: it is fenced.

    `owner` is "" if nobody has the lock and only `min_hold` keeps it, under the last holder's
    token. Return the new token, or `None` if the holder has changed or is done: then nothing
    happens.
    `audit` is called in the same transaction, so that both happen or neither does; the log says so
    when that has committed. Raises `DatabaseError`; if a running transaction has the row locked,
    that is contention.
    """
    connection = connections[alias]
    backend = backend_for(connection)
    holder = backend.holder(connection, name, slot)  # before: a token has one holder, ever
    if holder is None or (holder.token, holder.owner) != (token, owner):
        return None
    with transaction.atomic(using=alias):
        raised = backend.force_release(connection, name, slot, token, owner=owner)
        if raised is None:
            return None
        if audit is not None:
            audit(holder)
        transaction.on_commit(partial(_note, holder, by), using=alias, robust=True)
    return raised


def described(holder: Holder) -> str:
    """Return who it is, or, if only `min_hold` keeps the lock, who it was."""
    note = f", {holder.note}" if holder.note else ""
    return f"{holder.thread} of process {holder.pid} on {holder.host}{note}"


def _note(holder: Holder, by: str) -> None:
    log(
        logging.WARNING,
        "lock_force_released name=%r token=%s by=%r holder=%r",
        lock=holder.name,
        token=holder.token,
        by=by,
        holder=described(holder),
    )
