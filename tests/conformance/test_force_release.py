from __future__ import annotations

import pytest
from django.db import connection

from distlock.backends.base import Backend, Pinned
from tests.conformance.rows import (
    FAR,
    MILLISECOND,
    MINUTE,
    SECOND,
    claim,
    expire,
    now,
    pinned,
    stored,
    take,
    within,
    write,
)


def test_a_forced_lock_is_free_and_its_token_has_grown(backend: Backend, mode: str) -> None:
    held = take(backend)
    before = now()
    token = backend.force_release(connection, "n", 0, held.token)
    after = now()
    row = stored()
    assert token is not None
    assert (row.owner, row.fencing_token, row.losses) == ("", token, 1)
    assert token > held.token
    assert before <= token <= after + MILLISECOND  # SQLite's clock counts milliseconds
    assert before <= row.expires_at <= after
    assert take(backend, "you").token > token


def test_a_token_from_the_future_still_grows(backend: Backend, mode: str) -> None:
    take(backend)
    write(fencing_token=FAR)
    assert backend.force_release(connection, "n", 0, FAR) == FAR + 1
    assert take(backend, "you").token == FAR + 2


def test_min_hold_does_not_outlast_force(backend: Backend, mode: str) -> None:
    held = take(backend, min_hold=MINUTE)
    assert backend.force_release(connection, "n", 0, held.token)
    take(backend, "you")


def test_a_forced_lock_is_free_though_the_clock_is_set_back(backend: Backend, mode: str) -> None:
    held = take(backend, min_hold=MINUTE)
    assert backend.force_release(connection, "n", 0, held.token)
    write(acquired_at=60 * MINUTE, expires_at=60 * MINUTE)
    take(backend, "you")


def test_the_forced_holder_can_do_nothing_more(backend: Backend, mode: str) -> None:
    held = take(backend)
    assert backend.force_release(connection, "n", 0, held.token)
    assert backend.renew(connection, [held]) == {}
    assert not backend.release(connection, held, alone=mode == "autocommit")
    assert stored().owner == ""


def test_it_is_refused_when_the_holder_has_changed(backend: Backend, mode: str) -> None:
    held = take(backend)
    expire()
    take(backend, "you")
    before = stored()
    assert backend.force_release(connection, "n", 0, held.token) is None
    assert stored() == before


def test_a_lock_that_only_min_hold_keeps_is_freed_and_nobody_has_lost_it(
    backend: Backend, mode: str
) -> None:
    held = take(backend, min_hold=MINUTE)
    backend.release(connection, held, alone=mode == "autocommit")
    assert backend.grant(connection, claim("you"), 0) is None
    before = now()
    token = backend.force_release(connection, "n", 0, held.token)
    row = stored()
    assert token is not None
    assert token > held.token
    assert (row.owner, row.fencing_token, row.ttl, row.losses) == ("", token, 0, 0)
    assert before <= row.expires_at <= now()
    assert backend.force_release(connection, "n", 0, token) is None
    assert take(backend, "you").token > token


def test_with_an_owner_it_takes_the_lock_from_no_other(backend: Backend, mode: str) -> None:
    held = take(backend, min_hold=MINUTE)
    before = stored()
    for other in ("you", "", "ME"):
        assert backend.force_release(connection, "n", 0, held.token, owner=other) is None
    assert stored() == before
    backend.release(connection, held, alone=mode == "autocommit")
    kept = stored()
    assert (kept.owner, kept.fencing_token) == ("", held.token)  # the token is still the holder's
    assert backend.force_release(connection, "n", 0, held.token, owner="me") is None
    assert stored() == kept
    assert backend.force_release(connection, "n", 0, held.token, owner="")
    token = take(backend, "you").token
    assert backend.force_release(connection, "n", 0, token, owner="you")
    assert stored().owner == ""


@pytest.mark.parametrize("state", ["released", "expired", "absent"])
def test_it_is_refused_when_nobody_holds_the_lock(backend: Backend, mode: str, state: str) -> None:
    held = take(backend)
    if state == "expired":
        expire()
    elif state != "absent":
        backend.release(connection, held, alone=mode == "autocommit")
    name = "absent" if state == "absent" else "n"
    before = stored()
    assert backend.force_release(connection, name, 0, held.token) is None
    assert stored() == before


def test_another_name_or_slot_with_the_same_token_is_untouched(backend: Backend, mode: str) -> None:
    for name, slot in (("n", 0), ("n", 1), ("m", 0)):
        take(backend, "me", name, slot=slot)
        write(name, slot, fencing_token=FAR)
    before = stored("n", 1), stored("m")
    assert backend.force_release(connection, "n", 0, FAR)
    assert (stored("n", 1), stored("m")) == before


@pytest.mark.vendor("postgresql", "mysql")
def test_a_pinned_row_is_said_to_be_in_use(backend: Backend) -> None:
    held = take(backend, ttl=10 * SECOND)
    before = stored()
    with pinned(), within(0.5), pytest.raises(Pinned) as caught:
        backend.force_release(connection, "n", 0, held.token)
    assert str(caught.value) == "The lock 'n' is in use by a running transaction."
    assert backend.is_contention(caught.value)
    assert stored() == before
    assert backend.force_release(connection, "n", 0, held.token)
