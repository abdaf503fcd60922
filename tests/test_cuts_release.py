"""A release whose connection is cut at any message, and statements that arrive late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
from django.db import transaction

from distlock import LockLost, lock
from distlock.backends.base import TABLE
from distlock.signals import lock_released
from tests.cuts import (
    ALIAS,
    LONG,
    SHORT,
    Disturbed,
    acquire,
    beside,
    eventually,
    fresh_name,
    holds,
    sweep,
    told,
    warm,
)
from tests.proxy import Hold, Proxy
from tests.support import becomes_free, is_free, row

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "other"]),
    pytest.mark.vendor("postgresql", "mysql"),
]


@pytest.fixture
def released() -> Iterator[list[str]]:
    """The names of the alias's locks that were told to be released."""
    with told(lock_released) as names:
        yield names


# -- release -----------------------------------------------------------------------------------


def test_a_cut_release_is_repeated(proxy: Proxy, lost: list[str], released: list[str]) -> None:
    def scenario(name: str, cut: Disturbed) -> None:
        warm()
        lease = acquire(name)
        with cut:
            lease.release()
        assert released.count(name) == 1
        assert is_free(name)
        assert row(name)["losses"] == 0

    sweep(proxy, scenario)
    assert lost == []


def test_a_release_before_an_outage_is_finished_after_it(
    proxy: Proxy, lost: list[str], released: list[str]
) -> None:
    def scenario(name: str, cut: Disturbed) -> None:
        warm()
        lease = acquire(name)
        with cut:
            lease.release()
        proxy.come_up()
        assert becomes_free(name, 2)
        assert eventually(lambda: released.count(name) == 1, 2)

    sweep(proxy, scenario, down=True)
    assert lost == []


def test_a_release_whose_lock_was_granted_before_it_could_be_repeated_is_no_loss(
    proxy: Proxy, lost: list[str], released: list[str]
) -> None:
    """The holder was done while it could trust its lease; who was granted it came after."""
    warm()
    name = fresh_name()
    lease = acquire(name)
    held = proxy.disturb(Hold(TABLE.encode(), answer=True))

    def grant_and_cut() -> None:
        held.wait()
        with lock(name, wait=0, ttl=LONG):
            held.drop()
            assert eventually(lambda: name in released + lost, 5)

    with beside(grant_and_cut):
        lease.release()
    assert released.count(name) == 1
    assert lost == []


# -- what arrives late -------------------------------------------------------------------------


def test_an_acquire_that_arrives_after_its_repetition_takes_nothing_from_it(proxy: Proxy) -> None:
    warm()
    name = fresh_name()
    held = proxy.disturb(Hold(TABLE.encode()))
    with beside(held.cut_client):
        lease = acquire(name)
    try:
        held.deliver()
        with transaction.atomic(using=ALIAS):
            lease.guard()
        holds(lease)
    finally:
        with suppress(LockLost):
            lease.release()
    assert is_free(name)


def test_an_acquire_that_arrives_after_the_release_holds_no_longer_than_its_ttl(
    proxy: Proxy,
) -> None:
    warm()
    name = fresh_name()
    held = proxy.disturb(Hold(TABLE.encode()))
    with beside(held.cut_client):
        acquire(name, ttl=SHORT).release()
    held.deliver()
    assert becomes_free(name, SHORT + 1)


def test_a_release_that_arrives_late_does_not_touch_the_next_holder(
    proxy: Proxy, lost: list[str]
) -> None:
    warm()
    name = fresh_name()
    lease = acquire(name)
    held = proxy.disturb(Hold(TABLE.encode()))
    with beside(held.cut_client):
        lease.release()
    after = acquire(name)
    held.deliver()
    holds(after, times=2)
    after.release()
    assert lost == []
