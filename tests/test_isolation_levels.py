"""Which isolation level a transaction has, however it was set, and what a lock refuses in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction

from distlock import Lease, LockError, LockLost, lock
from distlock.backends.base import error_code
from tests.app.models import Counter
from tests.isolation import (
    ABOVE,
    LEVELS,
    has_snapshot,
    mysql,
    options,
    postgresql,
    set_level,
    set_options,
    snap,
    told_losses,
)
from tests.support import in_thread, is_free, other_session, row, steal

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.vendor("postgresql", "mysql"),
]

REFUSED = (
    r"^A lock cannot be taken inside a REPEATABLE READ or SERIALIZABLE transaction: .*"
    r"Take the lock first, or use READ COMMITTED\.$"
)
RENEWED = 0.5
"""Seconds after which a lease of 0.6 seconds has been renewed."""

fences = pytest.mark.parametrize("fence", [Lease.guard, Lease.release], ids=["guard", "release"])
Fence = Callable[[Lease], None]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every new connection has that level, as OPTIONS would give it."""
    with set_level(request.param):
        yield request.param


@pytest.fixture
def losses() -> Iterator[list[str]]:
    """The reasons of the losses that are told."""
    with told_losses() as told:
        yield told


def run(sql: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(sql)


# -- acquiring in a snapshot -------------------------------------------------------------

WAYS: dict[str, Callable[[], object]] = {
    "acquire": lambda: lock("x").acquire(),
    "acquire without end": lambda: lock("x").acquire(wait=None),
    "try_acquire": lambda: lock("x").try_acquire(),
    "with": lambda: lock("x").__enter__(),
    "decorator": lambda: lock("x")(lambda: None)(),
    "skip": lambda: lock("x", on_busy="skip")(lambda: None)(),
    "held by another": lambda: (steal("x"), lock("x", wait=0).acquire()),
}


@pytest.mark.parametrize("level", ABOVE, indirect=True)
@pytest.mark.parametrize("begun", [False, True], ids=["first", "after a read"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_lock_is_not_taken_in_a_snapshot(
    level: str, way: Callable[[], object], begun: bool
) -> None:
    """However it is tried; the error says what to do, and the transaction goes on."""
    with transaction.atomic():
        if begun:
            snap()
        with pytest.raises(LockError, match=REFUSED) as caught:
            way()
        Counter.objects.create(name="c", value=1)
    assert type(caught.value) is LockError
    assert Counter.objects.filter(name="c").exists()


def test_a_lock_is_taken_without_one() -> None:
    with set_level("READ COMMITTED"), transaction.atomic():
        snap()
        with lock("x"):
            pass
    assert is_free("x")


def test_what_needs_no_acquisition_is_not_refused(level: str) -> None:
    described = lock("x", reentrant=True)
    with described as outer, transaction.atomic():
        snap()
        with described as inner:
            assert inner.token == outer.token
        holder = described.holder()
        assert holder is not None
        assert holder.owner == outer.owner
        outer.renew()
        outer.check()
    assert is_free("x")


@fences
def test_a_snapshot_from_before_the_grant_is_refused_and_nothing_is_lost(
    level: str, fence: Fence, losses: list[str]
) -> None:
    """A lease from another thread, that was taken when this transaction was under way."""
    in_thread(lambda: lock("x").acquire().release())
    leases: list[Lease] = []
    refused: AbstractContextManager[Any] = nullcontext()
    if has_snapshot(level):
        refused = pytest.raises(
            LockError, match=r"The snapshot .* Take the lock first, or use READ"
        )
    with refused as caught, transaction.atomic():
        snap()
        leases.append(in_thread(lambda: lock("x").acquire()))
        Counter.objects.create(name="c", value=1)
        fence(leases[0])
    assert Counter.objects.exists() is not has_snapshot(level)
    assert losses == []
    if has_snapshot(level):
        assert type(caught.value) is LockError
        leases[0].check()
        assert not is_free("x")
    leases[0].release()
    assert is_free("x")


def test_a_swallowed_refusal_of_a_release_does_not_commit() -> None:
    in_thread(lambda: lock("x").acquire().release())
    with set_level("REPEATABLE READ"):
        with pytest.raises(LockError), transaction.atomic():
            snap()
            lease = in_thread(lambda: lock("x").acquire())
            Counter.objects.create(name="c", value=1)
            with pytest.raises(LockError):
                lease.release()
        assert not Counter.objects.exists()
        lease.release()
    assert is_free("x")


# -- however the level was set -----------------------------------------------------------


@contextmanager
def set_for_role() -> Iterator[None]:
    run("ALTER ROLE CURRENT_USER SET default_transaction_isolation = 'repeatable read'")
    try:
        with set_options():
            yield
    finally:
        run("ALTER ROLE CURRENT_USER RESET default_transaction_isolation")


@contextmanager
def set_for_database() -> Iterator[None]:
    name = connection.ops.quote_name(connection.settings_dict["NAME"])
    run(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    try:
        with set_options():
            yield
    finally:
        run(f"ALTER DATABASE {name} RESET default_transaction_isolation")


@contextmanager
def set_for_session(statement: str) -> Iterator[None]:
    with set_options():
        run(statement)
        yield


@contextmanager
def set_by_the_server() -> Iterator[None]:
    """Nothing in OPTIONS: the default of the server, which is REPEATABLE READ."""
    with set_options(isolation_level=None):
        yield


SESSION = "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL"
DEFAULTS = [
    pytest.param(set_for_role, marks=postgresql, id="role"),
    pytest.param(set_for_database, marks=postgresql, id="database"),
    pytest.param(
        lambda: set_for_session(f"{SESSION} SERIALIZABLE"), marks=postgresql, id="session"
    ),
    pytest.param(
        lambda: set_for_session("SET default_transaction_isolation = 'repeatable read'"),
        marks=postgresql,
        id="setting",
    ),
    pytest.param(
        lambda: set_options(options="-c default_transaction_isolation=serializable"),
        marks=postgresql,
        id="startup",
    ),
    pytest.param(lambda: set_level("REPEATABLE READ"), id="OPTIONS"),
    pytest.param(
        lambda: set_for_session("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ"),
        marks=mysql,
        id="SET SESSION",
    ),
    pytest.param(
        lambda: set_for_session("SET SESSION tx_isolation = 'SERIALIZABLE'"),
        marks=mysql,
        id="variable",
    ),
    pytest.param(set_by_the_server, marks=mysql, id="server"),
    pytest.param(
        lambda: set_options(
            isolation_level=None, init_command="SET SESSION tx_isolation = 'SERIALIZABLE'"
        ),
        marks=mysql,
        id="init_command",
    ),
]
defaults = pytest.mark.parametrize("setting", DEFAULTS)
Setting = Callable[[], AbstractContextManager[None]]


@defaults
def test_a_default_level_is_noticed_by_an_acquire(setting: Setting) -> None:
    with setting(), transaction.atomic():
        with pytest.raises(LockError, match=REFUSED):
            lock("x").acquire()
    assert is_free("x")


@defaults
def test_a_default_level_is_noticed_by_a_release(setting: Setting, losses: list[str]) -> None:
    """A renewal after the snapshot would otherwise break it on PostgreSQL."""
    with setting():
        with lock("x", ttl=0.6, atomic=True):
            snap()
            before = row("x")["expires_at"]
            Counter.objects.create(name="c", value=1)
            time.sleep(RENEWED)
            assert row("x")["expires_at"] > before, "it was never renewed, so this proves nothing"
        assert Counter.objects.filter(name="c").exists()
        assert losses == []
    assert is_free("x")


@defaults
def test_the_private_connection_has_a_level_of_its_own(setting: Setting) -> None:
    """Else what it asks would come from old snapshots, or wait."""
    with setting():
        lease = lock("x", ttl=0.6).acquire()
        with transaction.atomic():
            snap()
            time.sleep(RENEWED)
            in_thread(lambda: lock("y").acquire().release())
            lease.renew(ttl=30)
            holder = lock("x").holder()
            assert holder is not None
            assert holder.expires_at == lease.expires_at
        lease.release()


@postgresql
def test_read_committed_in_options_stands_against_another_default() -> None:
    with set_for_role(), set_level("READ COMMITTED"), transaction.atomic(), lock("x"):
        pass
    assert is_free("x")


@mysql
def test_read_committed_stands_unless_options_say_otherwise() -> None:
    with other_session() as cursor:
        cursor.execute("SELECT @@GLOBAL.tx_isolation")
        assert cursor.fetchone() == ("REPEATABLE-READ",), "the server's default"
    assert "isolation_level" not in connection.settings_dict["OPTIONS"]
    with transaction.atomic(), lock("x"):
        pass
    assert is_free("x")


# -- by hand, which is the user's own affair ---------------------------------------------


@contextmanager
def snapshot_by_hand() -> Iterator[None]:
    """A REPEATABLE READ transaction that nothing but its own statement tells of."""
    if connection.vendor == "mysql":
        run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    with transaction.atomic():
        if connection.vendor == "postgresql":
            run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        snap()
        yield


@fences
def test_a_level_set_by_hand_costs_no_lease(fence: Fence, losses: list[str]) -> None:
    """PostgreSQL refuses the release of a row that was renewed: an error, and never a loss."""
    fails = connection.vendor == "postgresql" and fence is Lease.release
    lease = lock("x", ttl=0.6).acquire()
    expected: AbstractContextManager[Any] = nullcontext()
    if fails:
        expected = pytest.raises(DatabaseError)
    with expected as caught, snapshot_by_hand():
        Counter.objects.create(name="c", value=1)
        time.sleep(RENEWED)
        fence(lease)
    assert losses == []
    assert Counter.objects.exists() is not fails
    if fails:
        assert error_code(caught.value) == "40001"
        lease.check()
    lease.release()
    assert is_free("x")


@mysql
@fences
def test_nor_does_it_with_snapshot_isolation(fence: Fence, losses: list[str]) -> None:
    with set_options(**options("READ COMMITTED + snapshot")):
        test_a_level_set_by_hand_costs_no_lease(fence, losses)


@fences
def test_a_level_set_by_hand_misses_no_loss(fence: Fence) -> None:
    with pytest.raises(DatabaseError) as caught, lock("x", renew=False) as lease:
        with snapshot_by_hand():
            Counter.objects.create(name="c", value=1)
            steal("x")
            fence(lease)
    assert isinstance(caught.value, LockLost) or error_code(caught.value) == "40001"
    assert not Counter.objects.exists()
