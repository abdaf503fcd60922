"""The spans of distlock.contrib.opentelemetry, as the SDK's exporter gets them."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import OperationalError, transaction
from django.test import override_settings
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from distlock import LockBusy, LockLost, lock, signals
from distlock.contrib import opentelemetry
from distlock.contrib.opentelemetry import _receivers
from distlock.places import Place
from tests.support import eventually, in_thread, run_async, steal

pytestmark = pytest.mark.django_db(transaction=True)

provider = TracerProvider()
tracer = provider.get_tracer("a project")


class Spans(InMemorySpanExporter):
    """What was sent."""

    def of(self, name: str) -> list[ReadableSpan]:
        """Of one lock, in order: the waits and holds."""
        return [span for span in self.get_finished_spans() if about(span).get(NAME) == name]

    def outcomes(self, name: str) -> list[tuple[str, Any]]:
        return [(span.name.split()[1], about(span)["distlock.outcome"]) for span in self.of(name)]


NAME = "distlock.name"


def about(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def parent(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """Traces for one test; the others run without."""
    exporter = Spans()
    processor = SimpleSpanProcessor(exporter)
    monkeypatch.setattr(provider, "_active_span_processor", processor)
    tracer.span_processor = processor  # type: ignore[attr-defined]
    monkeypatch.setattr(_receivers, "tracer", tracer)
    opentelemetry.install()
    opentelemetry.install()  # a second call does nothing
    yield exporter
    for signal in map(signals.__dict__.get, signals.__all__):
        signal.disconnect(dispatch_uid=_receivers.UID)  # type: ignore[union-attr]


def test_a_wait_and_a_hold_are_children_of_the_callers_span(spans: Spans) -> None:
    with tracer.start_as_current_span("request") as request:
        with lock("paid:1") as lease:
            time.sleep(0.1)
    wait, hold = spans.of("paid:1")
    assert [wait.name, hold.name] == ["distlock wait", "distlock hold"]
    assert parent(wait) == parent(hold) == request.get_span_context().span_id
    same = {NAME: "paid:1", "distlock.group": "paid", "distlock.token": lease.token}
    assert about(wait) == {**same, "distlock.outcome": "granted"}
    assert about(hold) == {**same, "distlock.outcome": "released"}
    assert wait.status.status_code is hold.status.status_code is StatusCode.UNSET
    assert wait.end_time == hold.start_time
    assert 0 < seconds(wait) < 30
    assert 0.1 <= seconds(hold) < 30
    assert not held_for("paid:1")


def test_a_wait_is_as_long_as_it_was(spans: Spans) -> None:
    lease = lock("slow:1").acquire()
    threading.Timer(0.3, lambda: in_thread(lease.release)).start()
    in_thread(lambda: lock("slow:1", wait=30).acquire().release())
    waits = [span for span in spans.of("slow:1") if span.name == "distlock wait"]
    assert 0.2 <= seconds(waits[1]) < 30


def test_who_gives_up_has_a_wait_that_names_the_holder(spans: Spans) -> None:
    def give_up() -> int:
        with tracer.start_as_current_span("thread") as current:
            with pytest.raises(LockBusy):
                lock("full:1", wait=0.1).acquire()
            assert lock("full:1").try_acquire() is None
        return current.get_span_context().span_id

    with lock("full:1"):
        of_thread = in_thread(give_up)
    _, gave_up, tried, _ = spans.of("full:1")
    assert spans.outcomes("full:1")[1:3] == [("wait", "busy"), ("wait", "busy")]
    assert parent(gave_up) == parent(tried) == of_thread
    assert str(os.getpid()) in about(gave_up)["distlock.holder"]
    assert 0.1 <= seconds(gave_up) < 30
    assert "distlock.token" not in about(gave_up)


def test_each_task_has_its_own_parent(spans: Spans) -> None:
    async def task(n: int) -> int:
        with tracer.start_as_current_span(f"task {n}") as current:
            async with lock(f"task:{n}", wait=30):
                await asyncio.sleep(0.05)
            async with lock("of all tasks", wait=30):
                await asyncio.sleep(0.05)
        return current.get_span_context().span_id

    async def tasks() -> list[int]:
        return list(await asyncio.gather(*map(task, range(4))))

    parents = in_thread(lambda: run_async(tasks))
    for n, expected in enumerate(parents):
        assert [parent(span) for span in spans.of(f"task:{n}")] == [expected, expected]
    shared = spans.of("of all tasks")
    assert sorted(map(str, map(parent, shared))) == sorted(map(str, parents * 2))


def test_a_release_in_another_thread_ends_the_hold(spans: Spans) -> None:
    with tracer.start_as_current_span("request") as request:
        lease = lock("handed:1").acquire()
    in_thread(lease.release)
    assert spans.outcomes("handed:1") == [("wait", "granted"), ("hold", "released")]
    assert parent(spans.of("handed:1")[1]) == request.get_span_context().span_id


def test_a_hold_ends_with_the_transaction_that_releases_it(spans: Spans) -> None:
    with transaction.atomic():
        with lock("inside:1"):
            pass
        assert spans.outcomes("inside:1") == [("wait", "granted")]
    assert spans.outcomes("inside:1") == [("wait", "granted"), ("hold", "released")]


@pytest.mark.vendor("postgresql", "mysql")
def test_a_loss_ends_the_hold_with_an_error(spans: Spans) -> None:
    with pytest.raises(LockLost), lock("gone:1"):
        steal("gone:1")
    assert eventually(lambda: ("hold", "lost") in spans.outcomes("gone:1"), within=30)
    lost = next(span for span in spans.of("gone:1") if about(span)["distlock.outcome"] == "lost")
    assert lost.status.status_code is StatusCode.ERROR
    assert "another owner" in str(lost.status.description)


def test_a_lease_that_is_collected_leaves_no_span_behind(spans: Spans) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        lock("forgot:1", ttl=0.9).acquire()
        gc.collect()
    assert eventually(lambda: ("hold", "dropped") in spans.outcomes("forgot:1"), within=30)
    assert spans.of("forgot:1")[1].status.status_code is StatusCode.ERROR
    assert eventually(lambda: not held_for("forgot:1"), within=30)


@pytest.mark.django_db
def test_nor_does_one_that_nobody_keeps(spans: Spans, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlock.acquisitions.can_keep", lambda connection: False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        lock("unkept:1").acquire()
        gc.collect()
    assert not held_for("unkept:1")


def held_for(name: str) -> list[Any]:
    return [term for term in list(_receivers._holding) if term.name == name]


def test_what_breaks_off_is_an_error(spans: Spans, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: Any) -> None:
        raise OperationalError("the server is gone")

    async def cancelled() -> None:
        task = asyncio.ensure_future(lock("broken:1", wait=30).aacquire())
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with lock("broken:1"):
        in_thread(lambda: run_async(cancelled))
    monkeypatch.setattr(Place, "grant", gone)
    with pytest.raises(OperationalError):
        lock("broken:1").acquire()
    assert spans.outcomes("broken:1").count(("wait", "failed")) == 2
    first, second = (
        span for span in spans.of("broken:1") if about(span)["distlock.outcome"] == "failed"
    )
    assert about(first)["error.type"] == "asyncio.exceptions.CancelledError"
    assert about(second)["error.type"] == "django.db.utils.OperationalError"
    assert second.status.status_code is StatusCode.ERROR
    assert second.status.description == "the server is gone"
    assert 0.2 <= seconds(first) < 30


def test_names_can_be_left_out(spans: Spans) -> None:
    with override_settings(DISTLOCK={"TRACE_NAMES": False}), lock("secret:1"):
        pass
    told = [about(span) for span in spans.get_finished_spans()]
    assert [each["distlock.group"] for each in told if each["distlock.group"] == "secret"]
    assert "secret:1" not in str(told)


def test_nor_does_a_holder_or_an_error_tell_them(
    spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up() -> None:
        threading.current_thread().name = "secret thread"
        with pytest.raises(LockBusy, match="secret note"):
            lock("secret:1", wait=0).acquire()

    def gone(*args: Any) -> None:
        raise OperationalError("the secret server is gone")

    for trace_names in (True, False):
        spans.clear()
        with override_settings(DISTLOCK={"TRACE_NAMES": trace_names}):
            with lock("secret:1", note="secret note"):
                in_thread(give_up)
            with monkeypatch.context() as patch, pytest.raises(OperationalError):
                patch.setattr(Place, "grant", gone)
                lock("secret:1").acquire()
        told = [span.to_json() for span in spans.get_finished_spans() if ours(span)]
        assert len(told) == 4
        for secret in ("secret:1", "secret note", "secret server"):
            assert any(secret in each for each in told) is trace_names, secret
    (failed,) = [span for span in spans.get_finished_spans() if "error.type" in about(span)]
    assert failed.status.description == "OperationalError"


def ours(span: ReadableSpan) -> bool:
    return about(span)["distlock.group"] == "secret"


def test_an_end_that_is_told_before_its_beginning_leaves_no_span_open(spans: Spans) -> None:
    def lose(lease: Any, **kwargs: Any) -> None:
        told = threading.Event()
        signals.lock_lost.connect(receiver := lambda **kwargs: told.set())
        lease._term.lose("at once")
        assert told.wait(30)
        signals.lock_lost.disconnect(receiver)

    signals.lock_acquired.disconnect(dispatch_uid=_receivers.UID)
    signals.lock_acquired.connect(lose)
    try:
        opentelemetry.install()  # it hears of the grant last
        with pytest.raises(LockLost), lock("early:1"):
            pass
    finally:
        signals.lock_acquired.disconnect(lose)
    assert spans.outcomes("early:1") == [("wait", "granted"), ("hold", "lost")]
    assert not held_for("early:1")


@pytest.mark.vendor("sqlite")
def test_a_forked_child_ends_no_span_of_its_parents(spans: Spans) -> None:
    with lock("forked:1"):
        child = os.fork()
        if not child:
            os._exit(len(_receivers._holding))
        assert os.waitpid(child, 0)[1] == 0
    assert spans.outcomes("forked:1") == [("wait", "granted"), ("hold", "released")]
