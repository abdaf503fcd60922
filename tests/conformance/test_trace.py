"""`trace`: how a transaction ended in which a release was written."""

from __future__ import annotations

import pytest
from django.db import connection
from django.db.backends.base.base import BaseDatabaseWrapper

from distlock.backends.base import Backend, Trace
from tests.conformance.rows import clear, expire, pinned, take, transaction, within

servers = pytest.mark.vendor("postgresql", "mysql")


def test_a_committed_release_is_found(backend: Backend) -> None:
    held = take(backend)
    assert backend.release(connection, held, alone=False)
    assert backend.trace(connection, held) is Trace.RELEASED


def test_one_that_was_rolled_back_leaves_the_owner(backend: Backend) -> None:
    held = take(backend)
    expire()
    assert backend.trace(connection, held) is Trace.HELD


def test_a_row_granted_since_cannot_tell(backend: Backend) -> None:
    held = take(backend)
    expire()
    take(backend, "you")
    assert backend.trace(connection, held) is Trace.GONE


def test_a_later_holders_release_is_not_ones_own(backend: Backend) -> None:
    held = take(backend)
    expire()
    later = take(backend, "you")
    assert backend.release(connection, later, alone=False)
    assert backend.trace(connection, held) is Trace.GONE


def test_a_purged_row_cannot_tell(backend: Backend) -> None:
    held = take(backend)
    clear()
    assert backend.trace(connection, held) is Trace.GONE


@servers
@pytest.mark.parametrize("commits", [False, True])
def test_an_open_transaction_is_not_waited_for(
    backend: Backend, other: BaseDatabaseWrapper, commits: bool
) -> None:
    held = take(backend)
    with transaction(other):
        assert backend.release(other, held, alone=False)
        with within(0.5):
            assert backend.trace(connection, held) is Trace.PINNED
        if commits:
            other.commit()
    assert backend.trace(connection, held) is (Trace.RELEASED if commits else Trace.HELD)


@servers
def test_any_pin_leaves_it_open(backend: Backend) -> None:
    held = take(backend)
    with pinned(), within(0.5):
        assert backend.trace(connection, held) is Trace.PINNED
