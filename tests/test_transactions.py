"""A lock and the end of somebody else's transaction."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import (
    DatabaseError,
    IntegrityError,
    InternalError,
    connection,
    connections,
    transaction,
)
from django.test import RequestFactory

from distlock import Lease, LockError, LockLost, lock
from distlock.connections import private
from distlock.signals import lock_lost, lock_released
from tests.app.models import Counter, Ticket
from tests.support import (
    becomes_free,
    in_thread,
    is_free,
    kill_session,
    other_session,
    row,
    steal,
)

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")
postgresql = pytest.mark.vendor("postgresql")
mysql = pytest.mark.vendor("mysql")


@pytest.fixture(autouse=True)
def usable_afterwards() -> Iterator[None]:
    """Whatever happened, the connection serves the next transaction, and no hook is left over."""
    yield
    ran: list[int] = []
    with transaction.atomic():
        Counter.objects.create(name="afterwards", value=1)
        transaction.on_commit(lambda: ran.append(1))
    assert ran == [1]
    assert in_thread(lambda: Counter.objects.filter(name="afterwards").count()) == 1


class Boom(Exception):
    pass


def held_by_others_view(name: str) -> None:
    """Another thread must not get it; on SQLite nobody else could even ask meanwhile."""
    if connection.vendor != "sqlite":
        assert not is_free(name)


# -- commit ----------------------------------------------------------------------------


def test_held_until_commit_and_free_right_after() -> None:
    with transaction.atomic():
        with lock("x"):
            Counter.objects.create(name="c", value=1)
        held_by_others_view("x")
    assert is_free("x")


def test_held_until_the_outermost_block_ends() -> None:
    with transaction.atomic(durable=True):
        with transaction.atomic():
            with transaction.atomic(), lock("x"):
                pass
            held_by_others_view("x")
        held_by_others_view("x")
    assert is_free("x")


@servers  # SQLite gives LockBusy at once inside a transaction
def test_no_update_is_lost_when_the_lock_is_inside_the_transaction() -> None:
    Counter.objects.create(name="c", value=0)

    def add() -> None:
        for _ in range(10):
            with transaction.atomic(), lock("c", wait=30):
                counter = Counter.objects.get(name="c")
                time.sleep(0.001)
                counter.value += 1
                counter.save()
        connections.close_all()

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert Counter.objects.get(name="c").value == 40


# -- rollback --------------------------------------------------------------------------


def test_exception_after_the_block_frees() -> None:
    with pytest.raises(Boom), transaction.atomic():
        with lock("x"):
            pass
        raise Boom
    assert is_free("x")


def test_exception_inside_the_block_frees() -> None:
    with pytest.raises(Boom), transaction.atomic(), lock("x"):
        raise Boom
    assert is_free("x")


def test_database_error_inside_the_block_frees() -> None:
    Counter.objects.create(name="c", value=1)
    with pytest.raises(IntegrityError), transaction.atomic(), lock("x"):
        Counter.objects.create(name="c", value=1)
    assert is_free("x")


def test_set_rollback_frees() -> None:
    with transaction.atomic():
        with lock("x"):
            pass
        transaction.set_rollback(True)
    assert is_free("x")


def test_set_rollback_inside_the_block_frees() -> None:
    with transaction.atomic(), lock("x"):
        transaction.set_rollback(True)
    assert is_free("x")


@servers
def test_failure_at_commit_frees() -> None:
    """PostgreSQL: a deferred constraint. MariaDB has none, so there the COMMIT is refused."""
    if connection.vendor == "postgresql":
        with pytest.raises(IntegrityError), transaction.atomic():
            with lock("x"):
                Ticket.objects.create(counter_id=4711, note="nobody")
        assert is_free("x")
    else:
        with pytest.raises(DatabaseError), transaction.atomic():
            with lock("x"):
                pass
            kill_session()
        assert becomes_free("x")


# -- savepoints ------------------------------------------------------------------------


def test_savepoint_rollback_around_the_lock_keeps_it_until_the_end() -> None:
    with transaction.atomic():
        with pytest.raises(Boom), transaction.atomic():
            with lock("x"):
                pass
            raise Boom
        held_by_others_view("x")
    assert is_free("x")


@servers
def test_savepoint_rollback_of_the_release_writes_it_again() -> None:
    with transaction.atomic():
        lease = lock("x", ttl=0.6).acquire()
        with pytest.raises(Boom), transaction.atomic():
            lease.release()
            raise Boom
        time.sleep(0.8)  # nobody renews it: it is pinned by the release written again
        assert not is_free("x")
        assert not lease.lost
    assert is_free("x")


@servers
def test_release_in_a_failed_savepoint_is_written_when_that_is_over() -> None:
    Counter.objects.create(name="c", value=1)
    with transaction.atomic():
        with pytest.raises(IntegrityError), transaction.atomic(), lock("x", ttl=0.6):
            Counter.objects.create(name="c", value=1)
        time.sleep(0.8)
        assert not is_free("x")
    assert is_free("x")


@postgresql  # InnoDB keeps a row lock when it rolls back to a savepoint
def test_loss_during_a_savepoint_rollback_cannot_commit() -> None:
    with pytest.raises(LockLost), transaction.atomic():
        Counter.objects.create(name="work", value=1)
        lease = lock("x", renew=False).acquire()
        sid = connection.savepoint()  # the function of this name is deprecated
        lease.release()
        connection.cursor().execute(connection.ops.savepoint_rollback_sql(sid))  # behind our back
        steal("x")
        transaction.savepoint_rollback(sid)
    assert not Counter.objects.filter(name="work").exists()


# -- before and after ------------------------------------------------------------------


def test_lease_taken_before_is_its_holders_again_after_rollback() -> None:
    lease = lock("x").acquire()
    with pytest.raises(Boom), transaction.atomic():
        lease.release()
        raise Boom
    assert not lease.lost
    lease.check()
    assert not is_free("x")
    lease.release()
    assert is_free("x")


def test_lease_taken_before_and_released_inside_is_free_after_commit() -> None:
    lease = lock("x").acquire()
    with transaction.atomic():
        lease.release()
        held_by_others_view("x")
    assert is_free("x")
    lease.release()


@servers
@pytest.mark.parametrize("fails", [False, True])
def test_lease_not_released_inside_survives(fails: bool) -> None:
    with pytest.raises(Boom) if fails else transaction.atomic(), transaction.atomic():
        lease = lock("x").acquire()
        if fails:
            raise Boom
    assert not is_free("x")
    lease.release()
    assert is_free("x")


def test_taking_it_again_adopts_what_the_transaction_holds() -> None:
    with transaction.atomic():
        with lock("x", wait=0) as first:
            pass
        with lock("x", wait=0) as second:
            assert second.token == first.token
            assert not second.lost
        held_by_others_view("x")
    assert is_free("x")


def end_by_commit() -> None:
    with transaction.atomic(), lock("x"):
        pass


def end_by_set_rollback() -> None:
    with transaction.atomic(), lock("x"):
        transaction.set_rollback(True)


def end_by_exception() -> None:
    with contextlib.suppress(Boom), transaction.atomic(), lock("x"):
        raise Boom


def end_by_commit_after_a_savepoint_rollback() -> None:
    with transaction.atomic(), contextlib.suppress(Boom), transaction.atomic(), lock("x"):
        raise Boom


def end_by_hand() -> None:
    transaction.set_autocommit(False)
    with lock("x"):
        pass
    transaction.rollback()
    transaction.set_autocommit(True)


@servers
@pytest.mark.parametrize(
    ("end", "statements"),
    [
        (end_by_commit, 0),
        (end_by_set_rollback, 1),
        (end_by_exception, 1),
        (end_by_commit_after_a_savepoint_rollback, 0),
        (end_by_hand, 1),
    ],
)
def test_freeing_takes_one_round_trip_at_most(end: Callable[[], None], statements: int) -> None:
    """Nothing is sent after COMMIT, and one statement after ROLLBACK, besides the grant."""
    end_by_commit()
    sent: list[str] = []

    def count(run: Any, sql: str, *arguments: Any) -> Any:
        sent.append(sql)
        return run(sql, *arguments)

    opened = private("default")._connection
    assert opened is not None
    with opened.execute_wrapper(count):
        end()
    assert is_free("x")
    assert len(sent) == 1 + statements, sent


# -- by hand, and cut off --------------------------------------------------------------


@servers
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_transaction_opened_by_hand_counts(end: str) -> None:
    transaction.set_autocommit(False)
    try:
        with lock("x"):
            Counter.objects.create(name="c", value=1)
        assert not is_free("x")
        getattr(transaction, end)()
        assert is_free("x")
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)
    assert Counter.objects.filter(name="c").exists() is (end == "commit")


@servers
def test_close_frees_within_half_a_second() -> None:
    try:
        with transaction.atomic():
            with lock("x"):
                pass
            connection.close()
            assert becomes_free("x", 0.5)
    except DatabaseError:
        pass
    assert is_free("x")


@servers
@pytest.mark.parametrize("then", ["statement", "commit"])
def test_killed_session_frees(then: str) -> None:
    with pytest.raises(DatabaseError), transaction.atomic():
        with lock("x"):
            Counter.objects.create(name="c", value=1)
        kill_session()
        if then == "statement":
            Counter.objects.count()
    assert becomes_free("x")
    assert not Counter.objects.filter(name="c").exists()


@servers
def test_killed_session_inside_the_block_frees() -> None:
    with pytest.raises(DatabaseError), transaction.atomic(), lock("x"):
        kill_session()
        Counter.objects.count()
    assert becomes_free("x")


@postgresql
def test_swallowed_error_is_not_taken_for_a_commit() -> None:
    """B-4: PostgreSQL answers such a COMMIT with ROLLBACK, and Django takes it for a commit."""
    ran: list[int] = []
    with pytest.raises(InternalError, match="Nothing was committed"), transaction.atomic():
        transaction.on_commit(lambda: ran.append(1))
        with lock("x"):
            Counter.objects.create(name="c", value=1)
        with connection.cursor() as cursor:
            with pytest.raises(Exception, match="nonsense"):
                cursor.cursor.execute("SELECT nonsense")
    assert ran == []
    assert not Counter.objects.filter(name="c").exists()
    assert is_free("x")


def test_a_neighbours_callback_that_raises_changes_nothing() -> None:
    def fail() -> None:
        raise Boom

    with pytest.raises(Boom), transaction.atomic():
        transaction.on_commit(fail)
        with lock("x"):
            pass
    assert is_free("x")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Boom])
def test_interrupt_just_before_commit(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B-1, B-2: Django goes on to set_autocommit(True), which commits on MariaDB and SQLite."""
    public = connections["default"]
    wrapper = type(public)
    real = wrapper._commit

    def interrupted(self: Any) -> None:
        if self is public:
            raise error
        real(self)

    ran: list[int] = []
    with pytest.raises(error), transaction.atomic():
        with lock("x"):
            Counter.objects.create(name="c", value=1)
        transaction.on_commit(lambda: ran.append(1))
        monkeypatch.setattr(wrapper, "_commit", interrupted)
    monkeypatch.setattr(wrapper, "_commit", real)
    assert not Counter.objects.filter(name="c").exists()
    assert ran == []
    assert becomes_free("x")


# -- the fence -------------------------------------------------------------------------


@servers
def test_lost_lock_cannot_commit_even_if_swallowed() -> None:
    with pytest.raises(LockLost), transaction.atomic():
        Counter.objects.create(name="c", value=1)
        try:
            with lock("x", renew=False):
                steal("x")
        except LockLost:
            pass
    assert not Counter.objects.exists()
    assert row("x")["owner"] != ""


@servers
def test_lost_lock_cannot_commit_though_a_savepoint_clears_the_mark() -> None:
    with pytest.raises(LockLost), transaction.atomic():
        Counter.objects.create(name="c", value=1)
        try:
            with transaction.atomic(), lock("x", renew=False):
                steal("x")
        except LockLost:
            pass
    assert not Counter.objects.exists()


@servers
def test_outlived_lease_cannot_commit() -> None:
    with pytest.raises(LockLost), transaction.atomic():
        Counter.objects.create(name="c", value=1)
        with lock("x", ttl=0.2, renew=False):
            time.sleep(0.3)
    assert not Counter.objects.exists()


# -- isolation -------------------------------------------------------------------------


@pytest.fixture
def repeatable_read() -> Iterator[None]:
    """This thread's connection at REPEATABLE READ, as OPTIONS or the server would set it."""
    level = "SESSION CHARACTERISTICS AS TRANSACTION"
    if connection.vendor == "mysql":
        level = "SESSION TRANSACTION"
    connection.close()
    with connection.cursor() as cursor:
        cursor.execute(f"SET {level} ISOLATION LEVEL REPEATABLE READ")
    yield
    connection.close()


@servers
def test_acquire_in_a_snapshot_is_refused(repeatable_read: None) -> None:
    with transaction.atomic():
        Counter.objects.count()
        with pytest.raises(LockError, match="REPEATABLE READ"):
            lock("x").acquire()
    assert is_free("x")


@servers
def test_renewals_after_the_snapshot_do_not_break_the_release(repeatable_read: None) -> None:
    with lock("x", ttl=0.6, atomic=True) as lease:
        Counter.objects.create(name="c", value=1)
        before = lease.expires_at
        time.sleep(1)
        assert lease.expires_at > before, "it was never renewed, so this proves nothing"
    assert Counter.objects.filter(name="c").exists()
    assert is_free("x")


@servers
def test_loss_in_a_snapshot_cannot_commit(repeatable_read: None) -> None:
    with pytest.raises(DatabaseError), lock("x", renew=False, atomic=True):
        Counter.objects.create(name="c", value=1)
        steal("x")
    assert not Counter.objects.exists()


# -- atomic=True -----------------------------------------------------------------------


def test_atomic_commits_work_and_release_together() -> None:
    with lock("x", atomic=True) as lease:
        assert connection.in_atomic_block
        Counter.objects.create(name="c", value=1)
        held_by_others_view("x")
    assert is_free("x")
    assert Counter.objects.filter(name="c").exists()
    lease.release()


def test_atomic_rolls_back_and_frees() -> None:
    with pytest.raises(Boom), lock("x", atomic=True):
        Counter.objects.create(name="c", value=1)
        raise Boom
    assert is_free("x")
    assert not Counter.objects.filter(name="c").exists()


def test_atomic_with_set_rollback_frees() -> None:
    with lock("x", atomic=True):
        Counter.objects.create(name="c", value=1)
        transaction.set_rollback(True)
    assert is_free("x")
    assert not Counter.objects.filter(name="c").exists()


@servers
def test_atomic_holder_that_lost_cannot_commit() -> None:
    with pytest.raises(LockLost), lock("x", atomic=True, renew=False):
        Counter.objects.create(name="c", value=1)
        steal("x")
    assert not Counter.objects.filter(name="c").exists()


@postgresql
def test_atomic_failing_at_commit_frees() -> None:
    with pytest.raises(IntegrityError), lock("x", atomic=True):
        Ticket.objects.create(counter_id=4711, note="nobody")
    assert is_free("x")


def test_atomic_inside_a_transaction_is_refused() -> None:
    with transaction.atomic():
        with pytest.raises(RuntimeError, match="atomic=True"), lock("x", atomic=True):
            pass
    assert is_free("x")


def test_atomic_as_a_decorator() -> None:
    @lock("x", atomic=True)
    def work() -> bool:
        return connection.in_atomic_block

    assert work() is True
    assert is_free("x")


# -- guard -----------------------------------------------------------------------------


@servers
def test_guard_keeps_every_later_holder_out_until_the_end() -> None:
    lease = lock("x", ttl=0.4, renew=False).acquire()
    with transaction.atomic():
        lease.guard()
        time.sleep(0.6)
        assert not is_free("x")
    assert is_free("x")
    with pytest.raises(LockLost):
        lease.release()


@servers
def test_guarded_body_of_three_ttl_ends_without_loss() -> None:
    with lock("x", ttl=0.5) as lease:
        with transaction.atomic():
            lease.guard()
            time.sleep(1.5)
            assert not lease.lost
        time.sleep(0.4)
        assert not lease.lost
    assert is_free("x")


@servers
def test_guard_of_a_lost_lease_poisons() -> None:
    lease = lock("x", renew=False).acquire()
    with pytest.raises(LockLost), transaction.atomic():
        Counter.objects.create(name="c", value=1)
        steal("x")
        with contextlib.suppress(LockLost):
            lease.guard()
    assert not Counter.objects.exists()


def test_guard_outside_a_transaction_is_an_error() -> None:
    with lock("x") as lease, pytest.raises(RuntimeError, match="transaction"):
        lease.guard()


@servers
def test_guard_is_taken_again_after_a_savepoint_rollback() -> None:
    lease = lock("x", ttl=0.4, renew=False).acquire()
    with transaction.atomic():
        with pytest.raises(Boom), transaction.atomic():
            lease.guard()
            raise Boom
        time.sleep(0.6)
        assert not is_free("x")
    with pytest.raises(LockLost):
        lease.release()


# -- where the transaction is ----------------------------------------------------------


def test_atomic_requests() -> None:
    """A view that raises frees; one that returns frees after its commit."""
    from django.core.handlers.base import BaseHandler
    from django.http import HttpResponse

    seen: list[bool] = []

    def view(request: Any) -> HttpResponse:
        with lock("x"):
            pass
        seen.append(connection.in_atomic_block)
        if request.GET.get("fail"):
            raise Boom
        return HttpResponse("ok")

    connection.settings_dict["ATOMIC_REQUESTS"] = True
    try:
        wrapped = BaseHandler().make_view_atomic(view)
        assert wrapped(RequestFactory().get("/")).status_code == 200
        assert is_free("x")
        with pytest.raises(Boom):
            wrapped(RequestFactory().get("/?fail=1"))
        assert is_free("x")
    finally:
        connection.settings_dict["ATOMIC_REQUESTS"] = False
    assert seen == [True, True]


@servers
def test_work_on_another_alias_is_not_fenced_and_says_so() -> None:
    with transaction.atomic(using="other"), transaction.atomic():
        with pytest.warns(RuntimeWarning, match="'other'"), lock("x"):
            pass


@postgresql
def test_another_search_path_is_refused() -> None:
    with connection.cursor() as cursor:
        cursor.execute("CREATE SCHEMA tenant")
        cursor.execute(
            "CREATE TABLE tenant.distlock_distributedlock (LIKE distlock_distributedlock)"
        )
    try:
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL search_path TO tenant, public")
            with pytest.raises(LockError, match="search_path"):
                lock("x").acquire()
        assert is_free("x")
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP SCHEMA tenant CASCADE")


@mysql
def test_ddl_that_commits_silently_is_noticed() -> None:
    """MySQL ends the transaction at a DDL statement; the rest must not commit without the lock."""
    with pytest.raises(LockLost), transaction.atomic():
        with lock("x", renew=False):
            pass
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE ddl_probe (id int)")
            cursor.execute("DROP TABLE ddl_probe")
        in_thread(lambda: lock("x", ttl=60, renew=False).acquire().__setattr__("_released", True))
        Counter.objects.create(name="c", value=1)
    assert not Counter.objects.exists()


@postgresql
def test_release_in_a_transaction_leaves_its_durability_alone() -> None:
    with transaction.atomic():
        with lock("x"):
            pass
        with connection.cursor() as cursor:
            cursor.execute("SHOW synchronous_commit")
            assert cursor.fetchone() == ("on",)
    with lock("x", atomic=True) as lease:
        lease.release()
        with connection.cursor() as cursor:
            cursor.execute("SHOW synchronous_commit")
            assert cursor.fetchone() == ("on",)


# -- signals ---------------------------------------------------------------------------


def test_released_is_told_once_the_commit_is_a_fact() -> None:
    told: list[tuple[str, bool]] = []

    def receive(lease: Lease, **kwargs: Any) -> None:
        Counter.objects.count()  # a receiver may use the connection
        told.append((lease.name, connection.in_atomic_block))

    lock_released.connect(receive)
    try:
        with transaction.atomic():
            with lock("x"):
                pass
            assert told == []
        assert told == [("x", False)]
        with pytest.raises(Boom), transaction.atomic():
            with lock("y"):
                pass
            raise Boom
        assert told == [("x", False), ("y", False)]
    finally:
        lock_released.disconnect(receive)


@servers
def test_lost_is_told_once() -> None:
    told: list[str] = []

    def receive(lease: Lease, reason: str, **kwargs: Any) -> None:
        told.append(reason)

    lock_lost.connect(receive)
    try:
        with pytest.raises(LockLost), transaction.atomic(), lock("x", renew=False):
            steal("x")
        time.sleep(0.2)
        assert len(told) == 1
    finally:
        lock_lost.disconnect(receive)


@servers
def test_a_row_in_use_elsewhere_is_only_busy() -> None:
    lock("x").acquire().release()
    with other_session() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT 1 FROM distlock_distributedlock WHERE name = 'x' FOR UPDATE")
        start = time.monotonic()
        assert lock("x").try_acquire() is None
        with transaction.atomic():
            assert lock("x").try_acquire() is None
        assert time.monotonic() - start < 0.9
        cursor.execute("ROLLBACK")
