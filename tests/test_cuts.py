"""Acquire and renew whose connection is cut at any message of the exchange."""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from django.db import DatabaseError, connections, transaction

from distlock import lock
from distlock.backends.base import TABLE
from distlock.keeper import keeper
from tests.cuts import (
    ALIAS,
    LONG,
    SOON,
    Disturbed,
    acquire,
    cold,
    eventually,
    holds,
    own_port,
    sweep,
    warm,
)
from tests.proxy import Proxy
from tests.support import becomes_free, is_free, other_session, row

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "other"]),
    pytest.mark.vendor("postgresql", "mysql"),
]


def row_or_none(name: str) -> dict[str, Any] | None:
    with other_session() as cursor:
        cursor.execute(f"SELECT count(*) FROM {TABLE} WHERE name = %s", [name])
        (count,) = cursor.fetchone()
    return row(name) if count else None


# -- acquire -----------------------------------------------------------------------------------


def test_a_cut_acquire_is_repeated_and_finds_its_own_grant(proxy: Proxy) -> None:
    def scenario(name: str, cut: Disturbed) -> None:
        warm()
        with cut:
            lease = acquire(name)
        holds(lease)
        lease.release()
        assert is_free(name)

    assert len(sweep(proxy, scenario)) >= 4


def test_a_cut_log_in_gives_a_lease_or_an_error_and_never_a_lock_without_an_owner(
    proxy: Proxy,
) -> None:
    def scenario(name: str, cut: Disturbed) -> None:
        cold()
        with cut:
            lease = None
            with suppress(DatabaseError):
                lease = acquire(name)
        if lease is None:
            assert becomes_free(name, SOON)
        else:
            holds(lease)
            lease.release()
            assert is_free(name)

    sweep(proxy, scenario)


@pytest.mark.parametrize("prepare", [warm, cold])
def test_an_acquire_inside_a_transaction_is_cut(proxy: Proxy, prepare: Any) -> None:
    """It is asked for on the private connection; only the caller's own cannot be replaced."""

    def scenario(name: str, cut: Disturbed) -> None:
        prepare()
        lease, own = None, own_port()
        with suppress(DatabaseError), transaction.atomic(using=ALIAS):
            with cut:
                lease = acquire(name)
        if lease is None:
            assert cut.met(own)
            assert row_or_none(name) is None, "it was not asked for yet"
        else:
            holds(lease)
            lease.release()
        assert is_free(name)

    sweep(proxy, scenario)


def test_an_acquire_before_an_outage_raises_and_what_it_was_granted_is_given_back(
    proxy: Proxy,
) -> None:
    def scenario(name: str, cut: Disturbed) -> None:
        warm()
        lease = None
        with cut:
            with suppress(DatabaseError):
                lease = acquire(name)
        proxy.come_up()
        if lease is not None:
            lease.release()
        assert becomes_free(name, SOON)

    sweep(proxy, scenario, down=True)


# -- renew -------------------------------------------------------------------------------------


def expiry(name: str) -> Any:
    return row(name)["expires_at"]


@pytest.mark.parametrize("inside", [False, True])
def test_a_cut_renewal_is_repeated(proxy: Proxy, lost: list[str], inside: bool) -> None:
    """Inside a transaction it goes over the private connection."""

    def scenario(name: str, cut: Disturbed) -> None:
        warm()
        lease = acquire(name)
        first, before = expiry(name), lease.expires_at
        with transaction.atomic(using=ALIAS) if inside else nullcontext(), cut:
            lease.renew()
        assert expiry(name) > first
        assert lease.expires_at > before
        assert lease.remaining > LONG - 5
        holds(lease)
        lease.release()

    sweep(proxy, scenario)
    assert lost == []


def test_a_renewal_before_an_outage_is_unknown_and_not_lost(proxy: Proxy, lost: list[str]) -> None:
    def scenario(name: str, cut: Disturbed) -> None:
        warm()
        lease = acquire(name)
        with cut:
            with suppress(DatabaseError):
                lease.renew()
        assert not lease.lost
        proxy.come_up()
        connections[ALIAS].close()
        lease.renew()
        holds(lease)
        lease.release()

    sweep(proxy, scenario, down=True)
    assert lost == []


@pytest.mark.parametrize("down", [False, True])
def test_a_cut_renewal_of_the_keeper_is_repeated_in_time(
    proxy: Proxy, lost: list[str], down: bool
) -> None:
    ttl = 2.0

    def scenario(name: str, cut: Disturbed) -> None:
        warm()
        lease = lock(name, ttl=ttl, using=ALIAS).acquire()
        first, before = expiry(name), lease.expires_at
        with cut:
            lease._term.next_renewal = 0.0
            keeper.rounds(ALIAS)._thread.wake()
            eventually(lambda: cut.rule.happened.is_set() or lease.expires_at > before, ttl / 2)
            if down:
                time.sleep(0.05)
                assert not lease.lost
                proxy.come_up()
            assert eventually(lambda: lease.expires_at > before, ttl)
            assert expiry(name) > first, "believed to be renewed, and was not"
            assert not lease.lost
        holds(lease)
        lease.release()

    sweep(proxy, scenario, down=down)
    assert lost == []
