"""`look`: what those who wait for locks are told of them, and the mark that they leave."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.db.backends.base.base import BaseDatabaseWrapper

from distlock.backends.base import Backend

from .rows import (
    MINUTE,
    SECOND,
    TABLE,
    execute,
    expire,
    pinned,
    query,
    session,
    stored,
    take,
    within,
    write,
)

HOSTILE = "näme %s {} \\ ' "


def test_a_held_lock_says_how_long_and_with_which_token(backend: Backend) -> None:
    held = take(backend)
    seen = backend.look(connection, [("n", 0)])["n", 0]
    assert seen.token == held.token
    assert MINUTE - 5 * SECOND < seen.time_left <= MINUTE
    assert seen.wanted is backend.notifies


def test_a_free_lock_has_no_time_left(backend: Backend) -> None:
    held = take(backend)
    backend.release(connection, held, alone=True)
    assert backend.look(connection, [("n", 0)])["n", 0].time_left == 0
    take(backend, "you", "m")
    expire("m")
    assert backend.look(connection, [("m", 0)])["m", 0].time_left == 0


def test_a_lock_that_was_released_before_the_clock_was_set_back_is_free(backend: Backend) -> None:
    held = take(backend)
    backend.release(connection, held, alone=True)
    write(expires_at=60 * MINUTE)
    assert backend.look(connection, [("n", 0)])["n", 0].time_left == 0


def test_a_lock_that_min_hold_keeps_is_not_free(backend: Backend) -> None:
    held = take(backend, min_hold=MINUTE)
    backend.release(connection, held, alone=True)
    assert backend.look(connection, [("n", 0)])["n", 0].time_left > MINUTE - 5 * SECOND


def test_many_are_seen_at_once_and_each_for_itself(backend: Backend) -> None:
    first = take(backend, name="a", ttl=MINUTE)
    second = take(backend, name="a", slot=1, ttl=2 * MINUTE)
    third = take(backend, name=HOSTILE, ttl=3 * MINUTE)
    take(backend, name="c")
    seen = backend.look(connection, [("a", 0), ("a", 1), (HOSTILE, 0), ("nothing", 0)])
    assert {key: one.token for key, one in seen.items()} == {
        ("a", 0): first.token,
        ("a", 1): second.token,
        (HOSTILE, 0): third.token,
    }
    minutes = [round(one.time_left / MINUTE) for one in seen.values()]
    assert sorted(minutes) == [1, 2, 3]


def test_a_look_takes_nothing_from_the_holder(backend: Backend) -> None:
    held = take(backend)
    before = stored()
    backend.look(connection, [("n", 0)])
    after = stored()
    assert (after.owner, after.fencing_token, after.expires_at) == (
        before.owner,
        before.fencing_token,
        before.expires_at,
    )
    assert backend.renew(connection, [held])["me"]
    assert backend.release(connection, held, alone=True)


@pytest.mark.vendor("postgresql", "mysql")
def test_a_look_at_a_pinned_row_does_not_wait(backend: Backend) -> None:
    take(backend)
    with pinned(), within(0.5):
        seen = backend.look(connection, [("n", 0)])["n", 0]
    assert seen.time_left > 0
    assert not seen.wanted


# -- the mark: see Note [Wanted] -----------------------------------------------------------------


def mark() -> datetime:
    found: datetime = query(f"SELECT wanted_until FROM {TABLE} WHERE name = 'n'")[0][0]
    return found


def version() -> Any:
    """What changes whenever the row is written."""
    return query(f"SELECT xmin, ctid FROM {TABLE} WHERE name = 'n'")


@pytest.fixture
def listening(backend: Backend) -> Iterator[BaseDatabaseWrapper]:
    with session() as other:
        assert backend.listen(other)
        yield other


def heard(backend: Backend, listening: BaseDatabaseWrapper) -> list[tuple[str, int]]:
    """What has been said by now: the answer to a statement comes after all messages before it."""
    query("SELECT 1", on=listening)
    return backend.heard(listening)


marks = pytest.mark.vendor("postgresql")
native = pytest.mark.backends("PostgreSQL")


@marks
@native
def test_the_mark_outlasts_the_lease_by_a_second(backend: Backend) -> None:
    take(backend)
    seen = backend.look(connection, [("n", 0)])["n", 0]
    assert query(f"SELECT wanted_until - expires_at FROM {TABLE}") == [(timedelta(seconds=1),)]
    assert seen.wanted


@marks
@native
def test_a_mark_that_lasts_is_not_written_again(backend: Backend) -> None:
    take(backend)
    backend.look(connection, [("n", 0)])
    before = version()
    assert backend.look(connection, [("n", 0)])["n", 0].wanted
    assert version() == before


@marks
@native
def test_a_mark_that_the_lease_has_outgrown_is_moved_on(backend: Backend) -> None:
    held = take(backend, ttl=SECOND)
    backend.look(connection, [("n", 0)])
    before = mark()
    backend.renew(connection, [held], 10 * MINUTE)
    assert backend.look(connection, [("n", 0)])["n", 0].wanted
    assert mark() > before


@marks
@native
def test_a_free_lock_is_not_marked(backend: Backend) -> None:
    held = take(backend)
    backend.release(connection, held, alone=True)
    before = mark()
    backend.look(connection, [("n", 0)])
    assert mark() == before


@marks
@native
def test_a_mark_passes_the_guard_of_a_transaction(backend: Backend) -> None:
    take(backend)
    with pinned(lock="FOR KEY SHARE"), within(0.5):
        assert backend.look(connection, [("n", 0)])["n", 0].wanted


@marks
@native
@pytest.mark.parametrize("way", ["alone", "not alone", "free", "force"])
def test_a_release_tells_those_who_listen_if_somebody_waits(
    backend: Backend, listening: BaseDatabaseWrapper, way: str
) -> None:
    held = take(backend, name=HOSTILE, slot=3)
    unwanted = take(backend, "you", "m")
    backend.look(connection, [(HOSTILE, 3)])
    for lease in (held, unwanted):
        if way == "free":
            backend.free(connection, lease)
        elif way == "force":
            backend.force_release(connection, lease.name, lease.slot, lease.token)
        else:
            backend.release(connection, lease, alone=way == "alone")
    assert heard(backend, listening) == [(HOSTILE, 3)]


@marks
@native
def test_a_renewal_that_lets_the_lease_end_sooner_tells_of_it(
    backend: Backend, listening: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    backend.look(connection, [("n", 0)])
    backend.renew(connection, [held], 2 * MINUTE)
    assert heard(backend, listening) == []
    backend.renew(connection, [held], SECOND)
    assert heard(backend, listening) == [("n", 0)]


@marks
@native
def test_nothing_is_marked_where_nobody_listens(backend: Backend) -> None:
    take(backend)
    before = version()
    assert not backend.look(connection, [("n", 0)], mark=False)["n", 0].wanted
    assert version() == before


@marks
@native
def test_a_mark_that_has_run_out_tells_nobody(
    backend: Backend, listening: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    backend.look(connection, [("n", 0)])
    execute(f"UPDATE {TABLE} SET wanted_until = clock_timestamp()")
    backend.release(connection, held, alone=True)
    assert heard(backend, listening) == []


@marks
@native
def test_a_message_that_came_to_an_idle_session_is_heard(
    backend: Backend, listening: BaseDatabaseWrapper
) -> None:
    held = take(backend)
    backend.look(connection, [("n", 0)])
    assert backend.heard(listening) == []
    backend.release(connection, held, alone=True)
    with within(2):
        while not (messages := backend.heard(listening)):
            pass
    assert messages == [("n", 0)]


@marks
@native
def test_a_grant_keeps_the_mark(backend: Backend) -> None:
    held = take(backend)
    backend.look(connection, [("n", 0)])
    before = mark()
    backend.release(connection, held, alone=True)
    take(backend, "you")
    assert mark() == before


@pytest.mark.vendor("pgbouncer")
@native
def test_a_session_that_a_pooler_shares_out_cannot_listen(backend: Backend) -> None:
    with session() as other:
        assert not backend.listen(other)
        assert query("SELECT pg_listening_channels()", on=other) == []
