"""`release`, on its own or inside a transaction, and `free`, after a transaction that broke off."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.db import connection
from django.db.backends.base.base import BaseDatabaseWrapper

from distlock.backends.base import Backend, Unlock
from tests.conformance.rows import (
    FAR,
    MINUTE,
    SECOND,
    Holding,
    claim,
    expire,
    now,
    pinned,
    stored,
    take,
    transaction,
    within,
    write,
)

End = Callable[[Backend, Holding], bool]


@pytest.fixture(params=["release", "free"])
def end(request: pytest.FixtureRequest, mode: str) -> End:
    """Either way to give a lock back; whether it was given back."""

    def release(backend: Backend, held: Holding) -> bool:
        return backend.release(connection, held, alone=mode == "autocommit")

    def free(backend: Backend, held: Holding) -> bool:
        return backend.free(connection, held) is Unlock.FREED

    return release if request.param == "release" else free


def test_a_released_lock_is_free_and_keeps_its_row(backend: Backend, end: End) -> None:
    held = take(backend, note="why")
    before = now()
    assert end(backend, held)
    row = stored()
    assert (row.owner, row.fencing_token, row.note) == ("", held.token, "why")
    assert before <= row.expires_at <= now()
    take(backend, "you")


@pytest.mark.parametrize("wrong", [{"owner": "you"}, {"name": "m"}, {"slot": 1}], ids=str)
def test_only_the_owner_releases_and_only_its_own_row(
    backend: Backend, end: End, wrong: dict[str, str | int]
) -> None:
    """The same nonce is on the row of another name and slot, and the same token on each."""
    take(backend, "me", "n")
    other_name, other_slot = wrong.get("name", "n"), wrong.get("slot", 0)
    if "owner" not in wrong:
        take(backend, "me", other_name, slot=other_slot)
        write(other_name, other_slot, fencing_token=FAR)
    write(fencing_token=FAR)
    before = stored()
    stranger = Holding(**{"name": "n", "slot": 0, "owner": "me", "token": FAR, **wrong})
    assert end(backend, stranger) == ("owner" not in wrong)
    assert stored() == before
    if "owner" not in wrong:
        assert stored(other_name, other_slot).owner == ""


def test_a_late_release_does_not_touch_the_next_holder(backend: Backend, end: End) -> None:
    held = take(backend)
    expire()
    take(backend, "you")
    before = stored()
    assert not end(backend, held)
    assert stored() == before


def test_a_late_release_is_refused_when_the_next_holder_has_come_and_gone(
    backend: Backend, end: End
) -> None:
    held = take(backend)
    expire()
    following = take(backend, "you", min_hold=MINUTE)
    assert backend.release(connection, following, alone=False)
    before = stored()
    assert before.owner == ""
    assert not end(backend, held)
    assert stored() == before


def test_a_late_release_is_refused_after_a_forced_one(backend: Backend, end: End) -> None:
    held = take(backend)
    assert backend.force_release(connection, "n", 0, held.token)
    before = stored()
    assert not end(backend, held)
    assert stored() == before


def test_a_late_release_is_refused_when_the_row_is_gone(backend: Backend, end: End) -> None:
    assert not end(backend, Holding("absent"))
    assert stored("absent") is None


def test_an_expired_lease_that_nobody_took_can_be_released(backend: Backend, end: End) -> None:
    held = take(backend)
    expire()
    assert end(backend, held)
    assert stored().owner == ""


def test_a_release_keeps_the_lock_until_min_hold_has_passed(backend: Backend, end: End) -> None:
    held = take(backend, ttl=SECOND, min_hold=MINUTE)
    assert end(backend, held)
    row = stored()
    assert row.owner == ""
    assert row.expires_at == row.acquired_at + MINUTE
    assert backend.grant(connection, claim("you"), 0) is None
    expire()
    take(backend, "you")


def test_a_release_after_min_hold_frees_at_once(backend: Backend, end: End) -> None:
    held = take(backend, min_hold=SECOND)
    write(acquired_at=-2 * SECOND)
    assert end(backend, held)
    assert stored().expires_at <= now()


@pytest.mark.parametrize("min_hold", [0, MINUTE])
def test_a_clock_that_was_set_back_keeps_a_released_lock_no_longer_than_min_hold(
    backend: Backend, end: End, min_hold: int
) -> None:
    held = take(backend, min_hold=min_hold)
    write(acquired_at=10 * MINUTE, expires_at=11 * MINUTE)
    assert end(backend, held)
    assert stored().expires_at <= now() + min_hold


@pytest.mark.parametrize("min_hold", [0, SECOND], ids=["without min_hold", "after min_hold"])
def test_a_clock_that_is_set_back_after_the_release_keeps_no_lock(
    backend: Backend, end: End, min_hold: int
) -> None:
    held = take(backend, min_hold=min_hold)
    write(acquired_at=-2 * SECOND)
    assert end(backend, held)
    write(acquired_at=59 * MINUTE, expires_at=60 * MINUTE)
    assert backend.holder(connection, "n", 0) is None
    assert backend.force_release(connection, "n", 0, held.token) is None
    following = take(backend, "you")
    assert following.token > held.token
    assert stored().expires_at <= now() + MINUTE
    assert stored().losses == 0


def test_a_row_says_whether_min_hold_keeps_it(backend: Backend, end: End) -> None:
    held = take(backend, min_hold=MINUTE)
    assert end(backend, held)
    assert stored().ttl == MINUTE
    assert backend.holder(connection, "n", 0) is not None
    assert backend.force_release(connection, "n", 0, held.token)
    held = take(backend)
    assert end(backend, held)
    assert stored().ttl == 0


def test_a_release_counts_the_time_held(backend: Backend, end: End) -> None:
    for held_for in (5 * SECOND, 3 * SECOND):
        held = take(backend)
        write(acquired_at=-held_for)
        assert end(backend, held)
    row = stored()
    assert 8 * SECOND <= row.total_hold < 9 * SECOND
    assert 5 * SECOND <= row.longest_hold < 6 * SECOND
    assert (row.acquisitions, row.losses) == (2, 0)


def test_a_release_that_is_written_again_is_found_and_counts_once(
    backend: Backend, mode: str
) -> None:
    """Its answer may be lost with the connection, and a savepoint rollback may undo it."""
    held = take(backend, min_hold=MINUTE)
    write(acquired_at=-5 * SECOND)
    assert backend.release(connection, held, alone=mode == "autocommit")
    once = stored()
    assert backend.release(connection, held, alone=mode == "autocommit")
    assert stored() == once
    assert once.expires_at == once.acquired_at + MINUTE


def test_a_release_inside_a_transaction_is_seen_at_its_commit(
    backend: Backend, other: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    with transaction(connection):
        assert backend.release(connection, held, alone=False)
        assert stored(on=other).owner == "me"
        connection.commit()
    assert stored(on=other).owner == ""
    take(backend, "you")


@pytest.mark.vendor("postgresql", "mysql")
def test_a_release_inside_a_transaction_pins_the_row_until_its_end(
    backend: Backend, other: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    with transaction(connection):
        assert backend.release(connection, held, alone=False)
        with within(0.5):
            assert backend.grant(other, claim("you"), 0) is None
            assert backend.renew(other, [held]) == {"me": None}
            assert backend.free(other, held) is Unlock.PINNED
    assert stored().owner == "me"
    assert backend.free(other, held) is Unlock.FREED


def test_a_release_that_is_rolled_back_leaves_the_lock_held(
    backend: Backend, other: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    before = stored()
    with transaction(connection):
        assert backend.release(connection, held, alone=False)
    assert stored(on=other) == before
    assert backend.grant(other, claim("you"), 0) is None


def test_free_says_what_it_found(backend: Backend, mode: str) -> None:
    held = take(backend)
    assert backend.free(connection, held) is Unlock.FREED
    assert backend.free(connection, held) is Unlock.GONE
    take(backend, "you")
    assert backend.free(connection, held) is Unlock.GONE
    assert backend.free(connection, Holding("absent")) is Unlock.GONE


@pytest.mark.vendor("postgresql", "mysql")
def test_free_passes_over_a_pinned_row(backend: Backend) -> None:
    held = take(backend)
    before = stored()
    with pinned(), within(0.5):
        assert backend.free(connection, held) is Unlock.PINNED
    assert stored() == before
    assert backend.free(connection, held) is Unlock.FREED


@pytest.mark.vendor("postgresql", "mysql")
def test_free_does_not_mind_a_pin_on_the_next_holders_row(backend: Backend) -> None:
    held = take(backend)
    expire()
    take(backend, "you")
    with pinned(), within(0.5):
        assert backend.free(connection, held) in (Unlock.GONE, Unlock.PINNED)
    assert backend.free(connection, held) is Unlock.GONE
    assert stored().owner == "you"
