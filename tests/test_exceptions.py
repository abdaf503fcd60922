from __future__ import annotations

import copy
import pickle
from datetime import datetime, timezone
from typing import Any

import pytest
from django.db import DatabaseError

import distlock
from distlock import (
    AlreadyHeld,
    CommitOutcomeUnknown,
    Holder,
    JobDuplicate,
    LockBusy,
    LockError,
    LockLost,
    StaleToken,
)

pytestmark = pytest.mark.vendor("sqlite")

NOW = datetime(2026, 11, 1, 5, 30, tzinfo=timezone.utc)
HOLDER = Holder("x", "abc", 7, NOW, NOW, "host", 42, "MainThread", "why")
ERRORS: list[Any] = [
    LockError("message", name="x"),
    LockBusy("message", name="x", holder=HOLDER, waited=1.5),
    LockBusy("message", name="x", holder=None, waited=0.0),
    AlreadyHeld("message", name="x"),
    LockLost("message", name="x", token=7, reason="it had expired"),
    StaleToken("message", name="x", token=7, seen=9),
    CommitOutcomeUnknown("message", name="x"),
    JobDuplicate("message", key="x", result={"paid": 1}, finished_at=NOW),
]
each = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


def facts(error: Any) -> tuple[Any, ...]:
    return type(error), error.args, str(error), vars(error)


@each
def test_an_error_carries_one_message_and_its_attributes_apart(error: Any) -> None:
    assert error.args == ("message",)
    assert str(error) == "message"
    assert (error.key if isinstance(error, JobDuplicate) else error.name) == "x"


@each
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickle_with_its_attributes(error: Any, protocol: int) -> None:
    again = pickle.loads(pickle.dumps(error, protocol))
    assert facts(again) == facts(error)


@each
def test_an_error_survives_copy_with_its_attributes(error: Any) -> None:
    assert facts(copy.copy(error)) == facts(error)
    assert facts(copy.deepcopy(error)) == facts(error)


@each
def test_an_error_can_be_made_again_from_its_args(error: Any) -> None:
    """As Celery's result backends do: only the attributes are lost, and have their defaults."""
    again = type(error)(*error.args)
    assert (again.args, str(again)) == (error.args, str(error))
    assert (again.key if isinstance(again, JobDuplicate) else again.name) is None
    assert isinstance(repr(again), str)


@pytest.mark.parametrize("cls", [type(error) for error in ERRORS])
def test_an_error_needs_no_arguments(cls: type[Any]) -> None:
    assert str(cls()) == ""
    assert cls("an argument").args == ("an argument",)


def test_the_attributes_have_defaults() -> None:
    assert (LockBusy("m").holder, LockBusy("m").waited) == (None, 0.0)
    assert (LockLost("m").token, LockLost("m").reason) == (None, "")
    assert (StaleToken("m").token, StaleToken("m").seen) == (None, None)
    duplicate = JobDuplicate("m")
    assert (duplicate.key, duplicate.result, duplicate.finished_at) == (None, None, None)


def test_the_family() -> None:
    assert issubclass(LockBusy, TimeoutError)
    assert issubclass(LockLost, DatabaseError)
    assert issubclass(CommitOutcomeUnknown, DatabaseError)
    assert issubclass(StaleToken, DatabaseError)
    assert not issubclass(CommitOutcomeUnknown, LockLost)
    assert not issubclass(StaleToken, LockLost)
    assert not issubclass(AlreadyHeld, (LockBusy, LockLost))
    assert not issubclass(JobDuplicate, (LockError, DatabaseError))
    for name in ("AlreadyHeld", "CommitOutcomeUnknown", "LockBusy", "LockLost", "StaleToken"):
        assert issubclass(getattr(distlock, name), LockError)


def test_a_busy_error_has_no_errno_to_be_taken_for_an_os_error() -> None:
    error = ERRORS[1]
    assert isinstance(error, OSError)
    assert (error.errno, error.strerror, error.filename) == (None, None, None)


def test_a_holder_says_who_it_is() -> None:
    assert str(HOLDER) == "MainThread of process 42 on host, why"
    assert pickle.loads(pickle.dumps(HOLDER)) == HOLDER
    nobody = Holder("x", "", 7, NOW, NOW, "host", 42, "MainThread", "")
    assert str(nobody) == f"nobody (kept until {NOW} by min_hold)"
