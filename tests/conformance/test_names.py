"""Names are compared exactly, on every database and collation."""

from __future__ import annotations

import pytest
from django.db import connection

from distlock.backends.base import Backend
from distlock.models import DistributedLock
from tests.conformance.rows import TABLE, expire, purge, query, take

ALIKE = [
    "report",
    "Report",
    "REPORT",
    "report ",
    "report  ",
    " report",
    "report\t",
    "report\n",
    "r\u00e9port",
    "re\u0301port",  # the accent as a character of its own
    "\uff52eport",  # full width
    "report\u200b",  # zero width
    "report\u00ad",
    "stra\u00dfe",
    "strasse",
    "STRASSE",
    "\u0131",
    "i",
    "I",
    "\u0130",
    "\U0001f511",
    "\U0001f512",
    "\U0001f511 ",
    " ",
    "  ",
    "0",
    "00",
    "1e0",
    "%s",
    "%(name)s",
    "100%",
    "it's",
    'a "quoted" name',
    "back\\slash",
    "null",
    "a;DROP TABLE x--",
    "{braces}",
]


def test_names_that_look_alike_are_different_locks(backend: Backend, mode: str) -> None:
    held = {name: take(backend, f"owner {at}", name) for at, name in enumerate(ALIKE)}
    assert len(query(f"SELECT id FROM {TABLE}")) == len(ALIKE) == len(set(ALIKE))
    for at, name in enumerate(ALIKE):
        holder = backend.holder(connection, name, 0)
        assert holder is not None
        assert (holder.name, holder.owner) == (name, f"owner {at}")
    assert backend.renew(connection, list(held.values())).keys() == {
        lease.owner for lease in held.values()
    }
    for name, lease in held.items():
        assert backend.guard(connection, lease), name
        assert backend.release(connection, lease, alone=mode == "autocommit"), name
        assert backend.holder(connection, name, 0) is None


def test_the_orm_compares_names_exactly(backend: Backend, mode: str) -> None:
    for name in ALIKE:
        take(backend, "me", name)
    for name in ALIKE:
        assert [row.name for row in DistributedLock.objects.filter(name=name)] == [name]
    assert len(DistributedLock.objects.filter(name__in=ALIKE[:3])) == 3


@pytest.mark.parametrize("character", ["x", "\u00e9", "\u20ac", "\U0001f511"])
def test_a_name_may_have_255_characters_of_any_kind(
    backend: Backend, mode: str, character: str
) -> None:
    longest = character * 255
    take(backend, "me", longest, note=longest, thread=longest)
    take(backend, "you", character * 254)
    holder = backend.holder(connection, longest, 0)
    assert holder is not None
    assert (holder.name, holder.note, holder.thread) == (longest, longest, longest)


def test_a_purge_tells_blanks_from_the_reserved_name(backend: Backend, mode: str) -> None:
    for name in (" ", "  ", "\t"):
        take(backend, "me", name)
        expire(name)
    assert purge(backend) == 3
