from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from django.db import DatabaseError, connection
from django.db.backends.base.base import BaseDatabaseWrapper

from distlock.backends.base import Backend
from distlock.models import NAMED, DistributedLock
from tests.conformance.rows import (
    FAR,
    LIMIT,
    MINUTE,
    SECOND,
    TABLE,
    claim,
    execute,
    expire,
    pinned,
    purge,
    query,
    session,
    stored,
    take,
    together,
    transaction,
    within,
    write,
)

T = TypeVar("T")


def names() -> list[str]:
    """The rows that are there, the reserved one left out."""
    return [row[0] for row in query(f"SELECT name FROM {TABLE} WHERE name <> '' ORDER BY id")]


def test_rows_that_ended_long_ago_are_deleted(backend: Backend, mode: str) -> None:
    for name, ago in (("old", 61), ("older", 3600), ("recent", 59)):
        take(backend, "me", name)
        expire(name, ago=ago * SECOND)
    take(backend, "me", "live")
    write("kept by min_hold", owner="", expires_at=MINUTE)
    assert purge(backend, MINUTE) == 2
    assert names() == ["recent", "live", "kept by min_hold"]
    assert purge(backend, MINUTE) == 0


def test_with_no_age_everything_that_is_not_held_is_deleted(backend: Backend, mode: str) -> None:
    for name in ("a", "b"):
        take(backend, "me", name)
    expire("a", ago=0)
    held = take(backend, "you", "c")
    backend.release(connection, held, alone=mode == "autocommit")
    assert purge(backend) == 2
    assert names() == ["b"]


def test_batches_go_on_in_order_of_id(backend: Backend, mode: str) -> None:
    for number in range(7):
        write(f"n{number}", expires_at=-SECOND)
    ids = [row[0] for row in query(f"SELECT id FROM {TABLE} ORDER BY id")]
    assert backend.purge(connection, 0, 0, 3) == (3, ids[2])
    assert backend.purge(connection, 0, ids[3], 2) == (2, ids[5])
    assert names() == ["n3", "n6"]
    assert backend.purge(connection, 0, ids[2], 10) == (2, ids[6])
    assert backend.purge(connection, 0, 0, 10) is None


def test_an_empty_table_has_nothing_to_purge_and_gets_no_reserved_row(
    backend: Backend, mode: str
) -> None:
    assert backend.purge(connection, 0, 0, 10) is None
    take(backend)
    assert backend.purge(connection, 0, 0, 10) is None
    assert stored("") is None


# -- the high-water mark -------------------------------------------------------------------------


def test_tokens_go_on_above_what_was_purged(backend: Backend, mode: str) -> None:
    take(backend)
    write(fencing_token=FAR, expires_at=-SECOND)
    assert purge(backend) == 1
    assert stored() is None
    assert take(backend).token == FAR + 1
    assert take(backend, "me", "any new name").token == FAR + 1


def test_the_mark_is_the_highest_token_of_a_batch(backend: Backend, mode: str) -> None:
    for number, token in enumerate((FAR, FAR + 9, FAR + 5)):
        write(f"n{number}", fencing_token=token, expires_at=-SECOND)
    assert purge(backend) == 3
    assert stored("").fencing_token == FAR + 9


@pytest.mark.parametrize("first", ["low", "high"])
def test_several_purges_keep_the_maximum(backend: Backend, mode: str, first: str) -> None:
    tokens = {"low": 7, "high": FAR}
    for which in (first, "high" if first == "low" else "low"):
        write(fencing_token=tokens[which], expires_at=-SECOND)
        assert purge(backend) == 1
        assert stored("").fencing_token == max(tokens[which], stored("").fencing_token)
    assert stored("").fencing_token == FAR
    assert take(backend).token == FAR + 1


def test_an_existing_row_does_not_jump_to_the_mark(backend: Backend, mode: str) -> None:
    held = take(backend)
    write("gone", fencing_token=FAR, expires_at=-SECOND)
    assert purge(backend) == 1
    expire()
    assert held.token < take(backend, "you").token < FAR


def test_the_mark_and_the_deletion_are_one_transaction(
    backend: Backend, other: BaseDatabaseWrapper
) -> None:
    take(backend)
    write(fencing_token=FAR, expires_at=-SECOND)
    with transaction(other):
        assert purge(backend, on=other) == 1
        assert stored() is not None
        assert stored("") is None
    assert stored() is not None
    assert stored("") is None


def test_the_reserved_row_is_never_purged_held_or_shown(backend: Backend, mode: str) -> None:
    write(fencing_token=FAR, expires_at=-SECOND)
    assert purge(backend) == 1
    mark = stored("")
    assert (mark.name, mark.slot, mark.owner, mark.expires_at) == ("", 0, "", 0)
    assert purge(backend) == 0
    assert stored("") == mark
    assert backend.holder(connection, "", 0) is None
    assert backend.force_release(connection, "", 0, mark.fencing_token) is None
    assert list(DistributedLock.objects.filter(NAMED)) == []


# -- beside others -------------------------------------------------------------------------------


@pytest.mark.vendor("postgresql", "mysql")
def test_a_pinned_row_is_passed_over(backend: Backend) -> None:
    for number in range(3):
        write(f"n{number}", expires_at=-SECOND, fencing_token=FAR + number)
    with pinned("n1"), within(0.5):
        assert purge(backend, limit=1) == 2
    assert names() == ["n1"]
    assert purge(backend) == 1
    assert stored("").fencing_token == FAR + 2


@pytest.mark.vendor("postgresql", "mysql")
def test_a_row_that_is_being_purged_is_busy_and_its_neighbours_are_not(
    backend: Backend, other: BaseDatabaseWrapper
) -> None:
    # Names that no test had before: InnoDB still looks at rows that were deleted a moment ago.
    new = type(backend).__name__
    write("", fencing_token=1)
    for name in (f"{new} b", f"{new} d"):
        write(name, expires_at=-SECOND)
    write(f"{new} free", expires_at=MINUTE)
    with transaction(other):
        assert purge(backend, on=other) == 2
        expire(f"{new} free")
        with within(0.5):
            assert backend.grant(connection, claim(name=f"{new} b"), 0) is None
        for name in ("free", "a", "aa", "bb", "c", "e"):
            with within(0.5):
                take(backend, "me", f"{new} {name}")


def test_a_row_that_is_granted_between_two_statements_of_a_purge_stays(
    backend: Backend, other: BaseDatabaseWrapper
) -> None:
    for name in ("a", "b", "c"):
        write(name, expires_at=-SECOND)
    granted: list[object] = []
    looked: list[str] = []

    def come(run: Any, sql: str, *rest: Any) -> Any:
        if looked and not granted:
            granted.append(backend.grant(other, claim("you", "b"), 0))
        if "ORDER BY" in sql:
            looked.append(sql)
        return run(sql, *rest)

    with connection.execute_wrapper(come):
        count = purge(backend)
    kept = [name for name in names() if stored(name).owner == "you"]
    if count == 2:
        assert kept == names() == ["b"]
    else:  # one statement did it all, and then the name was granted anew
        assert (count, kept) == (3, ["b"])


def test_a_row_that_is_granted_meanwhile_is_not_purged(backend: Backend) -> None:
    """Several purge while others take the same names: no token is ever seen twice."""
    rounds, tokens, stop = 40, [], threading.Event()
    with session() as one, session() as two, session() as three:

        def sweep(on: BaseDatabaseWrapper) -> None:
            while not stop.is_set():
                retried(backend, lambda: purge(backend, limit=3, on=on))

        def use() -> None:
            try:
                for turn in range(rounds):
                    for name in ("a", "b", "c"):
                        token = retried(
                            backend, lambda name=name, turn=turn: once(backend, three, name, turn)
                        )
                        if token is not None:
                            tokens.append((name, token))
            finally:
                stop.set()

        together(lambda: sweep(one), lambda: sweep(two), use)
    assert len(tokens) > rounds
    for name in ("a", "b", "c"):
        mine = [token for each, token in tokens if each == name]
        assert mine == sorted(set(mine))


def once(backend: Backend, on: BaseDatabaseWrapper, name: str, turn: int) -> int | None:
    """Take a lock, see that it stays ours while others purge, and give it back."""
    grant = backend.grant(on, claim(f"owner {turn}", name), 0)
    if grant is None:
        return None
    row = stored(name, on=on)
    assert row is not None
    assert row.owner == f"owner {turn}"
    execute(
        f"UPDATE {TABLE} SET owner = '', expires_at = acquired_at WHERE name = %s", [name], on=on
    )
    return grant.token


def retried(backend: Backend, statement: Callable[[], T]) -> T | None:
    """Call again what met somebody else's locks."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        with suppress_contention(backend):
            return statement()
    return None


@contextmanager
def suppress_contention(backend: Backend) -> Iterator[None]:
    try:
        yield
    except DatabaseError as error:
        if not backend.is_contention(error):
            raise


@pytest.mark.vendor("postgresql", "mysql")
def test_the_first_two_purges_ever_may_run_at_the_same_time(
    backend: Backend, other: BaseDatabaseWrapper
) -> None:
    """Both want to make the reserved row."""
    for number in range(2):
        write(f"n{number}", expires_at=-SECOND, fencing_token=FAR - number)
    other.set_autocommit(False)
    assert backend.purge(other, 0, 0, 1)[0] == 1
    commit = threading.Timer(0.3, other.commit)
    commit.start()
    try:
        assert purge(backend) == 1
    finally:
        commit.join()
        other.set_autocommit(True)
    assert names() == []
    assert stored("").fencing_token == FAR


def test_a_batch_reads_no_more_rows_than_it_deletes(backend: Backend) -> None:
    """A table with a million rows that ended long ago must not be read once for every batch."""
    for number in range(20):
        write(f"n{number}", expires_at=-SECOND)
    read: list[int] = []

    def count(run: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:
        result = run(sql, parameters, many, context)
        read.append(context["cursor"].rowcount)
        return result

    with connection.execute_wrapper(count):
        assert backend.purge(connection, 0, 0, 5)[0] == 5
    assert max(read) <= 5
