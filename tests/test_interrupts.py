"""Exceptions out of signal handlers, at every point of the end of a transaction.

After each of them the same must be true: the callbacks of `on_commit` ran exactly if the data is
there, the block ended without an exception only if it is, the lock is free, and the next
transaction commits, with its own callbacks and nobody else's.
"""

from __future__ import annotations

import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import pytest
from django.db import connection, transaction

from distlock import LockBusy, lock
from tests.app.models import Counter
from tests.support import becomes_free, in_thread

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "other"]),
    pytest.mark.slow,
]

celery_exceptions = pytest.importorskip("celery.exceptions")
ERRORS = (KeyboardInterrupt, SystemExit, celery_exceptions.SoftTimeLimitExceeded)
TRACED = (
    "django/db/transaction.py",
    "django/db/backends/base/base.py",
    "distlock/atomics.py",
    "distlock/hooks.py",
    "distlock/transactions.py",
)
UNTRACED = ("allow_thread_sharing", "validate_thread_sharing", "run_and_clear_commit_hooks")
"""A tracer can raise between a mutex and the `with` that holds it, where no signal handler runs.
What comes while the callbacks run is theirs: Django gives up the later ones."""
RANDOM_INSTANTS = 160


class Run:
    """One transaction with a lock inside, interrupted, and what can be seen of it afterwards."""

    def __init__(self, number: int, *, atomic: bool = False) -> None:
        self.key = f"run-{number}"
        self.atomic = atomic
        self.ran: list[str] = []
        self.error: BaseException | None = None

    @property
    def in_callbacks(self) -> bool:
        """Whether it came while Django ran the callbacks."""
        frames = traceback.extract_tb(self.error.__traceback__) if self.error else []
        return any(frame.name == "run_and_clear_commit_hooks" for frame in frames)

    def run(self, interrupted: Callable[[], Any]) -> None:
        """Run it; `interrupted()` stands around the end of the transaction."""
        try:
            if self.atomic:
                with lock("x", ttl=60, atomic=True) as self.lease:
                    self._work()
                    interrupted()
                    self._last_words()
            else:
                with transaction.atomic():
                    with lock("x", ttl=60) as self.lease:
                        self._work()
                    interrupted()
                    self._last_words()
        except ERRORS as error:
            self.error = error

    def _work(self) -> None:
        Counter.objects.create(name=self.key, value=1)
        transaction.on_commit(lambda: self.ran.append(self.key))

    def _last_words(self) -> None:
        """Let a signal that comes at once meet the body, and not the start of an `__exit__`."""
        for _ in range(5_000):
            pass

    def repair(self) -> bool:
        """Undo what an exception in the first line of an `__exit__` leaves: it never ran."""
        if not connection.in_atomic_block:
            return False
        connection.in_atomic_block = False
        connection.close()
        connection.ensure_connection()
        self.lease.release()
        return True

    def check(self, where: str) -> None:
        """See that what was reported is what is there, and that all goes on."""
        after: list[int] = []
        with transaction.atomic():
            ran = list(self.ran)
            Counter.objects.create(name=f"after-{self.key}", value=1)
            transaction.on_commit(lambda: after.append(1))
        stored = in_thread(
            lambda: list(
                Counter.objects.filter(name__in=[self.key, f"after-{self.key}"])
                .order_by("-name")
                .values_list("name", flat=True)
            )
        )
        assert f"after-{self.key}" in stored, f"{where}: the next transaction was not committed"
        assert after == [1], f"{where}: the next transaction's callback did not run"
        assert ran == self.ran, f"{where}: a callback ran in the next transaction"
        if not self.in_callbacks:
            reported = self.ran == [self.key]
            assert reported is (self.key in stored), f"{where}: {self.ran}, {stored}"
        if self.error is None:
            assert self.key in stored, f"{where}: nothing was committed, and nobody told"
        try:
            becomes_free("x", 2)
        except LockBusy:
            came = traceback.format_tb(self.error.__traceback__) if self.error else []
            pytest.fail(f"{where}: the lock is still held: {''.join(came)}")


class Tracer:
    """Raises an error before the n-th line that runs once Django has begun to end the block."""

    def __init__(self, number: int, error: type[BaseException]) -> None:
        self.number = number
        self.error = error
        self.begun = False
        self.seen = 0
        self.where = "not reached"

    def start(self) -> None:
        sys.settrace(self)

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if event not in ("call", "line") or not file.endswith(TRACED):
            return self
        if frame.f_code.co_name in UNTRACED:
            return None
        self.begun = self.begun or frame.f_code.co_name == "_end"  # of an AtomicBlock
        if connection.in_atomic_block and not self.begun:
            return self  # the first lines of Atomic.__exit__, which are Django's own
        self.seen += 1
        if self.seen == self.number:
            name = file.rpartition("/site-packages/")[2]
            self.where = f"{event} {name}:{frame.f_lineno} {frame.f_code.co_name}"
            raise self.error
        return self


@pytest.mark.timeout(600)
@pytest.mark.parametrize("atomic", [False, True], ids=["inside", "atomic"])
def test_at_every_line_of_the_end(atomic: bool) -> None:
    number, reached = 0, True
    while reached:
        number += 1
        one = Run(number, atomic=atomic)
        tracer = Tracer(number, ERRORS[number % 3])
        try:
            one.run(tracer.start)
        finally:
            sys.settrace(None)
        reached = tracer.seen >= number
        one.check(f"{number}: {tracer.where}")
    assert number > 50, "the end has more lines than that"


@pytest.fixture
def slow_commit() -> Iterator[None]:
    """Let the server take its time over the COMMIT of a new counter."""
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION sleepy() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_sleep(0.7); RETURN NULL; END'"
        )
        cursor.execute(
            "CREATE CONSTRAINT TRIGGER sleepy AFTER INSERT ON app_counter DEFERRABLE INITIALLY "
            "DEFERRED FOR EACH ROW WHEN (NEW.name LIKE 'run-%') EXECUTE FUNCTION sleepy()"
        )
    yield
    with connection.cursor() as cursor:
        cursor.execute("DROP FUNCTION sleepy CASCADE")


@pytest.mark.vendor("postgresql")
@pytest.mark.parametrize("atomic", [False, True], ids=["inside", "atomic"])
@pytest.mark.parametrize("error", ERRORS)
def test_while_commit_is_on_the_wire(
    slow_commit: None, error: type[BaseException], atomic: bool
) -> None:
    """B-3. psycopg cancels a COMMIT upon Ctrl-C; after a time limit the server goes on with it."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise error

    one = Run(1, atomic=atomic)
    previous = signal.signal(signal.SIGALRM, handler)
    try:
        one.run(partial(signal.setitimer, signal.ITIMER_REAL, 0.3))
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert isinstance(one.error, error)
    one.check(error.__name__)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("atomic", [False, True], ids=["inside", "atomic"])
def test_at_random_instants(atomic: bool) -> None:
    """A real signal, from just before the end of the body to just after the end of the block."""
    caught = committed = left_open = 0

    def handler(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise random.choice(ERRORS)

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        reach = 2 * sorted(duration(atomic) for _ in range(9))[4]
        for number in range(RANDOM_INSTANTS // 2):
            one, instant = Run(number, atomic=atomic), random.uniform(1e-6, reach)
            try:
                one.run(partial(signal.setitimer, signal.ITIMER_REAL, instant))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except ERRORS as error:
                one.error = error
            caught += one.error is not None
            reach *= 1.05 if one.error else 0.95  # half of them come in time, whatever the load
            left_open += one.repair()
            one.check(f"{number}, after {instant * 1e6:.0f} us")
            committed += bool(one.ran)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert left_open < RANDOM_INSTANTS // 20
    assert caught > RANDOM_INSTANTS // 8, "hardly any signal came in time"
    assert committed > RANDOM_INSTANTS // 20, "hardly any transaction was committed"


def duration(atomic: bool) -> float:
    """How long the end takes."""
    begun: list[float] = []
    Run(0, atomic=atomic).run(lambda: begun.append(time.perf_counter()))
    took = time.perf_counter() - begun[0]
    Counter.objects.all().delete()
    return took
