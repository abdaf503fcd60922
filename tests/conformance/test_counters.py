"""The numbers that the statements keep for nothing. Times are microseconds."""

from __future__ import annotations

from django.db import connection, transaction

from distlock.backends.base import Backend, Held, Unlock
from distlock.backends.stats import LockStats
from tests.conformance.rows import (
    MINUTE,
    SECOND,
    Holding,
    claim,
    expire,
    microseconds,
    now,
    purge,
    stored,
    take,
    write,
)


def release(backend: Backend, held: Held, mode: str) -> bool:
    return backend.release(connection, held, alone=mode == "autocommit")


def recently(moment: int) -> bool:
    """Whether the row says that it was in the last minute."""
    return now() - MINUTE < moment <= now() + SECOND


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


def test_what_was_granted_at_once_is_no_wait(backend: Backend, mode: str) -> None:
    for number, (waited, waits) in enumerate([(0.0, 0), (0.5, 1), (0.0, 1), (0.000_001, 2)]):
        assert backend.grant(connection, claim(f"owner {number}"), waited)
        assert (stored().acquisitions, stored().waits) == (number + 1, waits)
        expire()


def test_a_new_row_counts_whether_it_was_waited_for(backend: Backend, mode: str) -> None:
    for name, waited in (("at once", 0.0), ("later", 0.5)):
        assert backend.grant(connection, claim(name=name), waited)
    assert (stored("at once").waits, stored("later").waits) == (0, 1)
    assert stored("later").lost_at is None


def test_a_claim_that_finds_its_own_grant_counts_nothing(backend: Backend, mode: str) -> None:
    for _ in range(2):
        assert backend.grant(connection, claim(), 1.5)
        row = stored()
        assert (row.acquisitions, row.waits, row.total_wait) == (1, 1, 1_500_000)
    expire()
    assert backend.grant(connection, claim(), 1.5)
    row = stored()
    assert (row.acquisitions, row.waits, row.total_wait) == (1, 1, 1_500_000)
    assert (row.losses, row.lost_at) == (0, None)


def test_a_try_that_finds_the_lock_busy_counts_nothing(backend: Backend, mode: str) -> None:
    take(backend)
    before = stored()
    assert backend.grant(connection, claim("you"), 9.0) is None
    assert stored() == before


def test_a_lease_that_was_taken_over_counts_as_lost(backend: Backend, mode: str) -> None:
    take(backend)
    for losses in (1, 2):
        expire()
        write(lost_at=-5 * MINUTE)
        take(backend, f"owner {losses}")
        assert stored().losses == losses
        assert recently(stored().lost_at)
    assert stored().acquisitions == 3


def test_a_lease_that_was_released_is_not_lost(backend: Backend, mode: str) -> None:
    held = take(backend)
    backend.release(connection, held, alone=mode == "autocommit")
    held = take(backend, "you")
    backend.free(connection, held)
    take(backend, "she")
    assert (stored().losses, stored().acquisitions) == (0, 3)
    assert stored().lost_at is None


def test_a_loss_is_kept_by_what_follows(backend: Backend, mode: str) -> None:
    take(backend)
    expire()
    held = take(backend, "you")
    write(lost_at=-5 * MINUTE)
    lost_at = stored().lost_at
    assert backend.renew(connection, [held])
    assert release(backend, held, mode)
    held = take(backend, "she")
    assert backend.grant(connection, claim("it"), 0.5) is None
    assert backend.free(connection, held) is Unlock.FREED
    assert (stored().losses, stored().lost_at) == (1, lost_at)


def test_a_release_after_the_end_of_its_lease_is_a_loss_once(backend: Backend) -> None:
    held = take(backend)
    write(acquired_at=-2 * MINUTE)
    expire()
    assert backend.renew(connection, [held]) == {}
    for _ in range(2):
        assert backend.release(connection, held, alone=True)
        row = stored()
        assert (row.losses, row.total_hold, row.longest_hold) == (1, 0, 0)
        assert recently(row.lost_at)
    assert backend.free(connection, held) is Unlock.GONE
    take(backend, "you")
    assert (stored().losses, stored().acquisitions) == (1, 2)


def test_a_loss_that_the_next_grant_counted_is_counted_by_nobody_else(
    backend: Backend, mode: str
) -> None:
    held = take(backend)
    expire()
    take(backend, "you")
    assert backend.renew(connection, [held]) == {}
    assert not release(backend, held, mode)
    assert backend.free(connection, held) is Unlock.GONE
    assert stored().losses == 1


def test_what_a_transaction_has_locked_is_not_lost(backend: Backend) -> None:
    """Its row may have expired by the clock: nobody else can have been granted it."""
    for end in ("release", "free"):
        held = take(backend)
        write(acquired_at=-5 * SECOND)
        expire()
        if end == "release":
            assert backend.release(connection, held, alone=False)
        else:
            assert backend.free(connection, held) is Unlock.FREED
        assert (stored().losses, stored().lost_at) == (0, None)
    assert 10 * SECOND <= stored().total_hold < 20 * SECOND


def test_a_release_that_is_rolled_back_counts_nothing(backend: Backend) -> None:
    held = take(backend)
    write(acquired_at=-5 * SECOND)
    before = stored()
    for _ in range(2):
        with transaction.atomic():
            assert backend.release(connection, held, alone=False)
            transaction.set_rollback(True)
        assert stored() == before
    assert backend.release(connection, held, alone=True)
    assert 5 * SECOND <= stored().total_hold < 10 * SECOND


def test_a_claim_that_finds_its_own_grant_loses_nothing(backend: Backend, mode: str) -> None:
    take(backend)
    take(backend)
    expire()
    take(backend)
    assert stored().losses == 0


def test_a_forced_release_counts_as_a_loss(backend: Backend, mode: str) -> None:
    held = take(backend)
    write(acquired_at=-5 * SECOND)
    backend.force_release(connection, "n", 0, held.token)
    assert recently(stored().lost_at)
    assert not release(backend, held, mode)
    take(backend, "you")
    row = stored()
    assert (row.losses, row.acquisitions, row.total_hold) == (1, 2, 0)


def test_what_min_hold_keeps_is_nobodys_to_lose(backend: Backend, mode: str) -> None:
    held = take(backend, min_hold=MINUTE)
    assert release(backend, held, mode)
    assert backend.force_release(connection, "n", 0, held.token)
    assert (stored().losses, stored().lost_at) == (0, None)


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


# -- what they tell ------------------------------------------------------------------------------


def test_a_name_that_was_never_taken_has_no_stats(backend: Backend, mode: str) -> None:
    take(backend)
    assert backend.stats(connection, "x", 0) is None
    assert backend.stats(connection, "n", 1) is None


def test_stats_are_what_the_row_has_counted(backend: Backend, mode: str) -> None:
    for number, (waited, held_for) in enumerate([(0.0, 4), (3.0, 2), (1.0, None), (0.0, None)]):
        grant = backend.grant(connection, claim(f"owner {number}"), waited)
        assert grant is not None
        held = Holding(owner=f"owner {number}", token=grant.token)
        if held_for:
            write(acquired_at=-held_for * SECOND)
            assert release(backend, held, mode)
        elif number == 2:
            expire()
    found = backend.stats(connection, "n", 0)
    assert found is not None
    assert found.name == "n"
    counts = (found.acquisitions, found.waits, found.releases, found.losses)
    assert counts == (4, 2, 2, 1)
    assert (found.total_waited, found.mean_waited, found.longest_waited) == (4.0, 1.0, 3.0)
    assert found.share_waited == 0.5
    assert 6 <= found.total_held < 8
    assert 3 <= found.mean_held < 4
    assert 4 <= found.longest_held < 5
    assert found.last_lost_at is not None
    assert microseconds(found.last_lost_at) == stored().lost_at
    assert recently(microseconds(found.last_lost_at))


def test_stats_of_a_first_holder(backend: Backend, mode: str) -> None:
    take(backend)
    assert backend.stats(connection, "n", 0) == LockStats("n", 1, 0, 0, 0, None, 0, 0, 0, 0)


def test_a_purge_forgets_what_was_counted(backend: Backend, mode: str) -> None:
    held = take(backend)
    assert release(backend, held, mode)
    assert purge(backend) == 1
    assert backend.stats(connection, "n", 0) is None
    assert backend.grant(connection, claim(), 0)
    found = backend.stats(connection, "n", 0)
    assert found is not None
    assert (found.acquisitions, found.releases) == (1, 0)
    assert stored("").waits == stored("").acquisitions == 0
