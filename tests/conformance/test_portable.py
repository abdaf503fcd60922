"""The portable path where a database has less than the three that the suite runs on."""

from __future__ import annotations

import pytest
from django.db import NotSupportedError, connection

from distlock.backends import backend_for
from distlock.backends.base import Backend, Pinned
from distlock.backends.generic import Generic
from tests.conformance.rows import (
    Holding,
    attempt,
    claim,
    expire,
    pinned,
    stored,
    take,
    within,
)


@pytest.mark.vendor("sqlite")
def test_a_database_without_row_locks_is_told_so(table: None) -> None:
    take(backend_for(connection))
    expire()
    with pytest.raises(NotSupportedError, match="FOR UPDATE, which sqlite does not have"):
        Generic().grant(connection, claim("you"), 0)
    assert stored().owner == "me"
    with pytest.raises(NotSupportedError):
        Generic().release(connection, Holding(), alone=True)


@pytest.mark.vendor("postgresql")
@pytest.mark.backends("PortableOnPostgreSQL")
def test_without_skip_locked_a_pinned_row_is_busy_by_nowait(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection.features, "has_select_for_update_skip_locked", False)
    held = take(backend)
    with pinned(), within(0.5):
        assert attempt(backend, connection, claim()) is None
        with pytest.raises(Pinned):
            backend.force_release(connection, "n", 0, held.token)
    assert take(backend).token == held.token
