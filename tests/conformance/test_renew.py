from __future__ import annotations

import pytest
from django.db import connection

from distlock.backends.base import Backend
from tests.conformance.rows import (
    FAR,
    MINUTE,
    SECOND,
    Holding,
    expire,
    now,
    pinned,
    stored,
    take,
    transaction,
    within,
    write,
)

pytestmark = pytest.mark.usetz


def renewal_of(backend: Backend, *held: Holding, ttl: int | None = None) -> dict[str, int | None]:
    return dict(backend.renew(connection, held, ttl))


def test_a_lease_is_extended_by_its_ttl_from_now(backend: Backend, mode: str) -> None:
    held = take(backend)
    write(expires_at=SECOND)
    before = now()
    renewed = renewal_of(backend, held)
    after = now()
    expires = stored().expires_at
    assert renewed == {"me": expires}
    assert before + MINUTE <= expires <= after + MINUTE
    assert stored().fencing_token == held.token


def test_a_renewal_changes_nothing_but_the_expiry(backend: Backend, mode: str) -> None:
    held = take(backend, note="why")
    before = stored()
    assert renewal_of(backend, held)["me"]
    after = stored()
    before.expires_at = after.expires_at
    assert after == before


def test_another_ttl_holds_for_later_renewals_too(backend: Backend, mode: str) -> None:
    held = take(backend)
    for ttl in (3 * MINUTE, None, SECOND, None):
        before = now()
        expires = renewal_of(backend, held, ttl=ttl)["me"]
        wanted = ttl or stored().ttl
        assert expires is not None
        assert before + wanted <= expires <= now() + wanted
        assert stored().ttl == wanted
        write(expires_at=MINUTE)
    assert stored().ttl == SECOND


@pytest.mark.parametrize("wrong", [{"owner": "you"}, {"name": "m"}, {"slot": 1}], ids=str)
def test_only_the_owner_renews_and_only_its_own_row(
    backend: Backend, mode: str, wrong: dict[str, str | int]
) -> None:
    """The owner holds two other rows under the same nonce: none of the three may be left out."""
    held = take(backend, "me", "n")
    rest = [take(backend, "me", "m"), take(backend, "me", "n", slot=1)]
    before = [stored("n"), stored("m"), stored("n", 1)]
    stranger = Holding(**{"name": "n", "slot": 0, "owner": "me", **wrong})
    stranger.expires_us = held.expires_us
    if wrong == {"owner": "you"}:
        assert renewal_of(backend, stranger) == {}
        assert [stored("n"), stored("m"), stored("n", 1)] == before
    else:
        assert renewal_of(backend, stranger)["me"]
        assert stored("n") == before[0]
    assert {one.owner for one in rest} == {"me"}


def test_an_expired_lease_is_never_renewed_even_if_nobody_took_it(
    backend: Backend, mode: str
) -> None:
    held = take(backend)
    expire()
    before = stored()
    assert renewal_of(backend, held) == {}
    assert renewal_of(backend, held, ttl=MINUTE) == {}
    assert stored() == before


def test_a_lease_that_ends_at_this_very_moment_is_not_renewed(backend: Backend) -> None:
    held = take(backend)
    write(expires_at=0)
    assert renewal_of(backend, held) == {}


def test_a_lease_that_somebody_else_took_is_not_renewed(backend: Backend, mode: str) -> None:
    held = take(backend)
    expire()
    take(backend, "you")
    before = stored()
    assert renewal_of(backend, held) == {}
    assert stored() == before


def test_a_released_lease_is_not_renewed(backend: Backend, mode: str) -> None:
    held = take(backend, min_hold=MINUTE)
    assert backend.release(connection, held, alone=mode == "autocommit")
    before = stored()
    assert before.expires_at > now()
    assert renewal_of(backend, held) == {}
    assert stored() == before


def test_a_lease_whose_row_is_gone_is_not_renewed(backend: Backend, mode: str) -> None:
    assert renewal_of(backend, Holding("absent")) == {}
    assert stored("absent") is None


def test_many_leases_are_renewed_at_once(backend: Backend, mode: str) -> None:
    held = [take(backend, f"owner {n}", f"n{n}", ttl=MINUTE + n * SECOND) for n in range(30)]
    for lease in held:
        write(lease.name, expires_at=SECOND)
    expire("n3")
    expire("n4")
    take(backend, "you", "n4")
    before = now()
    renewed = renewal_of(backend, *held, Holding("absent", owner="nobody"))
    assert renewed.keys() == {f"owner {n}" for n in range(30)} - {"owner 3", "owner 4"}
    for n, lease in enumerate(held):
        if n not in (3, 4):
            assert renewed[lease.owner] == stored(lease.name).expires_at
            assert renewed[lease.owner] >= before + MINUTE + n * SECOND
    assert stored("n4").owner == "you"


@pytest.mark.vendor("postgresql", "mysql")
def test_a_pinned_row_is_passed_over_and_the_others_are_renewed(backend: Backend) -> None:
    held = [take(backend, f"owner {n}", f"n{n}") for n in range(3)]
    with pinned("n1"), within(0.5):
        renewed = renewal_of(backend, *held)
    assert renewed["owner 1"] is None
    assert stored("n1").expires_at == held[1].expires_us
    for n in (0, 2):
        assert renewed[f"owner {n}"] == stored(f"n{n}").expires_at > held[n].expires_us
    assert renewal_of(backend, held[1])["owner 1"] > held[1].expires_us


@pytest.mark.vendor("postgresql", "mysql")
def test_a_pinned_row_is_not_renewed_by_an_earlier_renewal_whose_answer_was_lost(
    backend: Backend,
) -> None:
    held = take(backend)
    write(expires_at=30 * SECOND)
    assert held.expires_us != stored().expires_at
    with pinned():
        assert renewal_of(backend, held) == {"me": None}


@pytest.mark.vendor("postgresql", "mysql")
def test_the_lease_of_a_pinned_row_that_expires_meanwhile_is_not_renewed(
    backend: Backend,
) -> None:
    held = take(backend)
    expire()
    with pinned():
        assert not renewal_of(backend, held).get("me")
    assert renewal_of(backend, held) == {}


def test_a_row_that_the_own_transaction_pins_is_renewed_even_if_it_looks_expired(
    backend: Backend,
) -> None:
    if not backend.guard_blocks_renewal:
        return  # then nothing has to be made up for at the end of a transaction
    held, lost = take(backend), take(backend, "me too", "m")
    expire()
    expire("m")
    take(backend, "you", "m")
    with transaction(connection):
        assert backend.guard(connection, held)
        renewed = backend.renew(connection, [held, lost], pinned=True)
        assert renewed.keys() == {"me"}
        assert renewed["me"] == stored().expires_at > now()
    expire()
    with transaction(connection):
        assert backend.renew(connection, [held]) == {}


def test_the_token_does_not_matter_to_a_renewal(backend: Backend, mode: str) -> None:
    """An answer that was lost may have raised it; the owner is one acquisition's alone."""
    held = take(backend)
    write(fencing_token=FAR)
    assert renewal_of(backend, held)["me"]
    assert stored().fencing_token == FAR
