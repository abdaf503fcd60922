from __future__ import annotations

import os
import socket

import pytest
from django.db import connection
from django.db.backends.base.base import BaseDatabaseWrapper

from distlock.backends.base import Backend, Holder
from tests.conformance.rows import (
    MINUTE,
    SECOND,
    expire,
    microseconds,
    pinned,
    stored,
    take,
    within,
    write,
)

pytestmark = pytest.mark.usetz


def test_the_holder_is_who_was_granted_the_lock(backend: Backend, mode: str) -> None:
    held = take(backend, note="why", thread="task 7")
    holder = backend.holder(connection, "n", 0)
    assert holder is not None
    row = stored()
    assert holder == Holder(
        name="n",
        owner="me",
        token=held.token,
        acquired_at=holder.acquired_at,
        expires_at=holder.expires_at,
        host=socket.gethostname()[:255],
        pid=os.getpid(),
        thread="task 7",
        note="why",
    )
    assert microseconds(holder.acquired_at) == row.acquired_at
    assert microseconds(holder.expires_at) == row.expires_at
    assert str(holder) == f"task 7 of process {os.getpid()} on {socket.gethostname()[:255]}, why"


def test_nobody_holds_what_is_free(backend: Backend, mode: str) -> None:
    assert backend.holder(connection, "n", 0) is None
    held = take(backend)
    expire()
    assert backend.holder(connection, "n", 0) is None
    held = take(backend)
    backend.release(connection, held, alone=mode == "autocommit")
    assert backend.holder(connection, "n", 0) is None


def test_another_name_or_slot_has_another_holder(backend: Backend, mode: str) -> None:
    take(backend)
    assert backend.holder(connection, "m", 0) is None
    assert backend.holder(connection, "n", 1) is None
    take(backend, "you", "n", slot=1)
    found = backend.holder(connection, "n", 1)
    assert found is not None
    assert found.owner == "you"


def test_min_hold_keeps_a_lock_that_nobody_holds(backend: Backend, mode: str) -> None:
    held = take(backend, min_hold=MINUTE)
    backend.release(connection, held, alone=mode == "autocommit")
    holder = backend.holder(connection, "n", 0)
    assert holder is not None
    assert holder.owner == ""
    assert str(holder).startswith("nobody")


def test_a_row_without_a_moment_of_acquisition_has_a_holder(backend: Backend) -> None:
    write(owner="by hand", expires_at=MINUTE)
    holder = backend.holder(connection, "n", 0)
    assert holder is not None
    assert microseconds(holder.acquired_at) == 0


def test_a_lease_that_ends_at_this_very_moment_has_no_holder(backend: Backend) -> None:
    take(backend)
    write(expires_at=0)
    assert backend.holder(connection, "n", 0) is None


def test_an_acquisition_that_is_not_committed_is_not_shown(
    backend: Backend, other: BaseDatabaseWrapper
) -> None:
    other.set_autocommit(False)
    take(backend, on=other)
    assert backend.holder(connection, "n", 0) is None
    other.rollback()


@pytest.mark.vendor("postgresql", "mysql")
def test_who_holds_a_pinned_row_is_known_at_once(backend: Backend) -> None:
    take(backend, ttl=10 * SECOND)
    with pinned(), within(0.5):
        assert backend.holder(connection, "n", 0) is not None
