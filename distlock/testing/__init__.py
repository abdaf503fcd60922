"""For your tests: locks that others hold, leases that get lost, time that passes at once.

    held_by_another("name")      a block in which somebody else holds the lock
    lose(lease)                  the lock has a later holder, and the lease is lost
    expire("name")               the lease of whoever holds the lock ends now
    assert_locked("name")        and assert_not_locked, with a message that says who holds it
    fake_clock()                 a block in which nobody sleeps: advance(60) lets a minute pass
    locks_disabled()             a block in which every acquire succeeds at once, without any SQL

They act on the rows and the engine of the library itself, under `TestCase`, `TransactionTestCase`
and pytest-django. Blocks are for `with`, `async with` and as decorators; what else sends SQL has a
twin for coroutines, which begins with an "a". docs/testing.md has examples. Not for production.
"""

from __future__ import annotations

from .clocks import FakeClock, fake_clock
from .disabled import locks_disabled
from .others import (
    aassert_locked,
    aassert_not_locked,
    aexpire,
    alose,
    assert_locked,
    assert_not_locked,
    expire,
    held_by_another,
    lose,
)

__all__ = [
    "FakeClock",
    "aassert_locked",
    "aassert_not_locked",
    "aexpire",
    "alose",
    "assert_locked",
    "assert_not_locked",
    "expire",
    "fake_clock",
    "held_by_another",
    "locks_disabled",
    "lose",
]
