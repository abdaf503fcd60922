"""The proxy does what it says, on the protocol of the database under test."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import DatabaseError, connection, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from tests.app.models import Counter
from tests.proxy import Cut, Hold, Proxy, Rule

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.vendor("postgresql", "mysql"),
]


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    at = connection.settings_dict
    before = threading.active_count()
    with Proxy(at["HOST"], int(at["PORT"]), connection.vendor) as opened:
        yield opened
    assert threading.active_count() <= before, "a thread of the proxy is left"


@pytest.fixture
def client(proxy: Proxy) -> Iterator[BaseDatabaseWrapper]:
    """A connection through the proxy, that any thread may use."""
    wrapper = connections.create_connection("default")
    wrapper.settings_dict = copy.deepcopy(connection.settings_dict)
    wrapper.settings_dict.update(HOST="127.0.0.1", PORT=str(proxy.port))
    wrapper.inc_thread_sharing()
    wrapper.ensure_connection()
    yield wrapper
    wrapper.close()


def insert(client: BaseDatabaseWrapper, name: str = "c") -> None:
    with client.cursor() as cursor:
        cursor.execute("INSERT INTO app_counter (name, value) VALUES (%s, 1)", [name])


def written(name: str = "c") -> bool:
    """Whether a row is there, as a connection past the proxy sees it."""
    return Counter.objects.filter(name=name).exists()


def in_background(function: Any) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except DatabaseError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def test_it_counts_messages_and_not_packets(proxy: Proxy, client: BaseDatabaseWrapper) -> None:
    counted = proxy.disturb(Rule())
    with client.cursor() as cursor:
        cursor.execute("SELECT 1 AS a UNION ALL SELECT 2")
        assert list(cursor.fetchall()) == [(1,), (2,)]
    # Description, two rows, end, ready; or count, column, its end, two rows, their end.
    answers = 5 if connection.vendor == "postgresql" else 6
    assert (counted.count("client"), counted.count("server")) == (1, answers)


def test_a_long_message_is_one_message(proxy: Proxy, client: BaseDatabaseWrapper) -> None:
    counted = proxy.disturb(Rule())
    with client.cursor() as cursor:
        cursor.execute("SELECT LENGTH(%s)", ["x" * 300_000])
        assert cursor.fetchone()[0] == 300_000
    assert counted.count("client") == 1


def test_log_ins_do_not_count(proxy: Proxy, client: BaseDatabaseWrapper) -> None:
    counted = proxy.disturb(Rule())
    client.close()
    said = counted.count("client")  # the farewell, if it has come already
    client.ensure_connection()
    with client.cursor() as cursor:
        cursor.execute("SELECT 1")
    assert 0 <= said <= 1 < counted.count("client") <= 6


@pytest.mark.parametrize("after", [False, True])
def test_a_statement_is_cut_on_its_way(
    proxy: Proxy, client: BaseDatabaseWrapper, after: bool
) -> None:
    cut = proxy.disturb(Cut("client", 0, after=after))
    with pytest.raises(DatabaseError):
        insert(client)
    assert cut.happened.is_set()
    assert written() is after


def test_an_answer_is_cut_on_its_way(proxy: Proxy, client: BaseDatabaseWrapper) -> None:
    proxy.disturb(Cut("server", 0))
    with pytest.raises(DatabaseError):
        insert(client)
    assert written()


def test_a_connection_breaks_after_the_whole_answer(
    proxy: Proxy, client: BaseDatabaseWrapper
) -> None:
    counted = proxy.disturb(Rule())
    insert(client, "first")
    cut = proxy.disturb(Cut("server", counted.count("server") - 1, after=True))
    insert(client, "second")
    assert cut.over.wait(5)
    with pytest.raises(DatabaseError):
        insert(client, "third")
    assert (written("second"), written("third")) == (True, False)


def test_a_cut_happens_once(proxy: Proxy, client: BaseDatabaseWrapper) -> None:
    proxy.disturb(Cut("client", 0))
    with pytest.raises(DatabaseError):
        insert(client)
    client.close()
    insert(client)
    assert written()


def test_a_server_that_stays_keeps_its_locks(proxy: Proxy, client: BaseDatabaseWrapper) -> None:
    Counter.objects.create(name="c", value=1)
    client.set_autocommit(False)
    proxy.disturb(Cut("server", 0, server_stays=True))
    with pytest.raises(DatabaseError), client.cursor() as cursor:
        if connection.vendor == "postgresql":  # where BEGIN goes ahead, and is answered first
            proxy.disturb(Rule())
            cursor.execute("SELECT 1")
            proxy.disturb(Cut("server", 0, server_stays=True))
        cursor.execute("UPDATE app_counter SET value = 2 WHERE name = 'c'")
    client.close()
    for _ in range(3):
        with transaction.atomic():
            assert not Counter.objects.select_for_update(skip_locked=True).exists()
        time.sleep(0.05)
    proxy.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with transaction.atomic():
            if Counter.objects.select_for_update(skip_locked=True).exists():
                break
        time.sleep(0.01)
    assert Counter.objects.get(name="c").value == 1


@pytest.mark.parametrize("end", ["deliver", "drop"])
def test_a_statement_is_held_of_a_client_that_has_gone(
    proxy: Proxy, client: BaseDatabaseWrapper, end: str
) -> None:
    held = proxy.disturb(Hold(b"INSERT"))
    thread, errors = in_background(lambda: insert(client))
    held.wait()
    time.sleep(0.1)
    assert thread.is_alive()
    held.cut_client()
    thread.join(5)
    assert errors
    assert not written()
    getattr(held, end)()
    assert written() is (end == "deliver")


def test_a_held_statement_may_arrive_at_a_client_that_waits(
    proxy: Proxy, client: BaseDatabaseWrapper
) -> None:
    held = proxy.disturb(Hold(b"INSERT"))
    thread, errors = in_background(lambda: insert(client))
    held.deliver()
    thread.join(5)
    assert not errors
    assert written()


@pytest.mark.parametrize("end", ["deliver", "drop", "cut_client"])
def test_an_answer_is_held(proxy: Proxy, client: BaseDatabaseWrapper, end: str) -> None:
    held = proxy.disturb(Hold(b"INSERT", answer=True))
    thread, errors = in_background(lambda: insert(client))
    held.wait()
    assert written()
    assert thread.is_alive()
    getattr(held, end)()
    thread.join(5)
    assert not thread.is_alive()
    assert bool(errors) is (end != "deliver")


def test_it_stands_still_and_goes_on(proxy: Proxy, client: BaseDatabaseWrapper) -> None:
    proxy.stand_still()
    thread, errors = in_background(lambda: insert(client))
    time.sleep(0.2)
    assert thread.is_alive()
    assert not written()
    proxy.go_on()
    thread.join(5)
    assert not errors
    assert written()


def test_it_goes_down_and_comes_up(proxy: Proxy, client: BaseDatabaseWrapper) -> None:
    proxy.go_down()
    with pytest.raises(DatabaseError):
        insert(client)
    client.close()
    with pytest.raises(DatabaseError):
        insert(client)
    proxy.come_up()
    insert(client)
    assert written()


def test_a_cut_may_take_all_down(proxy: Proxy, client: BaseDatabaseWrapper) -> None:
    proxy.disturb(Cut("server", 0, down=True))
    with pytest.raises(DatabaseError):
        insert(client)
    client.close()
    with pytest.raises(DatabaseError):
        client.ensure_connection()
    assert written()


def test_it_ends_with_a_message_still_held(proxy: Proxy, client: BaseDatabaseWrapper) -> None:
    held = proxy.disturb(Hold(b"INSERT"))
    thread, errors = in_background(lambda: insert(client))
    held.wait()
    start = time.monotonic()
    proxy.close()
    assert time.monotonic() - start < 2
    thread.join(5)
    assert errors
    assert not written()
