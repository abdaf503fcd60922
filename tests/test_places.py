"""Which table a lock stands in: an acquire is refused where the keeper would look into another."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import OperationalError, connection, connections, transaction

from distlock import LockError, lock
from distlock.backends.base import TABLE
from distlock.connections import private
from distlock.limits import Opener
from tests.support import in_thread, is_free

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "other"]),
    pytest.mark.vendor("postgresql", "mysql"),
]
postgresql = pytest.mark.vendor("postgresql")

NOW = "clock_timestamp()" if connection.vendor == "postgresql" else "UTC_TIMESTAMP(6)"


def execute(sql: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(sql)


def fetch(sql: str) -> list[Any]:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return list(cursor.fetchall())


@pytest.fixture(autouse=True)
def unknown() -> Iterator[None]:
    """As in a new process: the private connection is not open, and was never asked."""
    for alias in ("default", "other"):
        private(alias).close()
        private(alias).identity = None
    yield
    connection.close()


@pytest.fixture
def elsewhere() -> Iterator[Any]:
    """Another place with a lock table of its own; call it to go there and back."""
    if connection.vendor == "postgresql":
        for schema in ("tenant", "neighbour", "bare"):
            execute(f"CREATE SCHEMA {schema}")
        for schema in ("tenant", "neighbour"):
            execute(f"CREATE TABLE {schema}.{TABLE} (LIKE {TABLE} INCLUDING ALL)")
    home = connection.settings_dict["NAME"]
    there = connections["other"].settings_dict["NAME"]

    @contextmanager
    def go(schema: str = "tenant") -> Iterator[None]:
        go_there = f"SET search_path TO {schema}, public"
        go_home = "SET search_path TO DEFAULT"
        if connection.vendor == "mysql":
            go_there, go_home = f"USE {there}", f"USE {home}"
        execute(go_there)
        try:
            yield
        finally:
            execute(go_home)

    yield go
    if connection.vendor == "postgresql":
        execute("DROP SCHEMA tenant, neighbour, bare CASCADE")


@pytest.mark.parametrize("known", [False, True])
def test_refused_in_autocommit(elsewhere: Any, known: bool) -> None:
    if known:
        lock("x").acquire().release()
    with elsewhere():
        for _ in range(2):
            with pytest.raises(LockError, match=r"search_path.*SHARED_APPS"):
                lock("x", min_hold=60).acquire()
        assert fetch(f"SELECT owner FROM {TABLE} WHERE expires_at > {NOW}") == []
        with pytest.raises(LockError, match="search_path"):
            lock("x").try_acquire()
    with lock("x", ttl=0.6) as lease:
        time.sleep(0.8)
        lease.check()


def test_refused_inside_a_transaction(elsewhere: Any) -> None:
    with elsewhere(), transaction.atomic():
        with pytest.raises(LockError, match="search_path"):
            lock("x").acquire()
    assert is_free("x")


@postgresql
def test_two_tenants_never_hold_one_name(elsewhere: Any) -> None:
    def held(schema: str) -> bool:
        with elsewhere(schema):
            try:
                lock("x", wait=0).acquire()
            except LockError:
                return False
        return True

    assert not in_thread(lambda: held("tenant"))
    assert not in_thread(lambda: held("neighbour"))


@postgresql
def test_a_path_that_leads_to_the_same_table_is_fine(elsewhere: Any) -> None:
    with elsewhere("bare"), lock("x", ttl=0.6) as lease:
        time.sleep(0.8)
        lease.check()
        assert not is_free("x")
    assert is_free("x")


@postgresql
def test_every_new_connection_may_have_a_path_of_its_own(elsewhere: Any) -> None:
    """Whatever is set as a connection opens holds for the private one, too."""
    from django.db.backends.signals import connection_created

    def receive(connection: Any, **kwargs: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET search_path TO tenant")

    connection.close()
    connection_created.connect(receive)
    try:
        with lock("x", ttl=0.6) as lease:
            time.sleep(0.8)
            lease.check()
        with transaction.atomic(), lock("x"):
            pass
        assert fetch(f"SELECT name FROM tenant.{TABLE}") == [("x",)]
    finally:
        connection_created.disconnect(receive)
        connections.close_all()


@postgresql
def test_a_table_that_was_made_anew_is_the_same_for_both() -> None:
    lock("x").acquire().release()
    execute(f"ALTER TABLE {TABLE} RENAME TO old")
    execute(f"CREATE TABLE {TABLE} (LIKE old INCLUDING ALL)")
    try:
        with lock("x"):
            assert not is_free("x")
        with transaction.atomic(), lock("x"):
            assert not is_free("x")
    finally:
        execute(f"DROP TABLE {TABLE}")
        execute(f"ALTER TABLE old RENAME TO {TABLE}")


def test_the_private_connection_is_asked_once(monkeypatch: Any) -> None:
    asked: list[int] = []
    private("default").close()
    backend = private("default").backend
    real = type(backend).identity
    monkeypatch.setitem(
        backend.__dict__, "identity", lambda on: asked.append(1) or real(backend, on)
    )
    for _ in range(3):
        lock("x").acquire().release()
    assert asked == [1]
    private("default").close()
    with private("default").use():  # it may have another path now
        pass
    for _ in range(3):
        lock("x").acquire().release()
    assert asked == [1, 1]


# -- the private connection cannot be had -------------------------------------------------


def test_a_lock_is_not_refused_for_want_of_a_second_session(
    monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Opener, limit: float) -> Any:
        raise OperationalError("too many connections")

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "distlock"):
        patch.setattr(Opener, "open", refuse)
        with lock("x"):
            assert not is_free("x")
    assert "lock_table_unchecked name='x': too many connections" in caplog.text
    assert is_free("x")


def test_nor_does_it_take_long_to_do_without(monkeypatch: Any) -> None:
    opened, real = threading.Event(), Opener._open

    def slow(self: Opener, errors: list[BaseException]) -> None:
        opened.wait(3)
        real(self, errors)

    monkeypatch.setattr(Opener, "_open", slow)
    start = time.monotonic()
    with lock("x"):
        assert time.monotonic() - start < 1.5
        opened.set()
    with private("default").use():
        """What was begun has come: the next test shall not wait for it."""


def test_what_is_known_to_be_another_table_is_refused_all_the_same(
    elsewhere: Any, monkeypatch: Any
) -> None:
    def refuse(self: Opener, limit: float) -> Any:
        raise OperationalError("too many connections")

    lock("x").acquire().release()
    private("default").close()
    monkeypatch.setattr(Opener, "open", refuse)
    with elsewhere(), pytest.raises(LockError, match="search_path"):
        lock("x").acquire()
