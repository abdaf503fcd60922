"""Lines that safety hangs on, and that no other test would miss.

Each test here fails when one of them is dropped or weakened: tests/torture/mutations.py does that.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import OperationalError, connection, connections, transaction
from django.test import TestCase
from django.test.utils import CaptureQueriesContext

from distlock import CommitOutcomeUnknown, LockBusy, LockLost, lock
from distlock.backends import backend_for
from distlock.backends.base import TABLE, Pinned, Trace
from distlock.connections import private
from distlock.places import Place
from distlock.signals import lock_lost
from tests.app.models import Counter
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

Answer = Callable[..., Any]


class Boom(Exception):
    pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Answer], None]]:
    """Replace a verb of the store: the replacement gets the real one first."""
    backend = backend_for(connection)

    def replace(verb: str, answer: Answer) -> None:
        real = getattr(backend, verb)
        monkeypatch.setattr(backend, verb, lambda *args, **more: answer(real, *args, **more))

    yield replace
    monkeypatch.undo()


def failing(times: int, error: type[BaseException] = OperationalError) -> Answer:
    """Raise so often, then answer."""
    left = iter(range(times))

    def answer(real: Answer, *args: Any, **more: Any) -> Any:
        if next(left, None) is not None:
            raise error("no answer")
        return real(*args, **more)

    return answer


def slow(real: Answer, *args: Any, **more: Any) -> Any:
    """Answer, but let the answer take its time."""
    found = real(*args, **more)
    time.sleep(0.5)
    return found


def nothing_was_committed() -> bool:
    return in_thread(lambda: not Counter.objects.exists())


# -- the release as a fence ----------------------------------------------------------------------


@servers
def test_a_release_that_could_not_be_written_is_the_fence_all_the_same() -> None:
    with pytest.raises(LockLost), transaction.atomic():
        Counter.objects.create(name="c", value=1)
        with lock("x", renew=False):
            transaction.set_rollback(True)
        transaction.set_rollback(False)
        steal("x")
    assert nothing_was_committed()


@servers
def test_a_release_that_could_not_be_written_is_written_before_commit() -> None:
    with transaction.atomic():
        with lock("x", ttl=60):
            transaction.set_rollback(True)
        transaction.set_rollback(False)
        Counter.objects.create(name="c", value=1)
    assert is_free("x")
    assert not nothing_was_committed()


@postgresql
def test_a_release_in_a_transaction_that_failed_is_written_when_that_is_repaired() -> None:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SAVEPOINT by_hand")
        with lock("x", ttl=60):
            with contextlib.suppress(Exception):
                cursor.cursor.execute("SELECT nonsense")
        cursor.execute("ROLLBACK TO SAVEPOINT by_hand")
        assert not is_free("x")
    assert is_free("x")


@servers
def test_an_interrupted_release_is_written_before_commit(store: Any) -> None:
    with transaction.atomic():
        lease = lock("x", ttl=60).acquire()
        store("release", failing(1, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lease.release()
        Counter.objects.create(name="c", value=1)
    assert is_free("x")
    assert not nothing_was_committed()


@servers
def test_a_release_that_was_interrupted_at_once_is_written_before_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the transaction knew of it."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with transaction.atomic():
        lease = lock("x", ttl=60).acquire()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("distlock.leases.warn_about_others", interrupted)
            lease.release()
        Counter.objects.create(name="c", value=1)
    assert is_free("x")
    assert not nothing_was_committed()


@servers
def test_an_interrupted_release_is_the_fence_all_the_same(store: Any) -> None:
    with pytest.raises(LockLost), transaction.atomic():
        Counter.objects.create(name="c", value=1)
        lease = lock("x", ttl=60, renew=False).acquire()
        store("release", failing(1, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lease.release()
        steal("x")
    assert nothing_was_committed()


@servers
def test_an_atomic_body_is_fenced_before_its_commit() -> None:
    """The release is the last statement of the transaction, not the first one after it."""
    with pytest.raises(LockLost):
        with lock("x", atomic=True, renew=False):
            Counter.objects.create(name="c", value=1)
            steal("x")
    assert nothing_was_committed()


@mysql
def test_turning_autocommit_on_is_a_commit_and_refused_like_one() -> None:
    transaction.set_autocommit(False)
    try:
        Counter.objects.create(name="c", value=1)
        with contextlib.suppress(LockLost), lock("x", renew=False):
            steal("x")
        with pytest.raises(LockLost):
            transaction.set_autocommit(True)
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)
    assert nothing_was_committed()


@servers
@pytest.mark.parametrize("method", ["rollback", "_rollback"])
def test_an_interrupted_rollback_commits_nothing(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Django goes on to set_autocommit(True), which commits on MariaDB."""
    wrapper = type(connections["default"])

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), transaction.atomic():
        with lock("x", ttl=60):
            Counter.objects.create(name="c", value=1)
        monkeypatch.setattr(wrapper, method, interrupted)
        raise Boom
    monkeypatch.undo()
    assert becomes_free("x", 2)
    assert nothing_was_committed()


@servers
def test_an_interrupted_rollback_by_hand_keeps_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not have been sent: turning autocommit on would commit on MariaDB."""
    wrapper = type(connections["default"])

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    transaction.set_autocommit(False)
    try:
        with lock("x", ttl=60):
            Counter.objects.create(name="c", value=1)
        with monkeypatch.context() as patch:
            patch.setattr(wrapper, "_rollback", interrupted)
            with pytest.raises(KeyboardInterrupt):
                transaction.rollback()
        assert becomes_free("x", 2)
        transaction.set_autocommit(True)
        assert nothing_was_committed()
    finally:
        connection.close()


@servers
def test_a_rollback_by_hand_that_meets_an_error_keeps_no_lock() -> None:
    transaction.set_autocommit(False)
    try:
        with lock("x", ttl=60):
            pass
        kill_session()
        with pytest.raises(OperationalError):
            transaction.rollback()
        assert becomes_free("x", 2)
    finally:
        connection.close()


# -- a COMMIT whose answer is lost ---------------------------------------------------------------


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Let the session end during the next COMMIT: before the server has done it, or after."""
    wrapper = type(connections["default"])
    real, plan = wrapper._commit, iter(())

    def commit(self: Any) -> None:
        for arrives, meanwhile in plan:
            if arrives:
                real(self)
            kill_session()
            meanwhile()
            raise OperationalError("the connection is lost")
        real(self)

    def next_commit(*, arrives: bool, meanwhile: Callable[[], None] = lambda: None) -> None:
        nonlocal plan
        plan = iter([(arrives, meanwhile)])

    monkeypatch.setattr(wrapper, "_commit", commit)
    yield next_commit
    monkeypatch.undo()
    connection.close()


@servers
@pytest.mark.parametrize("atomic", [False, True])
def test_a_commit_that_took_effect_is_a_commit(deaf: Any, atomic: bool) -> None:
    ran: list[int] = []
    with contextlib.nullcontext() if atomic else transaction.atomic():
        with lock("x", ttl=60, atomic=atomic):
            Counter.objects.create(name="c", value=1)
            transaction.on_commit(lambda: ran.append(1))
            deaf(arrives=True)
    assert ran == [1]
    assert is_free("x")
    assert not nothing_was_committed()


@servers
def test_a_commit_that_never_arrived_is_an_error(deaf: Any) -> None:
    ran: list[int] = []
    with pytest.raises(OperationalError), transaction.atomic():
        with lock("x", ttl=60):
            Counter.objects.create(name="c", value=1)
            transaction.on_commit(lambda: ran.append(1))
        deaf(arrives=False)
    assert ran == []
    assert becomes_free("x", 2)
    assert nothing_was_committed()


@servers
def test_a_commit_that_was_never_sent_did_not_happen_whatever_the_row_says(store: Any) -> None:
    """An interrupt came before it, and there is nothing that anybody has to be asked."""
    lease = lock("x", ttl=60).acquire()
    store("trace", lambda *_: Trace.GONE)
    with pytest.raises(KeyboardInterrupt), transaction.atomic():
        lease.release()
        store("transaction_failed", failing(1, KeyboardInterrupt))
    lease.check()
    assert not is_free("x")
    lease.release()


@servers
@pytest.mark.parametrize("arrives", [True, False])
def test_a_commit_that_nobody_can_tell_of_is_said_to_be_one(deaf: Any, arrives: bool) -> None:
    """The row has gone on to somebody else: neither a success nor a failure."""
    with pytest.raises(CommitOutcomeUnknown), transaction.atomic():
        with lock("x", ttl=60):
            Counter.objects.create(name="c", value=1)
        deaf(arrives=arrives, meanwhile=lambda: steal("x"))
    assert nothing_was_committed() is not arrives


@servers
def test_a_pin_is_waited_for_before_the_row_is_asked(deaf: Any) -> None:
    """As long as the server has not ended the session, a COMMIT may still be on the wire."""
    blocker = connections.create_connection("default")
    blocker.settings_dict = connection.settings_dict
    cursor = blocker.cursor()

    def pin() -> None:
        cursor.execute("BEGIN")
        cursor.execute(f"SELECT 1 FROM {TABLE} WHERE name = 'x' FOR UPDATE")
        threading.Timer(0.4, lambda: cursor.execute("ROLLBACK")).start()

    blocker.inc_thread_sharing()
    try:
        with transaction.atomic():
            with lock("x", ttl=60):
                Counter.objects.create(name="c", value=1)
            deaf(arrives=True, meanwhile=pin)
    finally:
        blocker.close()
    assert not nothing_was_committed()
    assert is_free("x")


# -- the guard -----------------------------------------------------------------------------------


@servers
def test_a_lease_whose_trust_ran_out_is_not_guarded() -> None:
    """Though nobody has taken the lock: somebody may have read what it protects."""
    lease = lock("x", ttl=0.2, renew=False).acquire()
    time.sleep(0.3)
    with pytest.raises(LockLost), transaction.atomic():
        Counter.objects.create(name="c", value=1)
        with contextlib.suppress(LockLost):
            lease.guard()
    assert nothing_was_committed()


@servers
def test_a_released_lease_is_not_guarded() -> None:
    lease = lock("x").acquire()
    lease.release()
    with transaction.atomic(), pytest.raises(LockLost, match="released"):
        lease.guard()


@mysql
def test_a_guarded_lease_that_ddl_let_go_is_looked_for_before_commit() -> None:
    lease = lock("x").acquire()
    with pytest.raises(LockLost), transaction.atomic():
        lease.guard()
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE fence_probe (id int)")
            cursor.execute("DROP TABLE fence_probe")
        steal("x")
        Counter.objects.create(name="c", value=1)
    assert nothing_was_committed()
    with pytest.raises(LockLost):
        lease.release()


@servers
def test_a_guard_renews_no_lease_that_is_to_end() -> None:
    lease = lock("x", ttl=5, renew=False).acquire()
    before = row("x")["expires_at"]
    with transaction.atomic():
        lease.guard()
    assert row("x")["expires_at"] == before
    lease.release()


@servers
def test_a_guarded_lease_is_renewed_again_after_the_transaction() -> None:
    with lock("x", ttl=0.6) as lease:
        with transaction.atomic():
            lease.guard()
        time.sleep(1.2)
        lease.check()
        assert not is_free("x")


class GuardInTestCase(TestCase):
    databases = {"default", "other"}

    def test_a_lost_lease_is_not_guarded(self) -> None:
        lease = lock("x", renew=False).acquire()
        with connection.cursor() as cursor:
            cursor.execute(f"UPDATE {TABLE} SET owner = 'thief' WHERE name = 'x'")
        with transaction.atomic(), pytest.raises(LockLost):
            lease.guard()
        with pytest.raises(LockLost):
            lease.release()


@servers
def test_an_outlived_lease_cannot_commit_though_its_loss_is_swallowed() -> None:
    """Nobody has taken the lock, but somebody may have read what it protects, and gone."""
    with pytest.raises(LockLost), transaction.atomic():
        Counter.objects.create(name="c", value=1)
        with contextlib.suppress(LockLost), lock("x", ttl=0.2, renew=False):
            time.sleep(0.3)
    assert nothing_was_committed()


@servers
def test_a_lease_given_back_by_a_rollback_can_be_lost_again() -> None:
    """The release pinned the row; after the rollback nothing does."""
    lease = lock("x", ttl=0.4, renew=False).acquire()
    with contextlib.suppress(Boom), transaction.atomic():
        lease.release()
        raise Boom
    assert not lease.lost
    time.sleep(0.5)
    assert lease.lost
    with pytest.raises(LockLost):
        lease.release()


@servers
def test_a_lost_lease_is_not_adopted() -> None:
    with pytest.raises(LockLost), transaction.atomic():
        with contextlib.suppress(LockLost), lock("x", renew=False):
            steal("x")
        with pytest.raises(LockBusy):
            lock("x", wait=0).acquire()


# -- what must not stay locked -------------------------------------------------------------------


@servers
def test_a_row_that_is_pinned_at_the_rollback_is_freed_later() -> None:
    lock("x").acquire().release()
    with other_session() as cursor:
        with contextlib.suppress(Boom), transaction.atomic():
            with lock("x", ttl=60):
                transaction.set_rollback(True)  # so that the release is not written
            cursor.execute("BEGIN")
            cursor.execute(f"SELECT 1 FROM {TABLE} WHERE name = 'x' FOR UPDATE")
            raise Boom
        time.sleep(0.2)
        assert not is_free("x")
        cursor.execute("ROLLBACK")
    assert becomes_free("x", 2)


@servers
@pytest.mark.parametrize("times", [1, 4])
def test_a_row_that_could_not_be_freed_is_freed_later(store: Any, times: int) -> None:
    store("free", failing(times))
    with contextlib.suppress(Boom), transaction.atomic():
        with lock("x", ttl=60):
            pass
        raise Boom
    assert becomes_free("x", 2)


@servers
def test_an_interrupt_amid_the_end_forgets_no_lock(store: Any) -> None:
    store("free", failing(1, KeyboardInterrupt))
    with pytest.raises((KeyboardInterrupt, Boom)), transaction.atomic():
        for name in ("x", "y", "z"):
            with lock(name, ttl=60):
                pass
        raise Boom
    for name in ("x", "y", "z"):
        assert becomes_free(name, 2)


@servers
def test_a_renewal_under_way_does_not_take_a_release_for_a_loss(store: Any) -> None:
    under_way, released, answered = threading.Event(), threading.Event(), threading.Event()
    lost: list[str] = []

    def renew(real: Answer, *args: Any, **more: Any) -> Any:
        under_way.set()
        assert released.wait(5)
        found = real(*args, **more)
        answered.set()
        return found

    def release(real: Answer, *args: Any, **more: Any) -> Any:
        found = real(*args, **more)
        released.set()
        assert answered.wait(5)
        time.sleep(0.2)  # the keeper looks at the answer
        return found

    lease = lock("x", ttl=3).acquire()
    store("renew", renew)
    store("release", release)
    lock_lost.connect(receiver := lambda reason, **kwargs: lost.append(reason))
    try:
        assert under_way.wait(5)
        lease.release()
    finally:
        lock_lost.disconnect(receiver)
    assert lost == []


def test_two_threads_that_release_at_once_release_once(store: Any) -> None:
    sent: list[str] = []

    def release(real: Answer, *args: Any, **more: Any) -> Any:
        sent.append(threading.current_thread().name)
        if len(sent) == 1:
            in_thread(lease.release)
        return real(*args, **more)

    lease = lock("x", ttl=60).acquire()
    store("release", release)
    lease.release()
    assert len(sent) == 1
    assert is_free("x")


def test_a_release_without_an_answer_is_repeated(store: Any) -> None:
    lease = lock("x", ttl=60).acquire()
    store("release", failing(1))
    lease.release()
    assert becomes_free("x", 2)


def test_a_release_that_cannot_be_finished_is_renewed_no_more(store: Any) -> None:
    """The keeper goes on trying to free the row; until then the ttl is what ends the lease."""
    lease = lock("x", ttl=0.9).acquire()
    store("release", failing(1))
    store("free", failing(1000))
    lease.release()
    assert becomes_free("x", 2)


def test_an_atomic_block_that_cannot_begin_keeps_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Any) -> None:
        raise OperationalError("no answer")

    with pytest.raises(OperationalError):
        with monkeypatch.context() as patch:
            patch.setattr(transaction.Atomic, "__enter__", refused)
            with lock("x", ttl=60, atomic=True):
                pytest.fail("the body ran without a transaction")
    assert is_free("x")


@servers
def test_an_atomic_block_that_cannot_commit_keeps_no_lock() -> None:
    with pytest.raises(OperationalError), lock("x", ttl=60, atomic=True):
        Counter.objects.create(name="c", value=1)
        kill_session()
    assert becomes_free("x", 2)
    assert nothing_was_committed()


# -- trust ---------------------------------------------------------------------------------------


def test_trust_in_a_grant_runs_from_the_request(store: Any) -> None:
    store("grant", slow)
    lease = lock("x", ttl=2, renew=False).acquire()
    assert lease.remaining < 1.5
    lease.release()


def test_trust_in_a_grant_runs_from_the_last_request() -> None:
    lease = lock("x").acquire()
    threading.Timer(0.5, lambda: (lease.release(), connections.close_all())).start()

    def wait() -> float:
        with lock("x", ttl=2, wait=5) as second:
            return second.remaining

    assert in_thread(wait) > 1.6


def test_trust_in_a_renewal_runs_from_the_request(store: Any) -> None:
    lease = lock("x", ttl=2).acquire()
    store("renew", slow)
    lease.renew()
    assert lease.remaining < 1.5
    lease.release()


def test_trust_in_a_renewal_of_the_keeper_runs_from_the_request(store: Any) -> None:
    lease = lock("x", ttl=3).acquire()
    first = lease.expires_at
    store("renew", slow)
    deadline = time.monotonic() + 5
    while lease.expires_at == first:
        assert time.monotonic() < deadline, "it was never renewed"
        time.sleep(0.005)
    assert lease.remaining < 2.5
    lease.release()


def test_a_loss_is_told_once_and_stays_one() -> None:
    told: list[str] = []
    lock_lost.connect(receiver := lambda reason, **kwargs: told.append(reason))
    try:
        lease = lock("x", ttl=0.2, renew=False).acquire()
        time.sleep(0.3)
        assert lease.lost
        with pytest.raises(LockLost):
            lease.release()
        assert lease.lost
        with pytest.raises(LockLost):
            lease.check()
        time.sleep(0.2)
    finally:
        lock_lost.disconnect(receiver)
    assert told == ["the lease was not renewed in time"]


def test_a_failing_release_does_not_hide_the_exception_of_the_body(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: Any, statement: Any) -> Any:
        raise RuntimeError

    with pytest.raises(Boom), lock("x", ttl=60):
        monkeypatch.setattr(Place, "run", fail)
        raise Boom
    monkeypatch.undo()
    assert becomes_free("x", 2)


# -- statements ----------------------------------------------------------------------------------


@postgresql
@pytest.mark.parametrize(
    ("options", "waits"), [({}, True), ({"atomic": True}, False), ({"crash_safe": False}, False)]
)
def test_a_grant_waits_for_the_disk_where_it_has_to(options: dict[str, bool], waits: bool) -> None:
    with CaptureQueriesContext(connection) as queries:
        with lock("x", **options):
            pass
    grants = [query["sql"] for query in queries if "INSERT INTO" in query["sql"]]
    assert len(grants) == 1
    assert ("synchronous_commit" not in grants[0]) is waits


@pytest.mark.parametrize("inside", [False, pytest.param(True, marks=servers)])
def test_a_grant_that_somebody_else_came_before_is_tried_again(store: Any, inside: bool) -> None:
    store("grant", failing(1, Pinned))
    with transaction.atomic() if inside else contextlib.nullcontext(), lock("x", wait=5):
        pass
    assert is_free("x")


@servers
def test_an_acquire_on_a_session_that_is_gone_opens_another() -> None:
    lock("x").acquire().release()
    kill_session()
    with lock("x", ttl=60):
        assert not is_free("x")
        kill_session()
    assert is_free("x")


@servers
def test_an_acquire_in_a_transaction_outlives_the_private_session() -> None:
    with transaction.atomic(), lock("x"):
        pass
    with private("default").use() as own, own.cursor() as cursor:
        postgres = own.vendor == "postgresql"
        cursor.execute("SELECT pg_backend_pid()" if postgres else "SELECT CONNECTION_ID()")
        session = cursor.fetchone()[0]
    with other_session() as cursor:
        cursor.execute(f"SELECT pg_terminate_backend({session})" if postgres else f"KILL {session}")
    time.sleep(0.1)
    with transaction.atomic():
        with lock("x", wait=0):
            pass
    assert is_free("x")
