"""Wrong arguments, and databases that cannot serve: an error that says so, and never a lease."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
from django.db import DatabaseError, InternalError, OperationalError, connection, connections
from django.db import transaction as django_transaction

from distlock import LockError, LockLost, lock
from distlock.backends import backend_for
from distlock.backends.base import TABLE
from distlock.models import DistributedLock
from tests.conformance.rows import execute
from tests.support import other_session

# What is refused before any SQL is the same everywhere; those tests may not touch a database.
anywhere = pytest.mark.vendor("sqlite")
database = pytest.mark.django_db(
    transaction=True, databases=["default", "other"], available_apps=["distlock"]
)

NO_DURATION = [True, False, "5", b"5", [5], {}, object(), 1j]
OUT_OF_RANGE = [-1, -0.001, math.nan, -math.inf, math.inf, timedelta(seconds=-1), timedelta.max]


def named(argument: str) -> str:
    """A message that begins with the argument and goes on with what it must be."""
    return rf"^{argument} must "


# -- lock() --------------------------------------------------------------------------------------


@anywhere
@pytest.mark.parametrize("argument", ["ttl", "wait", "min_hold", "max_hold"])
@pytest.mark.parametrize("value", NO_DURATION, ids=lambda value: type(value).__name__)
def test_what_is_no_duration_is_a_type_error(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=named(argument) + "be a number of seconds or a timedelta"):
        lock("x", **{argument: value})


@anywhere
@pytest.mark.parametrize("argument", ["ttl", "wait", "min_hold", "max_hold"])
@pytest.mark.parametrize("value", OUT_OF_RANGE, ids=repr)
def test_a_duration_out_of_range_is_a_value_error(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=named(argument) + "be (greater|0 or|at most)"):
        lock("x", **{argument: value})


@anywhere
@pytest.mark.parametrize("argument", ["ttl", "max_hold"])
@pytest.mark.parametrize("value", [0, 0.0, timedelta(0)], ids=repr)
def test_a_lease_of_no_length_is_a_value_error(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=named(argument) + "be greater than 0, not "):
        lock("x", **{argument: value})


@anywhere
@pytest.mark.parametrize("argument", ["ttl", "max_hold"])
@pytest.mark.parametrize("value", [1e-7, 0.0009, timedelta(microseconds=1)], ids=repr)
def test_a_lease_too_short_to_be_counted_is_a_value_error(argument: str, value: Any) -> None:
    """It would become one of 0 microseconds, or milliseconds on SQLite."""
    with pytest.raises(ValueError, match=named(argument) + "be at least a millisecond"):
        lock("x", **{argument: value})


@database
def test_the_shortest_lease_is_granted_and_a_shorter_one_not_renewed() -> None:
    with lock("x") as lease, pytest.raises(ValueError, match=named("ttl") + "be at least"):
        lease.renew(ttl=1e-7)
    lease = lock("x", ttl=0.001, renew=False).acquire()
    assert lease.expires_at - lease.acquired_at == timedelta(milliseconds=1)
    with suppress(LockLost):
        lease.release()


@anywhere
def test_a_lease_must_have_a_ttl() -> None:
    with pytest.raises(TypeError, match=named("ttl")):
        lock("x", ttl=None)  # type: ignore[arg-type]


@anywhere
@pytest.mark.parametrize("argument", ["renew", "atomic", "reentrant", "crash_safe"])
@pytest.mark.parametrize("value", [0, 1, None, "yes", []], ids=repr)
def test_a_flag_is_true_or_false(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=named(argument) + "be True or False, not "):
        lock("x", **{argument: value})


@anywhere
@pytest.mark.parametrize("name", [None, 5, b"x", ["x"], ("a", "b"), 1.5], ids=repr)
def test_a_name_is_a_text(name: Any) -> None:
    with pytest.raises(TypeError, match=r"^name must be a str or a callable, not "):
        lock(name)


@anywhere
def test_a_name_has_at_least_one_character() -> None:
    with pytest.raises(ValueError, match=r"^name must have 1 to 255 characters, not 0"):
        lock("")


@anywhere
def test_a_name_has_at_most_255_characters_and_the_error_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"^name must have 1 to 255 characters, not 256; hash "):
        lock("x" * 256)
    assert lock("\U0001f511" * 255).name == "\U0001f511" * 255


@anywhere
def test_a_name_has_no_nul() -> None:
    with pytest.raises(ValueError, match=r"^name must not hold a NUL character: 'a\\x00b'"):
        lock("a\0b")


@anywhere
@pytest.mark.parametrize("name", ["\ud800", "a\udfffb"])
def test_a_name_can_be_encoded(name: str) -> None:
    with pytest.raises(ValueError, match=r"^name must be encodable as UTF-8"):
        lock(name)


@anywhere
@pytest.mark.parametrize("value", ["Raise", "SKIP", "wait", "", None, True, []], ids=repr)
def test_on_busy_is_one_of_two_words(value: Any) -> None:
    with pytest.raises(ValueError, match=r'^on_busy must be "raise" or "skip", not '):
        lock("x", on_busy=value)


@anywhere
@pytest.mark.parametrize("note", [None, 5, b"x", ["x"]], ids=repr)
def test_a_note_is_a_text(note: Any) -> None:
    with pytest.raises(TypeError, match=r"^note must be a str, not "):
        lock("x", note=note)


@anywhere
@pytest.mark.parametrize("note", ["x" * 256, "a\0b"], ids=["long", "NUL"])
def test_a_note_has_at_most_255_characters_and_no_nul(note: str) -> None:
    with pytest.raises(ValueError, match=r"^note must have at most 255 characters, and no NUL"):
        lock("x", note=note)


@anywhere
@pytest.mark.parametrize("using", [5, True, ["default"], b"default"], ids=repr)
def test_using_is_a_database_alias(using: Any) -> None:
    with pytest.raises(TypeError, match=r"^using must be a database alias, not "):
        lock("x", using=using)


@anywhere
@pytest.mark.parametrize(
    "use",
    [
        lambda described: described.acquire(),
        lambda described: described.try_acquire(),
        lambda described: described.holder(),
        lambda described: described.__enter__(),
        lambda described: described(lambda: None)(),
    ],
    ids=["acquire", "try_acquire", "holder", "with", "decorator"],
)
def test_an_unknown_alias_is_named_with_those_that_there_are(use: Any) -> None:
    with pytest.raises(ValueError, match=r"^using='replica' is not in DATABASES; it has \['def"):
        use(lock("x", using="replica"))


@anywhere
def test_an_unknown_alias_of_an_atomic_lock_is_named() -> None:
    with pytest.raises(ValueError, match=r"^using='replica' is not in DATABASES"):
        lock("x", using="replica", atomic=True).__enter__()


@anywhere
def test_an_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="timeout"):
        lock("x", timeout=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        lock("x", 5)  # type: ignore[misc]


# -- the methods ---------------------------------------------------------------------------------


@anywhere
@pytest.mark.parametrize("wait", NO_DURATION, ids=lambda value: type(value).__name__)
def test_acquire_refuses_what_is_no_duration(wait: Any) -> None:
    with pytest.raises(TypeError, match=named("wait")):
        lock("x").acquire(wait=wait)


@anywhere
@pytest.mark.parametrize("wait", OUT_OF_RANGE, ids=repr)
def test_acquire_refuses_a_duration_out_of_range(wait: Any) -> None:
    with pytest.raises(ValueError, match=named("wait")):
        lock("x").acquire(wait=wait)


@anywhere
@database
@pytest.mark.parametrize("ttl", NO_DURATION, ids=lambda value: type(value).__name__)
def test_renew_refuses_what_is_no_duration(ttl: Any) -> None:
    with lock("x") as lease:
        expires = lease.expires_at
        with pytest.raises(TypeError, match=named("ttl")):
            lease.renew(ttl)
        assert lease.expires_at == expires


@anywhere
@database
@pytest.mark.parametrize("ttl", [0, *OUT_OF_RANGE], ids=repr)
def test_renew_refuses_a_duration_out_of_range(ttl: Any) -> None:
    with lock("x") as lease:
        expires = lease.expires_at
        with pytest.raises(ValueError, match=named("ttl")):
            lease.renew(ttl)
        assert lease.expires_at == expires


@anywhere
def test_a_lock_whose_name_is_a_callable_is_for_decorators() -> None:
    described = lock(lambda arguments: "x")
    for use in (described.acquire, described.try_acquire, described.holder, described.__enter__):
        with pytest.raises(TypeError, match="callable can only be used as a decorator"):
            use()


@anywhere
@pytest.mark.parametrize("method", ["acquire", "try_acquire"])
def test_an_atomic_lock_needs_a_body(method: str) -> None:
    with pytest.raises(TypeError, match=rf"^{method}\(\) cannot run a body.*with block"):
        getattr(lock("x", atomic=True), method)()


@anywhere
@database
def test_an_atomic_lock_inside_a_transaction_is_refused_before_any_statement() -> None:
    with django_transaction.atomic():
        with connection.execute_wrapper(lambda *_: pytest.fail("a statement was sent")):
            with pytest.raises(RuntimeError, match=r"atomic=True.*Leave out atomic=True"):
                lock("x", atomic=True).__enter__()
    assert not DistributedLock.objects.exists()


@anywhere
@database
def test_a_guard_outside_a_transaction_is_refused() -> None:
    with lock("x") as lease:
        with pytest.raises(RuntimeError, match=r"guard\(\) .* needs an open transaction"):
            lease.guard()


# -- names in a decorator ------------------------------------------------------------------------


@anywhere
@pytest.mark.parametrize(
    ("template", "field"),
    [
        ("{b}", "b"),
        ("{A}", "A"),
        ("{a}{b.x}", "b"),
        ("{b[0]}", "b"),
        ("{0}", "0"),
        ("{}", ""),
        ("{b!r:>10}", "b"),
    ],
)
def test_a_field_that_is_no_argument_is_refused_when_the_function_is_decorated(
    template: str, field: str
) -> None:
    def work(a: int) -> None: ...

    with pytest.raises(ValueError, match=rf"^name .* has the field \{{{field}\}}, which is no arg"):
        lock(template)(work)


@anywhere
@pytest.mark.parametrize("template", ["{", "}", "{a", "a}", "{a!}", "{a!x!y}"])
def test_a_torn_template_is_refused_and_the_remedy_said(template: str) -> None:
    def work(a: int) -> None: ...

    with pytest.raises(ValueError, match=r"^name .* is not a template: .* brace is written twice"):
        lock(template)(work)


@anywhere
@pytest.mark.parametrize("result", [None, 5, b"x", ["x"]], ids=repr)
def test_a_callable_that_returns_no_text_is_a_type_error(result: Any) -> None:
    with pytest.raises(TypeError, match=r"^name must be a str, not "):
        lock(lambda arguments: result)(lambda: None)()


@anywhere
@pytest.mark.parametrize("value", ["", "x" * 256, "a\0b", "\ud800"], ids=["0", "256", "NUL", "su"])
def test_a_name_that_comes_from_arguments_is_checked_at_the_call(value: str) -> None:
    @lock("{value}")
    def by_template(value: str) -> None: ...

    @lock(lambda arguments: arguments["value"])
    def by_callable(value: str) -> None: ...

    for function in (by_template, by_callable):
        with pytest.raises(ValueError, match=r"^name must "):
            function(value)


@anywhere
# -- databases that cannot serve -----------------------------------------------------------------


@contextmanager
def elsewhere(**changes: Any) -> Iterator[str]:
    """The alias "other" with the settings of the default one, but for some."""
    usual, connections["other"] = connections["other"], connections.create_connection("default")
    connections["other"].alias = "other"
    connections["other"].settings_dict = {**connection.settings_dict, **changes}
    try:
        yield "other"
    finally:
        connections["other"].close()
        connections["other"] = usual


@contextmanager
def no_table() -> Iterator[None]:
    """The lock table is gone, and everything that this process knew of it."""
    execute(f"ALTER TABLE {TABLE} RENAME TO away")
    try:
        yield
    finally:
        execute(f"ALTER TABLE away RENAME TO {TABLE}")


@database
@pytest.mark.parametrize("method", ["acquire", "try_acquire", "__enter__"])
def test_without_its_table_a_lock_says_to_migrate(method: str) -> None:
    with no_table():
        with pytest.raises(LockError, match=f"'{TABLE}' is missing in .*'default'.*migrate"):
            getattr(lock("x", wait=5), method)()


@database
def test_without_its_table_a_decorated_function_is_not_called() -> None:
    @lock("x", on_busy="skip")
    def work() -> None:
        pytest.fail("called without the lock")

    with no_table(), pytest.raises(LockError, match="migrate"):
        work()


@database
def test_without_its_table_an_atomic_body_is_not_entered() -> None:
    with no_table(), pytest.raises(LockError, match="migrate"), lock("x", atomic=True):
        pytest.fail("entered without the lock")
    assert not connection.in_atomic_block


@database
def test_without_its_table_nothing_is_taken_inside_a_transaction() -> None:
    with no_table(), pytest.raises((LockError, DatabaseError), match=TABLE):
        with django_transaction.atomic():
            lock("x").acquire()


@database
def test_a_table_that_comes_back_serves_again() -> None:
    with no_table(), pytest.raises(LockError):
        lock("x").try_acquire()
    with lock("x"):
        pass


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def unreachable() -> Iterator[str]:
    """An alias that nothing answers to."""
    if connection.vendor == "sqlite":
        with elsewhere(NAME="/nonexistent/folder/file") as name:
            yield name
    else:
        with elsewhere(HOST="127.0.0.1", PORT=closed_port()) as name:
            yield name


@database
@pytest.mark.parametrize("method", ["acquire", "try_acquire", "holder", "__enter__"])
def test_an_unreachable_database_is_an_operational_error_at_once(method: str) -> None:
    started = time.monotonic()
    with unreachable() as name, pytest.raises(OperationalError):
        getattr(lock("x", using=name, wait=30), method)()
    assert time.monotonic() - started < 2


@database
def test_an_unreachable_database_is_not_taken_for_a_busy_lock() -> None:
    with unreachable() as name:

        @lock("x", using=name, wait=30, on_busy="skip")
        def work() -> None:
            pytest.fail("called without the lock")

        with pytest.raises(OperationalError):
            work()
        with pytest.raises(OperationalError), lock("x", using=name, atomic=True):
            pytest.fail("entered without the lock")


@database
@pytest.mark.vendor("postgresql", "mysql")
def test_a_wrong_password_is_an_operational_error() -> None:
    with (
        elsewhere(PASSWORD="wrong") as name,
        pytest.raises(OperationalError, match=r"(?i)password|denied"),
    ):
        lock("x", using=name).acquire()


@contextmanager
def read_only() -> Iterator[str]:
    """An alias that may read the lock table and not write it."""
    settings = connection.settings_dict
    options = dict(settings["OPTIONS"])
    if connection.vendor == "sqlite":
        name = f"file:{settings['NAME']}?mode=ro"
        with elsewhere(NAME=name, OPTIONS=options | {"uri": True}) as one:
            yield one
    elif connection.vendor == "postgresql":
        options["options"] = "-c default_transaction_read_only=on"
        with elsewhere(OPTIONS=options) as one:
            yield one
    else:
        execute("CREATE USER IF NOT EXISTS looker@'127.0.0.1' IDENTIFIED BY 'look'")
        execute("GRANT SELECT ON *.* TO looker@'127.0.0.1'")
        try:
            with elsewhere(USER="looker", PASSWORD="look") as one:
                yield one
        finally:
            execute("DROP USER looker@'127.0.0.1'")


READ_ONLY = {
    "sqlite": "attempt to write a readonly database",
    "postgresql": "in a read-only transaction",
    "mysql": "command denied to user 'looker'",
}


@database
@pytest.mark.parametrize("method", ["acquire", "try_acquire", "__enter__"])
@pytest.mark.parametrize("found", ["new", "expired"])
def test_a_read_only_database_says_so_and_gives_no_lease(method: str, found: str) -> None:
    if found == "expired":
        DistributedLock.objects.create(name="x")
    with read_only() as name:
        with pytest.raises(DatabaseError, match=READ_ONLY[connection.vendor]):
            getattr(lock("x", using=name, wait=5), method)()
    row = DistributedLock.objects.filter(name="x").first()
    assert row is None or row.owner == ""


@database
def test_a_read_only_database_shows_the_holder_and_refuses_the_rest() -> None:
    with lock("x") as lease, read_only() as name:
        holder = lock("x", using=name).holder()
        assert holder is not None
        assert holder.token == lease.token


@database
@pytest.mark.vendor("mysql")
def test_a_server_that_is_read_only_says_so_and_gives_no_lease() -> None:
    """A replica that the alias points to by mistake."""
    options = dict(connection.settings_dict["OPTIONS"])
    options["init_command"] = "SET SESSION TRANSACTION READ ONLY"
    with elsewhere(OPTIONS=options) as name:
        with pytest.raises(DatabaseError, match="READ ONLY transaction"):
            lock("x", using=name).acquire()
    assert not DistributedLock.objects.exists()


@database
def test_an_error_that_is_no_contention_is_never_taken_for_a_busy_lock() -> None:
    backend = backend_for(connection)
    for error in (
        OperationalError("server closed the connection unexpectedly"),
        InternalError("cannot execute SELECT FOR UPDATE in a read-only transaction"),
        DatabaseError("no such table"),
        OperationalError(2006, "Server has gone away"),
        OperationalError(1290, "The MariaDB server is running with the --read-only option"),
    ):
        assert not backend.is_contention(error)


@database
@pytest.mark.vendor("postgresql")
def test_a_sessions_end_in_the_middle_is_survived() -> None:
    """The connection of the caller was cut off while it stood idle: a grant is asked for again."""
    with lock("before"):
        pass
    pid = connection.connection.info.backend_pid
    with other_session() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    with lock("x") as lease:
        assert lease.token > 0
