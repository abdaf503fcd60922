"""What the tests of lost answers share: an alias whose connections go through a proxy, and the
sweep that breaks an exchange at each of its messages in turn.

The alias `default` goes past the proxy: what the helpers of `support.py` see is the truth.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from django.db import DatabaseError, connection, connections, transaction
from django.dispatch import Signal

from distlock import CommitOutcomeUnknown, Lease, Lock, LockError, lock
from distlock.connections import private
from distlock.keeper import keeper
from tests.app.models import Counter
from tests.proxy import LIMIT, OTHER, Cut, Proxy, Rule
from tests.support import in_thread, is_free, row

ALIAS = "other"
"""The alias that leads through the proxy to the database of `default`: the caller's connections,
and distlock's private one."""

COMMIT = b"COMMIT\0" if connection.vendor == "postgresql" else b"\3COMMIT"
"""What only a COMMIT contains, on its way to the server."""

LONG = 60.0
SHORT = 0.5
"""Two ttl: one far beyond SOON, and one that a test can wait for."""
SOON = 2.0
"""Seconds within which a lock must be free again."""

_numbers = itertools.count()


@contextmanager
def proxied() -> Iterator[Proxy]:
    """Lead the alias through a proxy. At the end the keeper must be done with it."""
    real, at = connections["default"].settings_dict, connections.settings[ALIAS]
    usual = dict(at)
    cold()
    with Proxy(real["HOST"], int(real["PORT"]), connection.vendor) as proxy:
        at.update(NAME=real["NAME"], HOST="127.0.0.1", PORT=str(proxy.port))
        try:
            yield proxy
            proxy.disturb(Rule())
            proxy.go_on()
            proxy.come_up()
            broken = keeper.rounds(ALIAS)._broken
            assert eventually(lambda: not broken), f"left over: {broken}"
        finally:
            keeper.rounds(ALIAS)._broken.clear()
            cold()
            at.update(usual)


@dataclass
class Disturbed:
    """The part of a scenario in which a rule holds, as a context manager."""

    proxy: Proxy
    rule: Rule

    def __enter__(self) -> None:
        self.proxy.disturb(self.rule)

    def __exit__(self, *exc: object) -> None:
        if self.rule.happened.is_set():  # a client that has its whole answer is ahead of the cut
            assert self.rule.over.wait(LIMIT)
        self.proxy.disturb(Rule())

    def met(self, port: int) -> bool:
        """Whether it was the connection from that port."""
        return self.rule.message is not None and self.rule.message.link.port == port


Scenario = Callable[[str, Disturbed], None]
"""Is called with a name that nothing has used before, and says what is to be disturbed."""


def sweep(proxy: Proxy, scenario: Scenario, since: bytes = b"", **how: bool) -> list[Cut]:
    """Run a scenario undisturbed, and then cut before and after each message of it.

    `since`: only from the client's message on that contains this. Returns the cuts that were made;
    fails with all the points at which the scenario failed.
    """
    counted = Rule()
    scenario(fresh_name(), Disturbed(proxy, counted))
    said = counted.said
    while said and not (said[0].sender == "client" and since in said[0].data):
        said = said[1:]
    assert {message.sender for message in said} == set(OTHER), "nothing went there and back"
    cuts = [
        Cut(message.sender, message.number, after=after, **how)
        for message in said
        for after in (False, True)
    ]
    failures: list[str] = []
    for cut in cuts:
        try:
            scenario(fresh_name(), Disturbed(proxy, cut))
            assert cut.happened.is_set(), "nothing was cut, so this proves nothing"
        except Exception as error:
            failures.append(f"{cut}: {type(error).__name__}: {error}")
        proxy.come_up()
    assert not failures, f"{len(failures)} of {len(cuts)}:\n" + "\n".join(failures)
    return cuts


def fresh_name() -> str:
    return f"n{next(_numbers)}"


def warm() -> None:
    """Open both connections of the alias, and let them say what only a new one has to say."""
    connections[ALIAS].close()
    for _ in range(2):  # the first time opens the private one, the second asks it for its table
        with lock(fresh_name(), using=ALIAS), transaction.atomic(using=ALIAS):
            lock(fresh_name(), using=ALIAS).acquire().release()


def own_port() -> int:
    """The port that the caller's own connection comes from."""
    connections[ALIAS].ensure_connection()
    with socket.socket(fileno=os.dup(connections[ALIAS].connection.fileno())) as mine:
        return int(mine.getsockname()[1])


def cold() -> None:
    """Leave no connection of the alias open."""
    connections[ALIAS].close()
    private(ALIAS).close()
    private(ALIAS).identity = None


@contextmanager
def beside(function: Callable[[], None]) -> Iterator[None]:
    """Run a function in another thread, with connections of its own, while the block runs."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(LIMIT)
        assert not thread.is_alive(), "the other thread hangs"
        if errors:
            raise errors[0]


@contextmanager
def told(signal: Signal) -> Iterator[list[str]]:
    """Collect the names of the alias's locks that a signal is sent for."""
    names: list[str] = []

    def receive(lease: Lease, **kwargs: Any) -> None:
        if lease._term.alias == ALIAS:
            names.append(lease.name)

    signal.connect(receive)
    try:
        yield names
    finally:
        signal.disconnect(receive)


def eventually(check: Callable[[], Any], within: float = 8.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.01)
    return bool(check())


# -- what is done with the alias ----------------------------------------------------------------


def acquire(name: str, ttl: float = LONG) -> Lease:
    return lock(name, ttl=ttl, wait=0, renew=False, using=ALIAS).acquire()


def holds(lease: Lease, times: int = 1) -> None:
    """Check that the row says what the lease says, and that it was granted that many times."""
    found = row(lease.name)
    assert found["owner"] == lease.owner, "the row has another owner"
    assert found["fencing_token"] == lease.token, "the row has another token"
    assert found["acquisitions"] == times, "a repetition counts again"
    assert found["losses"] == 0, "somebody has lost it"
    assert not is_free(lease.name), "another was granted it"
    lease.check()


@dataclass
class Work:
    """A transaction that writes a row under a lock, and what it was told."""

    name: str
    ttl: float = LONG
    error: DatabaseError | None = None
    ran: list[str] = field(default_factory=list)

    def lock(self, *, atomic: bool = False) -> Lock:
        return lock(self.name, ttl=self.ttl, wait=0, atomic=atomic, using=ALIAS)

    def write(self) -> None:
        Counter.objects.using(ALIAS).create(name=self.name, value=1)
        transaction.on_commit(lambda: self.ran.append(self.name), using=ALIAS)

    def do(self, form: Form) -> None:
        """Do it, and note an error of the database."""
        try:
            form(self)
        except DatabaseError as error:
            self.error = error

    @property
    def written(self) -> bool:
        """Whether the row is there, as a connection past the proxy sees it."""
        return in_thread(lambda: Counter.objects.filter(name=self.name).exists())

    def check(self) -> None:
        """What was reported must be what has happened."""
        if self.error is None:
            assert self.written, "reported as committed"
            assert self.ran == [self.name], f"callbacks of a commit: {self.ran}"
        else:
            assert self.ran == [], f"callbacks of no commit: {self.error!r}"
        if not isinstance(self.error, CommitOutcomeUnknown | None):
            assert not isinstance(self.error, LockError), repr(self.error)
            assert not self.written, f"reported as rolled back: {self.error!r}"

    def check_the_next(self) -> None:
        """The connection serves the next transaction, and nothing of this one is left in it."""
        after = Work(f"{self.name} after")
        after.do(plain)
        assert after.error is None, repr(after.error)
        after.check()
        assert len(self.ran) <= 1, "the callbacks ran again"


Form = Callable[[Work], None]


def plain(work: Work) -> None:
    with transaction.atomic(using=ALIAS):
        work.write()


def inside(work: Work) -> None:
    with transaction.atomic(using=ALIAS), work.lock():
        work.write()


def atomic(work: Work) -> None:
    with work.lock(atomic=True):
        work.write()


def before(work: Work) -> None:
    lease = work.lock().acquire()
    try:
        with transaction.atomic(using=ALIAS):
            work.write()
            lease.release()
    finally:
        lease.release()  # after a rollback it is ours again


forms = pytest.mark.parametrize("form", [inside, atomic, before])
