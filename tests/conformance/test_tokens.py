"""A fencing token is GREATEST(previous + 1, microseconds since 1970). See also test_purge.py."""

from __future__ import annotations

import pytest
from django.db import connection

from distlock.backends.base import Backend
from tests.conformance.rows import FAR, SECOND, expire, now, purge, stored, take, write


@pytest.mark.parametrize("owner", ["the next", "the same claim"])
def test_a_token_from_the_future_grows_by_one(backend: Backend, mode: str, owner: str) -> None:
    """The database's clock was set back: tokens grow all the same."""
    take(backend, "the same claim")
    for previous in (FAR, FAR + 1, FAR + 2):
        write(fencing_token=previous, expires_at=-SECOND)
        assert take(backend, owner).token == previous + 1
        assert stored().fencing_token == previous + 1


@pytest.mark.parametrize("owner", ["the next", "the same claim"])
def test_a_token_from_the_past_jumps_to_the_clock(backend: Backend, mode: str, owner: str) -> None:
    take(backend, "the same claim")
    write(fencing_token=5, expires_at=-SECOND)
    before = now()
    assert before <= take(backend, owner).token <= now()


def test_a_token_of_this_very_moment_grows(backend: Backend, mode: str) -> None:
    """More grants in a second than the clock has ticks: on SQLite a thousand."""
    tokens = []
    for number in range(30):
        tokens.append(take(backend, f"owner {number}").token)
        expire()
    assert tokens == sorted(set(tokens))


def test_tokens_grow_across_every_end_of_a_lease(backend: Backend, mode: str) -> None:
    tokens = []
    for previous in (0, FAR):
        if previous:
            write(fencing_token=previous, expires_at=-SECOND)
        held = take(backend, "first")
        tokens.append(held.token)
        assert backend.release(connection, held, alone=mode == "autocommit")
        tokens.append(take(backend, "after a release").token)
        expire()
        held = take(backend, "after an expiry")
        tokens.append(held.token)
        forced = backend.force_release(connection, "n", 0, held.token)
        assert forced is not None
        tokens += [forced, take(backend, "after force").token]
        expire()
        assert purge(backend) == 1
        tokens.append(take(backend, "after a purge").token)
        expire()
        assert purge(backend) == 1
        tokens.append(take(backend, "after another purge").token)
    assert tokens == sorted(set(tokens))


def test_a_renewal_and_a_release_leave_the_token_alone(backend: Backend, mode: str) -> None:
    held = take(backend)
    backend.renew(connection, [held])
    assert stored().fencing_token == held.token
    backend.release(connection, held, alone=mode == "autocommit")
    assert stored().fencing_token == held.token


def test_each_slot_has_tokens_of_its_own(backend: Backend, mode: str) -> None:
    write("n", 1, fencing_token=FAR, expires_at=-SECOND)
    assert take(backend, "me", "n", slot=0).token < FAR
    assert take(backend, "me", "n", slot=1).token == FAR + 1
