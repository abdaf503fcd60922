from __future__ import annotations

import pytest
from django.db import connection

from distlock.backends.base import Backend, Claim

SECOND = 1_000_000


def claim(owner: str = "me", name: str = "n", ttl: int = 60 * SECOND, **more: object) -> Claim:
    return Claim(name=name, slot=0, owner=owner, ttl=ttl, **more)  # type: ignore[arg-type]


def test_a_free_name_is_granted(backend: Backend) -> None:
    before = backend.clock(connection)
    grant = backend.grant(connection, claim(), 0)
    after = backend.clock(connection)
    assert grant is not None
    assert before - 1000 <= grant.acquired_us <= after
    assert grant.expires_us == grant.acquired_us + 60 * SECOND
    assert before - 1000 <= grant.token <= after
