from __future__ import annotations

import os
import socket
import threading
from contextlib import ExitStack
from typing import Any

import pytest
from django.db import connection
from django.db.backends.base.base import BaseDatabaseWrapper

from distlock.backends.base import Backend, Grant
from tests.conformance.rows import (
    FAR,
    MINUTE,
    SECOND,
    attempt,
    claim,
    execute,
    expire,
    now,
    session,
    stored,
    take,
    together,
    transaction,
    write,
)

pytestmark = pytest.mark.usetz


def test_a_free_name_is_granted(backend: Backend, mode: str) -> None:
    before = now()
    grant = backend.grant(connection, claim(), 0)
    after = now()
    assert grant is not None
    assert before <= grant.acquired_us <= after
    assert grant.expires_us == grant.acquired_us + MINUTE
    row = stored()
    assert (row.owner, row.fencing_token) == ("me", grant.token)
    assert (row.acquired_at, row.expires_at) == (grant.acquired_us, grant.expires_us)
    assert row.ttl == MINUTE


def test_a_held_name_is_refused_and_its_row_is_untouched(backend: Backend, mode: str) -> None:
    take(backend)
    before = stored()
    assert backend.grant(connection, claim("you"), 1.5) is None
    assert stored() == before


def test_a_row_with_an_owner_is_held_whatever_its_ttl(backend: Backend, mode: str) -> None:
    write(owner="by hand", ttl=0, expires_at=MINUTE)
    assert backend.grant(connection, claim(), 0) is None


def test_a_grant_in_autocommit_is_seen_by_others_at_once(
    backend: Backend, other: BaseDatabaseWrapper
) -> None:
    take(backend)
    assert stored(on=other).owner == "me"
    assert backend.grant(other, claim("you"), 0) is None


def test_an_expired_lease_is_granted_to_the_next(backend: Backend, mode: str) -> None:
    first = take(backend)
    expire()
    grant = backend.grant(connection, claim("you", ttl=2 * MINUTE), 0)
    assert grant is not None
    row = stored()
    assert (row.owner, row.fencing_token, row.ttl) == ("you", grant.token, 2 * MINUTE)
    assert (row.acquired_at, row.expires_at) == (grant.acquired_us, grant.expires_us)
    assert grant.expires_us - grant.acquired_us == 2 * MINUTE
    assert grant.token > first.token


def test_a_released_lock_is_granted_to_the_next(backend: Backend, mode: str) -> None:
    held = take(backend)
    assert backend.release(connection, held, alone=mode == "autocommit")
    assert take(backend, "you").token > held.token


def test_a_lease_that_ends_at_this_very_moment_is_free(backend: Backend) -> None:
    take(backend)
    write(expires_at=0)
    take(backend, "you")
    assert stored().owner == "you"


def test_another_name_and_another_slot_are_other_locks(backend: Backend, mode: str) -> None:
    take(backend, "me", "n", slot=0)
    take(backend, "you", "n", slot=1)
    take(backend, "she", "m", slot=0)
    assert [stored("n").owner, stored("n", 1).owner, stored("m").owner] == ["me", "you", "she"]
    expire("n", 1)
    take(backend, "he", "n", slot=1)
    assert [stored("n").owner, stored("n", 1).owner, stored("m").owner] == ["me", "he", "she"]


def test_one_owner_may_hold_several_locks(backend: Backend, mode: str) -> None:
    take(backend, "me", "n")
    take(backend, "me", "m")
    take(backend, "me", "n", slot=1)
    assert {stored("n").owner, stored("m").owner, stored("n", 1).owner} == {"me"}


def test_a_claim_that_resumes_passes_the_min_hold_of_its_own_thread(
    backend: Backend, mode: str
) -> None:
    held = take(backend, ttl=SECOND, min_hold=MINUTE, thread="job 1")
    backend.release(connection, held, alone=True)
    for refused in ({"thread": "job 1"}, {"thread": "job 2", "resumes": True}, {"resumes": True}):
        assert backend.grant(connection, claim("you", **refused), 0) is None
    again = backend.grant(connection, claim("you", thread="job 1", resumes=True), 0)
    assert again is not None
    assert again.token > held.token
    assert again.expires_us == again.acquired_us + MINUTE
    row = stored()
    assert (row.owner, row.fencing_token, row.losses) == ("you", again.token, 0)


def test_a_claim_that_resumes_does_not_take_what_its_own_thread_holds(
    backend: Backend, mode: str
) -> None:
    take(backend, thread="job 1")
    assert backend.grant(connection, claim("you", thread="job 1", resumes=True), 0) is None


def test_the_first_expiry_is_the_longer_of_ttl_and_min_hold(backend: Backend, mode: str) -> None:
    grant = backend.grant(connection, claim(ttl=SECOND, min_hold=MINUTE), 0)
    assert grant is not None
    assert grant.expires_us == grant.acquired_us + MINUTE
    assert stored().ttl == SECOND
    expire()
    grant = backend.grant(connection, claim("you", ttl=SECOND, min_hold=2 * MINUTE), 0)
    assert grant is not None
    assert grant.expires_us == grant.acquired_us + 2 * MINUTE == stored().expires_at
    assert stored().ttl == SECOND
    grant = backend.grant(connection, claim(name="m", ttl=MINUTE, min_hold=SECOND), 0)
    assert grant is not None
    assert grant.expires_us == grant.acquired_us + MINUTE


def test_the_row_says_who_holds_it(backend: Backend, mode: str) -> None:
    take(backend, note="why, \U0001f511", thread="task 7")
    row = stored()
    assert (row.host, row.pid) == (socket.gethostname()[:255], os.getpid())
    assert (row.thread, row.note) == ("task 7", "why, \U0001f511")
    expire()
    take(backend, "you")
    row = stored()
    assert (row.thread, row.note) == (threading.current_thread().name, "")


@pytest.mark.parametrize(
    ("name", "kept"),
    [("t" * 300, "t" * 255), ("a\0b", "a?b"), ("a\ud800b", "a?b"), ("\U0001f9f5", "\U0001f9f5")],
    ids=["long", "NUL", "surrogate", "emoji"],
)
def test_no_name_of_a_thread_or_task_is_in_the_way_of_a_grant(
    backend: Backend, name: str, kept: str
) -> None:
    """Nobody has checked it; a task's may come from anywhere."""
    take(backend, thread=name)
    assert stored().thread == kept


def test_a_row_that_has_only_a_name_and_a_slot_is_free(backend: Backend, mode: str) -> None:
    execute("INSERT INTO distlock_distributedlock (name, slot) VALUES ('n', 0)")
    held = take(backend)
    assert stored().losses == 0
    assert backend.release(connection, held, alone=False)


def test_a_grant_that_may_be_forgotten_is_a_grant(backend: Backend, mode: str) -> None:
    take(backend, durable=False)
    assert backend.grant(connection, claim("you", durable=False), 0) is None
    expire()
    take(backend, "you", durable=False)


# -- an acquire whose answer was lost ------------------------------------------------------------


def test_the_same_claim_finds_its_own_grant(backend: Backend, mode: str) -> None:
    first = take(backend)
    write(expires_at=SECOND)
    again = backend.grant(connection, claim(), 0)
    assert again is not None
    assert again.token == first.token
    assert again.expires_us == again.acquired_us + MINUTE
    row = stored()
    assert (row.owner, row.fencing_token, row.losses) == ("me", again.token, 0)
    assert row.expires_at == again.expires_us


def test_the_same_claim_finds_its_own_grant_after_its_expiry(backend: Backend, mode: str) -> None:
    first = take(backend)
    expire()
    again = take(backend)
    assert again.token > first.token
    assert stored().losses == 0


def test_the_same_claim_is_refused_once_somebody_else_holds_the_lock(
    backend: Backend, mode: str
) -> None:
    take(backend)
    expire()
    take(backend, "you")
    assert backend.grant(connection, claim(), 0) is None
    assert stored().owner == "you"


def test_the_same_claim_on_another_name_is_refused_where_that_is_held(
    backend: Backend, mode: str
) -> None:
    take(backend, "me", "n")
    take(backend, "you", "m")
    assert backend.grant(connection, claim("me", "m"), 0) is None


# -- many at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("found", ["new", "released", "expired", "old token"])
def test_of_many_that_ask_at_once_one_is_granted(backend: Backend, found: str) -> None:
    if found != "new":
        held = take(backend, "before")
        if found == "released":
            backend.release(connection, held, alone=True)
        else:
            write(expires_at=-SECOND, fencing_token=FAR if found == "old token" else held.token)
    with ExitStack() as opened:
        sessions = [opened.enter_context(session()) for _ in range(8)]

        def ask(number: int) -> Grant | None:
            return attempt(backend, sessions[number], claim(f"owner {number}"))

        results = together(*(lambda number=number: ask(number) for number in range(8)))
    granted = [index for index, grant in enumerate(results) if grant is not None]
    assert len(granted) == 1
    assert stored().owner == f"owner {granted[0]}"


@pytest.mark.parametrize("found", ["new", "expired"])
def test_whoever_comes_in_between_leaves_one_holder(
    backend: Backend, other: BaseDatabaseWrapper, found: str
) -> None:
    """After the first statement of a grant, before the next if it needs one."""
    if found == "expired":
        take(backend, "before")
        expire()
    granted: list[Grant | None] = []

    def come(run: Any, *statement: Any) -> Any:
        result = run(*statement)
        if not granted:
            granted.append(None)
            granted[0] = backend.grant(other, claim("you"), 0)
        return result

    with connection.execute_wrapper(come):
        granted.append(backend.grant(connection, claim("me"), 0))
    assert len([grant for grant in granted if grant is not None]) == 1
    assert stored().owner == ("you" if granted[0] else "me")


@pytest.mark.vendor("postgresql", "mysql")
def test_an_acquisition_that_is_about_to_be_committed_is_busy_and_no_error(
    backend: Backend, other: BaseDatabaseWrapper
) -> None:
    with transaction(other):
        take(backend, "you", on=other)
        commit = threading.Timer(0.3, other.commit)
        commit.start()
        assert backend.grant(connection, claim("me"), 0) is None
        commit.join()
    assert stored().owner == "you"


@pytest.mark.vendor("postgresql", "mysql")
def test_new_names_next_to_each_other_are_granted_at_once(backend: Backend) -> None:
    # The others may be refused by a deadlock, which a wait would mend.
    tries = 1 if type(backend).__name__ in ("PostgreSQL", "MariaDB") else 10
    names = [[f"order:{10 * number + thread}" for number in range(25)] for thread in range(8)]
    with ExitStack() as opened:
        sessions = [opened.enter_context(session()) for _ in names]

        def is_granted(thread: int, name: str) -> bool:
            wanted = claim("me", name)
            return any(attempt(backend, sessions[thread], wanted) for _ in range(tries))

        def ask(thread: int) -> list[str]:
            return [name for name in names[thread] if not is_granted(thread, name)]

        refused = together(*(lambda thread=thread: ask(thread) for thread in range(len(names))))
    assert refused == [[]] * len(names)
