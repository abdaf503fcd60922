"""The row lock that fences a transaction. A guard is always called inside one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import DatabaseError, connection
from django.db.backends.base.base import BaseDatabaseWrapper

from distlock.backends.base import Backend, Pinned, Unlock
from tests.conformance.rows import (
    Holding,
    claim,
    execute,
    expire,
    purge,
    query,
    stored,
    take,
    transaction,
    within,
)

native = pytest.mark.backends("PostgreSQL")
snapshots = pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])


@pytest.fixture
def work(other: BaseDatabaseWrapper) -> Iterator[BaseDatabaseWrapper]:
    """The transaction of another session: the work that a guard protects."""
    with transaction(other):
        yield other


def test_the_holder_passes(backend: Backend, work: BaseDatabaseWrapper) -> None:
    held = take(backend)
    before = stored()
    assert backend.guard(work, held)
    assert backend.guard(work, held)
    work.commit()
    assert stored() == before


@pytest.mark.parametrize(
    "wrong", [{"owner": "you"}, {"name": "m"}, {"slot": 1}, {"token": 1}], ids=str
)
def test_nobody_else_passes(
    backend: Backend, work: BaseDatabaseWrapper, wrong: dict[str, str | int]
) -> None:
    held = take(backend)
    take(backend, "you", "m")
    take(backend, "you", "n", slot=1)
    for column, value in wrong.items():
        setattr(held, column, value)
    assert not backend.guard(work, held)


def test_the_token_from_before_its_expiry_does_not_pass(
    backend: Backend, work: BaseDatabaseWrapper
) -> None:
    first = take(backend)
    expire()
    again = take(backend)
    assert again.token > first.token
    assert not backend.guard(work, first)
    assert backend.guard(work, again)


def test_a_lease_that_was_taken_over_does_not_pass(
    backend: Backend, work: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    expire()
    take(backend, "you")
    assert not backend.guard(work, held)


def test_a_lease_that_was_released_does_not_pass(
    backend: Backend, work: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    backend.release(connection, held, alone=True)
    assert not backend.guard(work, held)


def test_a_lease_that_was_forced_does_not_pass(backend: Backend, work: BaseDatabaseWrapper) -> None:
    held = take(backend)
    assert backend.force_release(connection, "n", 0, held.token)
    assert not backend.guard(work, held)


def test_a_lease_whose_row_is_gone_does_not_pass(
    backend: Backend, work: BaseDatabaseWrapper
) -> None:
    assert not backend.guard(work, Holding("absent"))


def test_a_guard_sees_the_release_of_its_own_transaction(
    backend: Backend, work: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    assert backend.guard(work, held)
    assert backend.release(work, held, alone=False)
    assert not backend.guard(work, held)


@pytest.mark.vendor("postgresql", "mysql")
def test_nobody_is_granted_a_guarded_lock_even_when_it_has_expired(
    backend: Backend, work: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    expire()
    assert backend.guard(work, held)
    before = stored()
    with within(0.5):
        assert backend.grant(connection, claim("you"), 0) is None
        assert backend.free(connection, held) is Unlock.PINNED
        assert purge(backend) == 0
    assert stored() == before
    work.commit()
    take(backend, "you")


@pytest.mark.vendor("postgresql", "mysql")
def test_nobody_forces_a_guarded_lock(backend: Backend, work: BaseDatabaseWrapper) -> None:
    held = take(backend)
    assert backend.guard(work, held)
    before = stored()
    with within(0.5), pytest.raises(Pinned, match="'n' is in use by a running transaction"):
        backend.force_release(connection, "n", 0, held.token)
    assert stored() == before
    work.commit()
    assert backend.force_release(connection, "n", 0, held.token)


@pytest.mark.vendor("sqlite")
def test_a_guard_holds_the_write_lock_of_the_file(
    backend: Backend, work: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    assert backend.guard(work, held)
    execute("PRAGMA busy_timeout = 0")
    try:
        with pytest.raises(DatabaseError, match="locked") as caught:
            expire()
        assert backend.is_contention(caught.value)
    finally:
        execute("PRAGMA busy_timeout = 20000")


@pytest.mark.vendor("mysql")
def test_a_guard_blocks_renewals_where_it_says_so(
    backend: Backend, work: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    assert backend.guard(work, held)
    assert backend.guard_blocks_renewal
    with within(0.5):
        assert backend.renew(connection, [held]) == {"me": None}


# -- PostgreSQL: renewals go on under a guard, and nothing stronger does --------------------------


@native
@pytest.mark.vendor("postgresql")
def test_renewals_go_on_under_a_guard(backend: Backend, work: BaseDatabaseWrapper) -> None:
    held = take(backend)
    assert backend.guard(work, held)
    with within(0.5):
        expires = backend.renew(connection, [held])["me"]
    assert expires is not None
    assert expires > held.expires_us
    assert not backend.guard_blocks_renewal
    assert backend.guard(work, held)
    work.commit()


@native
@snapshots
@pytest.mark.vendor("postgresql")
def test_a_guard_passes_under_a_snapshot_that_is_older_than_a_renewal(
    backend: Backend, other: BaseDatabaseWrapper, isolation: str
) -> None:
    held = take(backend)
    with transaction(other, isolation):
        query("SELECT 1", on=other)
        for _ in range(2):
            assert backend.renew(connection, [held])["me"]
            assert backend.guard(other, held)
        with within(0.5):
            assert backend.renew(connection, [held])["me"]
        expire()
        assert backend.grant(connection, claim("you"), 0) is None
        other.commit()
    take(backend, "you")


@native
@snapshots
@pytest.mark.vendor("postgresql")
@pytest.mark.parametrize("ending", ["granted", "granted and released", "forced", "purged"])
def test_a_guard_fails_under_a_snapshot_that_is_older_than_the_end_of_the_lease(
    backend: Backend, other: BaseDatabaseWrapper, isolation: str, ending: str
) -> None:
    held = take(backend)
    with transaction(other, isolation):
        query("SELECT 1", on=other)
        if ending == "forced":
            assert backend.force_release(connection, "n", 0, held.token)
        else:
            expire()
        if ending == "purged":
            assert purge(backend) == 1
        elif ending.startswith("granted"):
            following = take(backend, "you")
            if ending == "granted and released":
                assert backend.release(connection, following, alone=True)
        assert not passes(backend, other, held)


@native
@snapshots
@pytest.mark.vendor("postgresql")
def test_an_update_fails_under_a_snapshot_that_is_older_than_a_renewal(
    backend: Backend, other: BaseDatabaseWrapper, isolation: str
) -> None:
    """The reason for the flag, and for a guard in the place of a release."""
    assert backend.release_keeps_snapshot
    held = take(backend)
    with transaction(other, isolation):
        query("SELECT 1", on=other)
        assert backend.renew(connection, [held])["me"]
        with pytest.raises(DatabaseError, match="serialize") as caught:
            backend.release(other, held, alone=False)
        assert backend.is_contention(caught.value)


@snapshots
@pytest.mark.vendor("mysql")
def test_a_guard_reads_past_an_old_snapshot(
    backend: Backend, other: BaseDatabaseWrapper, isolation: str
) -> None:
    """A locking read sees what is committed, so a release or guard needs no fresh snapshot."""
    held = take(backend)
    with transaction(other, isolation):
        query("SELECT 1 FROM distlock_distributedlock WHERE name = 'm'", on=other)
        assert backend.renew(connection, [held])["me"]
        assert passes(backend, other, held)
    with transaction(other, isolation):
        query("SELECT 1 FROM distlock_distributedlock WHERE name = 'm'", on=other)
        expire()
        take(backend, "you")
        assert not passes(backend, other, held)


def passes(backend: Backend, on: BaseDatabaseWrapper, held: Holding) -> bool:
    """Whether the transaction gets past a guard: an error ends it just as well."""
    try:
        return backend.guard(on, held)
    except DatabaseError as error:
        assert backend.is_contention(error), error  # noqa: PT017
        return False
