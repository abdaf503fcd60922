"""The verbs inside a transaction at each isolation level, which may have its snapshot already.

On MariaDB once more with `innodb_snapshot_isolation`, which refuses to lock what was written after
the snapshot. The portable path knows nothing of that: it is for databases that have not been seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from django.db import DatabaseError, connection
from django.db.backends.base.base import BaseDatabaseWrapper

from distlock.backends.base import Backend, Pinned, Trace, Unlock, error_code
from tests.conformance.rows import (
    FAR,
    MINUTE,
    SECOND,
    TABLE,
    Holding,
    claim,
    execute,
    expire,
    isolate,
    pinned,
    purge,
    query,
    session,
    stored,
    take,
    transaction,
    within,
    write,
)

pytestmark = [
    pytest.mark.vendor("postgresql", "mysql"),
    pytest.mark.backends("PostgreSQL", "MariaDB"),
]
mysql = pytest.mark.vendor("mysql")

LEVELS = [
    "READ COMMITTED",
    "REPEATABLE READ",
    "SERIALIZABLE",
    pytest.param("REPEATABLE READ + snapshot", marks=mysql),
    pytest.param("SERIALIZABLE + snapshot", marks=mysql),
]
Fence = Callable[[Backend, BaseDatabaseWrapper, Holding], bool]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def work(other: BaseDatabaseWrapper, level: str) -> Iterator[BaseDatabaseWrapper]:
    """The transaction of another session at that level: `snap` gives it its snapshot."""
    isolate(other, level)
    with transaction(other):
        yield other


@pytest.fixture(params=["guard", "release"])
def fence(request: pytest.FixtureRequest) -> Fence:
    """What fences a transaction: whether it may go on. An error ends it just as well."""

    def guard(backend: Backend, on: BaseDatabaseWrapper, held: Holding) -> bool:
        return backend.guard(on, held)

    def release(backend: Backend, on: BaseDatabaseWrapper, held: Holding) -> bool:
        if backend.release_keeps_snapshot and backend.snapshot_isolation(on):
            return backend.guard(on, held)  # as `transactions.py` does
        return backend.release(on, held, alone=False)

    return guard if request.param == "guard" else release


def snap(work: BaseDatabaseWrapper) -> None:
    """Take the snapshot, away from the lock table: at SERIALIZABLE a read locks."""
    query("SELECT count(*) FROM django_migrations", on=work)


def passes(fence: Fence, backend: Backend, on: BaseDatabaseWrapper, held: Holding) -> bool:
    """Whether the transaction gets past the fence; PostgreSQL may end it with an error of 40001."""
    try:
        return fence(backend, on, held)
    except DatabaseError as error:
        if error_code(error) != "40001":
            raise
        return False


def has_snapshot(level: str) -> bool:
    """Whether a transaction reads what was: MariaDB locks what it reads when it is SERIALIZABLE."""
    if level.startswith("SERIALIZABLE"):
        return connection.vendor == "postgresql"
    return level != "READ COMMITTED"


# -- what is still held --------------------------------------------------------------------------


def test_renewals_after_the_snapshot_are_no_loss(
    backend: Backend, work: BaseDatabaseWrapper, fence: Fence
) -> None:
    held = take(backend)
    snap(work)
    for _ in range(2):
        assert backend.renew(connection, [held])["me"]
    for _ in range(2):
        assert fence(backend, work, held)
    with within(0.5):
        assert backend.grant(connection, claim("you"), 0) is None
        assert backend.free(connection, held) is Unlock.PINNED
        with pytest.raises(Pinned):
            backend.force_release(connection, "n", 0, held.token)
    work.commit()
    expire()
    take(backend, "you")


def test_a_mark_after_the_snapshot_is_no_loss(
    backend: Backend, work: BaseDatabaseWrapper, fence: Fence
) -> None:
    held = take(backend)
    snap(work)
    write(note="somebody waits")
    assert fence(backend, work, held)
    work.commit()


@mysql
def test_a_release_after_renewals_is_seen_at_the_commit(
    backend: Backend, work: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    write(acquired_at=-5 * SECOND)
    snap(work)
    assert backend.renew(connection, [held])["me"]
    for _ in range(2):  # written again, it is found and counts once
        assert backend.release(work, held, alone=False)
    assert stored().owner == "me"
    work.commit()
    row = stored()
    assert (row.owner, row.ttl) == ("", 0)
    assert 5 * SECOND <= row.total_hold < 6 * SECOND
    take(backend, "you")


@mysql
def test_a_guarded_lease_is_extended_before_the_commit(
    backend: Backend, work: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    snap(work)
    before = backend.renew(connection, [held])["me"]
    assert before is not None
    assert backend.guard(work, held)
    after = backend.renew(work, [held], pinned=True)["me"]
    assert after is not None
    assert after > before
    work.commit()
    assert stored().expires_at == after


def test_the_transaction_keeps_its_snapshot(
    backend: Backend, work: BaseDatabaseWrapper, fence: Fence, level: str
) -> None:
    """The lock's own row is read past it, and nothing else is."""
    held = take(backend)
    write("m", note="old")
    snap(work)
    write("m", note="new")
    assert backend.renew(connection, [held])["me"]
    assert fence(backend, work, held)
    read = f"SELECT note FROM {TABLE} WHERE name = 'm'"
    if level != "SERIALIZABLE + snapshot":
        assert query(read, on=work) == [("old" if has_snapshot(level) else "new",)]
    if "+ snapshot" in level:
        with pytest.raises(DatabaseError, match="1020"):
            query(f"{read} LOCK IN SHARE MODE", on=work)


@pytest.mark.parametrize("stolen", [False, True])
def test_a_release_of_its_own_that_had_to_wait_is_told_what_became_of_it(
    backend: Backend, level: str, stolen: bool
) -> None:
    """In autocommit; above READ COMMITTED an error comes of it, and then it is sent again."""
    held = take(backend)
    with session() as mine, session() as somebody:
        isolate(mine, level)
        with transaction(somebody):
            what = "owner = 'you', fencing_token = fencing_token + 1" if stolen else "note = 'mark'"
            execute(f"UPDATE {TABLE} SET {what} WHERE name = 'n'", on=somebody)
            commit = threading.Timer(0.3, somebody.commit)
            commit.start()
            try:
                assert backend.release(mine, held, alone=True) is not stolen
            finally:
                commit.join()
    assert stored().owner == ("you" if stolen else "")


# -- what has been lost --------------------------------------------------------------------------


@pytest.mark.parametrize("renewed", [False, True])
@pytest.mark.parametrize("ending", ["granted", "granted and released", "forced", "purged", "again"])
def test_a_loss_after_the_snapshot_is_noticed(
    backend: Backend, work: BaseDatabaseWrapper, fence: Fence, ending: str, renewed: bool
) -> None:
    held = take(backend)
    snap(work)
    if renewed:
        assert backend.renew(connection, [held])["me"]
    if ending == "forced":
        assert backend.force_release(connection, "n", 0, held.token)
    else:
        expire()
    if ending in ("purged", "again"):
        assert purge(backend) == 1
    if ending in ("granted", "granted and released", "again"):
        following = take(backend, "you")
        if ending == "granted and released":
            assert backend.release(connection, following, alone=True)
    assert not passes(fence, backend, work, held)


@mysql
@pytest.mark.parametrize("changed", [{"owner": "you"}, {"fencing_token": FAR}], ids=str)
def test_a_guard_checks_owner_and_token_as_they_are_now(
    backend: Backend, work: BaseDatabaseWrapper, changed: dict[str, str | int]
) -> None:
    held = take(backend)
    snap(work)
    write(**changed)
    assert not backend.guard(work, held)


@mysql
@pytest.mark.parametrize(
    "changed", [{"owner": "you"}, {"owner": "", "fencing_token": FAR}], ids=str
)
def test_a_release_checks_them_too(
    backend: Backend, work: BaseDatabaseWrapper, changed: dict[str, str | int]
) -> None:
    held = take(backend)
    snap(work)
    write(**changed)
    before = stored()
    assert not backend.release(work, held, alone=False)
    work.commit()
    assert stored() == before


def test_a_snapshot_from_before_the_grant_does_not_pass(
    backend: Backend, work: BaseDatabaseWrapper, fence: Fence, level: str
) -> None:
    """What it has read may be older than what the last holder wrote."""
    take(backend, "last")
    snap(work)
    expire()
    held = take(backend)
    assert passes(fence, backend, work, held) == (not has_snapshot(level))


# -- other names, other sessions -----------------------------------------------------------------


def test_new_names_beside_a_fenced_one_are_granted(
    backend: Backend, work: BaseDatabaseWrapper, fence: Fence, level: str
) -> None:
    """At SERIALIZABLE MariaDB locks the gap before each row: see Note [Old snapshots]."""
    new = f"{fence.__name__} {level}"  # InnoDB still looks at rows that were deleted a moment ago
    for name in ("a", "z"):
        write(f"{new} {name}", owner="somebody", expires_at=MINUTE)
    held = take(backend, "me", f"{new} m")
    snap(work)
    assert backend.renew(connection, [held])["me"]
    assert fence(backend, work, held)
    before = [] if connection.vendor == "mysql" and "SERIALIZABLE" in level else ["b", "l"]
    for name in (*before, "mm", "n", "zz"):
        with within(0.5):
            take(backend, "you", f"{new} {name}")


def test_a_pin_is_said_to_be_one_and_not_waited_for(
    backend: Backend, work: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    snap(work)
    with pinned(), within(0.5):
        assert backend.trace(work, held) is Trace.PINNED
        with pytest.raises(Pinned):
            backend.force_release(work, "n", 0, held.token)
    work.rollback()
    assert backend.force_release(work, "n", 0, held.token)


@mysql
def test_force_works_after_a_renewal(backend: Backend, work: BaseDatabaseWrapper) -> None:
    held = take(backend)
    snap(work)
    assert backend.renew(connection, [held])["me"]
    token = backend.force_release(work, "n", 0, held.token)
    work.commit()
    assert (stored().owner, stored().fencing_token) == ("", token)


@mysql
@pytest.mark.parametrize("level", ["REPEATABLE READ", "REPEATABLE READ + snapshot"], indirect=True)
def test_a_purge_raises_a_mark_that_was_raised_after_its_snapshot(
    backend: Backend, work: BaseDatabaseWrapper
) -> None:
    for number in range(2):
        write(f"n{number}", expires_at=-SECOND, fencing_token=FAR + number)
    write("", fencing_token=1)
    snap(work)
    assert backend.purge(connection, 0, 0, 1)
    assert stored("").fencing_token == FAR
    assert purge(backend, on=work) == 1
    work.commit()
    assert stored("").fencing_token == FAR + 1
