"""Sockets that are shut down in time, and connections that nobody waits for too long."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import OperationalError

from distlock import limits
from distlock.limits import Opener, Watch

pytestmark = pytest.mark.vendor("sqlite")  # nothing here depends on the database


@pytest.fixture
def wires() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket.socketpair()
    yield pair
    for one in pair:
        one.close()


def is_cut(wire: socket.socket, within: float) -> bool:
    wire.settimeout(within)
    try:
        return wire.recv(1) == b""
    except TimeoutError:
        return False


# -- cut off -----------------------------------------------------------------------------


def test_who_takes_too_long_is_cut_off(wires: tuple[socket.socket, socket.socket]) -> None:
    mine, other = wires
    start = time.monotonic()
    with Watch().cut_off_after(0.2, mine):
        assert is_cut(other, 5)
    assert 0.15 < time.monotonic() - start < 1


def test_who_is_in_time_is_left_alone(wires: tuple[socket.socket, socket.socket]) -> None:
    mine, other = wires
    with Watch().cut_off_after(0.5, mine):
        pass
    assert not is_cut(other, 0.8)


def test_a_shorter_limit_does_not_wait_for_a_longer_one(
    wires: tuple[socket.socket, socket.socket],
) -> None:
    mine, other = wires
    watch, second = Watch(), socket.socketpair()
    with watch.cut_off_after(60, second[0]):
        time.sleep(0.1)  # the watch is asleep for a minute
        with watch.cut_off_after(0.2, mine):
            assert is_cut(other, 5)
        assert not is_cut(second[1], 0.1)
    for one in second:
        one.close()


def test_the_watch_goes_on_after_an_end_that_did_not_come(
    wires: tuple[socket.socket, socket.socket],
) -> None:
    mine, other = wires
    watch = Watch()
    with watch.cut_off_after(0.1, mine):
        pass
    with watch.cut_off_after(0.4, mine):  # the watch is asleep until the first end
        assert is_cut(other, 5)


def test_one_thread_however_many_limits(wires: tuple[socket.socket, socket.socket]) -> None:
    before = threading.active_count()
    watch = Watch()
    for _ in range(100):
        with watch.cut_off_after(1, wires[0]):
            pass
    assert threading.active_count() <= before + 1


def test_a_connection_without_a_socket_has_no_limit() -> None:
    watch = Watch()
    with watch.cut_off_after(0.0, None):
        assert not watch._ends


# -- opening -----------------------------------------------------------------------------


class Slow:
    """A connection that takes a while to open."""

    def __init__(self, seconds: float = 0.0, error: Exception | None = None) -> None:
        self.seconds, self.error = seconds, error
        self.thread = ""
        self.closed = threading.Event()

    def ensure_connection(self) -> None:
        self.thread = threading.current_thread().name
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.closed.set()


def opener(*slow: Slow) -> Opener:
    coming = iter(slow)
    made: Any = lambda: next(coming)  # noqa: E731
    return Opener(made)


def test_a_connection_is_opened_in_a_thread_of_its_own() -> None:
    wanted = Slow()
    assert opener(wanted).open(5) is wanted  # type: ignore[comparison-overlap]
    assert wanted.thread == "distlock-connect"


def test_an_error_is_the_callers() -> None:
    with pytest.raises(OperationalError, match="refused"):
        opener(Slow(error=OperationalError("refused"))).open(5)


def test_nobody_waits_longer_than_he_can_and_the_next_has_what_came_late() -> None:
    late = Slow(0.4)
    one = opener(late)
    start = time.monotonic()
    with pytest.raises(OperationalError, match=r"not open within 0\.1 s"):
        one.open(0.1)
    assert time.monotonic() - start < 0.3
    time.sleep(0.5)
    assert one.open(0.1) is late  # type: ignore[comparison-overlap]
    assert not late.closed.is_set()


@pytest.fixture
def pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PACE", request.param)


paced = pytest.mark.parametrize("pace", [0.4], indirect=True)


@paced
def test_who_hangs_does_not_keep_the_next_from_another_and_is_closed_when_it_comes(
    pace: None,
) -> None:
    hung, good = Slow(0.6), Slow()
    one = opener(hung, good)
    with pytest.raises(OperationalError):
        one.open(0.1)
    assert one.open(5) is good  # type: ignore[comparison-overlap]
    assert hung.closed.wait(5)
    assert not good.closed.is_set()


@paced
def test_an_error_of_an_earlier_one_is_not_the_next_ones(pace: None) -> None:
    one = opener(Slow(0.3, OperationalError("late")), good := Slow(0.1))
    with pytest.raises(OperationalError, match="not open within"):
        one.open(0.1)
    assert one.open(5) is good  # type: ignore[comparison-overlap]


def test_many_that_cannot_wait_start_one_connection() -> None:
    one = opener(hung := Slow(0.5), Slow())
    for _ in range(10):
        with pytest.raises(OperationalError):
            one.open(0.02)
    assert one.open(5) is hung  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("pace", [0.05], indirect=True)
def test_what_came_late_is_closed_with_the_rest(pace: None) -> None:
    here, coming = Slow(0.2), Slow(0.5)
    one = opener(here, coming)
    for _ in range(2):
        with pytest.raises(OperationalError):
            one.open(0.04)
    time.sleep(0.3)
    one.close()
    assert here.closed.wait(1)
    assert coming.closed.wait(1)


def test_where_no_thread_can_be_started_the_caller_opens_it(monkeypatch: Any) -> None:
    def refuse(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    wanted = Slow()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert opener(wanted).open(5) is wanted  # type: ignore[comparison-overlap]
    assert wanted.thread == threading.current_thread().name
