"""PostgreSQL: what gives a row away, takes it away or raises its token locks it FOR UPDATE.

A guard holds FOR KEY SHARE, which stops that lock and none of the weaker ones. The lease has ended
here, so that nothing but the row lock stands in the way.
"""

from __future__ import annotations

import pytest
from django.db import connection

from distlock.backends.base import Backend, Pinned, Unlock
from tests.conformance.rows import claim, expire, pinned, purge, stored, take, within

pytestmark = pytest.mark.vendor("postgresql")

native = pytest.mark.backends("PostgreSQL")
GUARD = "FOR KEY SHARE"


@pytest.mark.parametrize("durable", [True, False])
def test_a_grant_to_another_owner_is_stopped(backend: Backend, durable: bool) -> None:
    take(backend)
    expire()
    before = stored()
    with pinned(lock=GUARD), within(0.5):
        assert backend.grant(connection, claim("you", durable=durable), 0) is None
    assert stored() == before
    take(backend, "you")


def test_a_grant_that_finds_itself_is_stopped(backend: Backend) -> None:
    take(backend)
    before = stored()
    with pinned(lock=GUARD), within(0.5):
        assert backend.grant(connection, claim(), 0) is None
    assert stored() == before


def test_a_grant_of_a_released_lock_is_stopped(backend: Backend) -> None:
    held = take(backend)
    assert backend.release(connection, held, alone=True)
    with pinned(lock=GUARD), within(0.5):
        assert backend.grant(connection, claim("you"), 0) is None


def test_force_is_stopped(backend: Backend) -> None:
    held = take(backend)
    before = stored()
    with pinned(lock=GUARD), within(0.5), pytest.raises(Pinned):
        backend.force_release(connection, "n", 0, held.token)
    assert stored() == before


def test_a_purge_is_stopped(backend: Backend) -> None:
    take(backend)
    expire()
    before = stored()
    with pinned(lock=GUARD), within(0.5):
        assert purge(backend) == 0
    assert stored() == before
    assert stored("") is None
    assert purge(backend) == 1


def test_freeing_after_a_broken_transaction_is_stopped(backend: Backend) -> None:
    held = take(backend)
    before = stored()
    with pinned(lock=GUARD), within(0.5):
        assert backend.free(connection, held) is Unlock.PINNED
    assert stored() == before


@native
def test_a_renewal_goes_through(backend: Backend) -> None:
    held = take(backend)
    with pinned(lock=GUARD), within(0.5):
        expires = backend.renew(connection, [held])["me"]
    assert expires == stored().expires_at > held.expires_us


@native
def test_the_holders_own_release_goes_through(backend: Backend) -> None:
    """Nobody else can be granted the row before the guard is gone."""
    held = take(backend)
    with pinned(lock=GUARD), within(0.5):
        assert backend.release(connection, held, alone=True)
        assert backend.grant(connection, claim("you"), 0) is None
    take(backend, "you")
