"""The pytest plugin of distlock: fixtures over `distlock.testing`. docs/testing.md has examples.

    distlock_clock               a fake clock: `distlock_clock.advance(60)`
    distlock_held_by_another     `distlock_held_by_another("name")`: so to the end of the test
    distlock_disabled            every acquire succeeds at once, without any SQL

It stands outside the package because pytest imports it for every run: nothing of Django and nothing
of distlock is imported before a test asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from distlock import Holder
    from distlock.testing import FakeClock

DATABASE_FIXTURES = ("transactional_db", "db")


@pytest.fixture
def distlock_clock() -> Iterator[FakeClock]:
    """A clock that moves on: nobody sleeps. See `distlock.testing.fake_clock`."""
    from distlock.testing import fake_clock

    with fake_clock() as clock:
        yield clock


@pytest.fixture
def distlock_held_by_another(request: pytest.FixtureRequest) -> Iterator[Callable[..., Holder]]:
    """Let somebody else hold locks to the end of the test. See `distlock.testing`."""
    from distlock.testing import held_by_another

    for name in DATABASE_FIXTURES:  # those of pytest-django shall end after this one
        if name in request.fixturenames:
            request.getfixturevalue(name)
    with ExitStack() as stack:

        def hold(name: str, **options: Any) -> Holder:
            return stack.enter_context(held_by_another(name, **options))

        yield hold


@pytest.fixture
def distlock_disabled() -> Iterator[None]:
    """Grant every lock at once, without any SQL. See `distlock.testing.locks_disabled`."""
    from distlock.testing import locks_disabled

    with locks_disabled():
        yield
