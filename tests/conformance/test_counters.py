"""The numbers that the statements keep for nothing. Times are microseconds."""

from __future__ import annotations

from django.db import connection

from distlock.backends.base import Backend, Unlock
from tests.conformance.rows import MINUTE, SECOND, claim, expire, stored, take, write


def test_a_new_row_counts_one_acquisition_and_its_wait(backend: Backend, mode: str) -> None:
    assert backend.grant(connection, claim(), 1.5)
    row = stored()
    assert (row.acquisitions, row.losses) == (1, 0)
    assert (row.total_wait, row.longest_wait) == (1_500_000, 1_500_000)
    assert (row.total_hold, row.longest_hold) == (0, 0)


def test_waits_are_added_up_and_the_longest_is_kept(backend: Backend, mode: str) -> None:
    for number, waited in enumerate((0.5, 2.0, 1.0, 0.0)):
        assert backend.grant(connection, claim(f"owner {number}"), waited)
        expire()
    row = stored()
    assert (row.total_wait, row.longest_wait) == (3_500_000, 2_000_000)
    assert row.acquisitions == 4


def test_a_try_that_finds_the_lock_busy_counts_nothing(backend: Backend, mode: str) -> None:
    take(backend)
    before = stored()
    assert backend.grant(connection, claim("you"), 9.0) is None
    assert stored() == before


def test_a_lease_that_was_taken_over_counts_as_lost(backend: Backend, mode: str) -> None:
    take(backend)
    for losses in (1, 2):
        expire()
        take(backend, f"owner {losses}")
        assert stored().losses == losses
    assert stored().acquisitions == 3


def test_a_lease_that_was_released_is_not_lost(backend: Backend, mode: str) -> None:
    held = take(backend)
    backend.release(connection, held, alone=mode == "autocommit")
    held = take(backend, "you")
    backend.free(connection, held)
    take(backend, "she")
    assert (stored().losses, stored().acquisitions) == (0, 3)


def test_a_claim_that_finds_its_own_grant_loses_nothing(backend: Backend, mode: str) -> None:
    take(backend)
    take(backend)
    expire()
    take(backend)
    assert stored().losses == 0


def test_a_forced_release_counts_as_a_loss(backend: Backend, mode: str) -> None:
    held = take(backend)
    backend.force_release(connection, "n", 0, held.token)
    take(backend, "you")
    assert (stored().losses, stored().acquisitions) == (1, 2)


def test_holds_are_added_up_and_the_longest_is_kept(backend: Backend, mode: str) -> None:
    for number, held_for in enumerate((5, 9, 3)):
        held = take(backend, f"owner {number}")
        write(acquired_at=-held_for * SECOND)
        assert backend.release(connection, held, alone=mode == "autocommit")
    row = stored()
    assert 17 * SECOND <= row.total_hold < 18 * SECOND
    assert 9 * SECOND <= row.longest_hold < 10 * SECOND


def test_the_time_after_a_release_is_not_held(backend: Backend, mode: str) -> None:
    held = take(backend, min_hold=MINUTE)
    assert backend.release(connection, held, alone=mode == "autocommit")
    write(acquired_at=-30 * SECOND)
    assert backend.release(connection, held, alone=mode == "autocommit")
    assert backend.free(connection, held) is Unlock.GONE
    assert stored().total_hold < SECOND


def test_a_clock_that_was_set_back_counts_no_negative_hold(backend: Backend, mode: str) -> None:
    held = take(backend)
    write(acquired_at=5 * SECOND)
    assert backend.release(connection, held, alone=mode == "autocommit")
    assert stored().total_hold >= 0
    assert stored().longest_hold >= 0
