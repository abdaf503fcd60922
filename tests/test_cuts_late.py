"""A COMMIT that is late, or whose outcome nothing can tell."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from django.db import connections, transaction

from distlock import CommitOutcomeUnknown, lock
from distlock.backends.base import TABLE
from tests.app.models import Counter
from tests.cuts import (
    ALIAS,
    COMMIT,
    LONG,
    SHORT,
    SOON,
    Form,
    Work,
    atomic,
    before,
    beside,
    eventually,
    forms,
    fresh_name,
    inside,
    warm,
)
from tests.proxy import Hold, Proxy
from tests.support import becomes_free, is_free, other_session

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "other"]),
    pytest.mark.vendor("postgresql", "mysql"),
    pytest.mark.slow,
    pytest.mark.usefixtures("nothing_is_lost"),
]


# -- a COMMIT that is late ---------------------------------------------------------------------


def waiter(work: Work, seen: list[bool]) -> Callable[[], None]:
    """Wait for the lock past the proxy, and see whether the work is there when it is granted."""

    def wait() -> None:
        with lock(work.name, wait=30, renew=False):
            seen.append(Counter.objects.filter(name=work.name).exists())

    return wait


@pytest.mark.parametrize(
    ("form", "ttl"), [(inside, LONG), (atomic, LONG), (before, LONG), (inside, SHORT)]
)
@pytest.mark.parametrize("end", ["deliver", "drop"])
def test_nobody_is_granted_the_lock_while_a_commit_may_arrive(
    proxy: Proxy, form: Form, ttl: float, end: str
) -> None:
    warm()
    work, seen = Work(fresh_name(), ttl), []
    held = proxy.disturb(Hold(COMMIT))
    with beside(lambda: work.do(form)):
        held.cut_client()
    assert isinstance(work.error, CommitOutcomeUnknown)
    with beside(waiter(work, seen)):
        assert not is_free(work.name)
        time.sleep(0.5)
        assert seen == []
        getattr(held, end)()
        assert eventually(lambda: seen, SOON)
    assert seen == [end == "deliver"]
    assert work.ran == []
    work.check_the_next()


def test_an_unknown_outcome_costs_no_other_lease(proxy: Proxy) -> None:
    """Whoever looks whether the row is free yet does not wait for its transaction."""
    warm()
    work = Work(fresh_name())
    held = proxy.disturb(Hold(COMMIT))
    with beside(lambda: work.do(inside)):
        held.cut_client()
    assert isinstance(work.error, CommitOutcomeUnknown)
    with lock(fresh_name(), ttl=0.9, using=ALIAS) as lease:
        time.sleep(2)
        assert not is_free(work.name)
        lease.check()
    held.drop()
    assert becomes_free(work.name, SOON)


@forms
@pytest.mark.parametrize("end", ["deliver", "drop"])
def test_a_commit_that_is_only_slow_is_waited_for(proxy: Proxy, form: Form, end: str) -> None:
    warm()
    work = Work(fresh_name())
    held = proxy.disturb(Hold(COMMIT))
    with beside(lambda: work.do(form)):
        held.cut_client()
        time.sleep(0.4)
        assert not is_free(work.name)
        getattr(held, end)()
    assert not isinstance(work.error, CommitOutcomeUnknown), repr(work.error)
    assert (work.error is None) is (end == "deliver")
    assert becomes_free(work.name, SOON)
    work.check()
    work.check_the_next()


# -- what cannot be told -----------------------------------------------------------------------


@forms
@pytest.mark.parametrize("moves", ["granted", "released", "purged"])
def test_a_row_that_has_moved_on_tells_nothing(proxy: Proxy, form: Form, moves: str) -> None:
    warm()
    work = Work(fresh_name())
    held = proxy.disturb(Hold(COMMIT, answer=True))
    with beside(lambda: work.do(form)):
        held.wait()
        with lock(work.name, wait=SOON):
            if moves == "granted":
                held.drop()
                assert eventually(lambda: work.error or work.ran, 20)
        if moves == "purged":
            with other_session() as cursor:
                cursor.execute(f"DELETE FROM {TABLE} WHERE name = %s", [work.name])
        held.drop()
    assert isinstance(work.error, CommitOutcomeUnknown)
    assert work.written
    work.check()
    assert becomes_free(work.name, SOON)
    work.check_the_next()


def guarded(work: Work) -> None:
    with work.lock() as lease:
        with transaction.atomic(using=ALIAS):
            lease.guard()
            work.write()


def at_repeatable_read(work: Work) -> None:
    with connections[ALIAS].cursor() as cursor:
        cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    atomic(work)


@pytest.mark.parametrize(
    "form",
    [guarded, pytest.param(at_repeatable_read, marks=pytest.mark.vendor("postgresql"))],
)
@pytest.mark.parametrize("answer", [False, True])
def test_without_a_release_in_it_nothing_is_known(proxy: Proxy, form: Form, answer: bool) -> None:
    warm()
    work = Work(fresh_name())
    held = proxy.disturb(Hold(COMMIT, answer=answer))
    with beside(lambda: work.do(form)):
        held.drop()
    assert isinstance(work.error, CommitOutcomeUnknown)
    work.check()
    assert work.written is answer
    assert becomes_free(work.name, SOON)
    connections[ALIAS].close()
    work.check_the_next()
