"""`SingleInstanceMixin`: commands that run once at a time."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.core.management.base import BaseCommand, LabelCommand
from django.db import transaction

from distlock import LockBusy, lock
from distlock.management import SingleInstanceMixin
from tests.app.management.commands import alone
from tests.commands import done, manage
from tests.support import in_thread, is_free, row, steal

pytestmark = pytest.mark.django_db(transaction=True)
once_is_enough = pytest.mark.vendor("postgresql")


class Busy:
    """Hold a lock in another thread: in this one it would be nesting."""

    def __init__(self, name: str, **how: Any) -> None:
        self.lock = lock(name, **{"ttl": 60} | how)

    def __enter__(self) -> None:
        self.lease = in_thread(self.lock.acquire)

    def __exit__(self, *raised: object) -> None:
        self.lease.release()


class Command(alone.Command):
    """Another command in another place: it has another lock."""

    def handle(self, *args: Any, **options: Any) -> str:
        self.seen = [name for name in ("app.alone", __name__) if not is_free(name)]
        return super().handle(*args, **options)


def call(command: Any = "alone", **options: Any) -> tuple[str, str]:
    out, err = StringIO(), StringIO()
    call_command(command, stdout=out, stderr=err, **options)
    return out.getvalue(), err.getvalue()


def configured(**attributes: Any) -> BaseCommand:
    return type("Command", (alone.Command,), {**attributes})()


# -- real processes ------------------------------------------------------------------------------


def test_a_second_one_fails_while_the_first_runs() -> None:
    with manage("alone", "--until-told") as first:
        assert first.stdout is not None
        first.stdout.readline()
        holder = lock("app.alone").holder()
        assert holder is not None
        assert holder.pid == first.pid
        status, out, err = done("alone")
        assert (status, out) == (75, "")
        assert err.startswith("CommandError: Not run: The lock 'app.alone' was not free")
        assert first.communicate("go on\n", timeout=30)[0] == "done\n"
        assert first.returncode == 0
    status, out, err = done("alone")
    assert (status, err) == (0, "")
    assert out.endswith("done\n")


def test_a_loss_makes_it_fail_loudly() -> None:
    with manage("alone", "--until-told") as process:
        assert process.stdout is not None
        process.stdout.readline()
        steal("app.alone")
        out, err = process.communicate("go on\n", timeout=30)
    assert (process.returncode, out) == (69, "")
    assert "CommandError" in err
    assert "'app.alone'" in err
    assert "lost" in err


# -- in this process -----------------------------------------------------------------------------


def test_the_lock_is_named_after_app_and_command_and_held_once() -> None:
    out, err = call()
    assert (out.splitlines()[1], err) == ("done", "")
    assert is_free("app.alone")
    other = Command()
    call(other)
    assert other.seen == [__name__]
    assert row(__name__)["acquisitions"] == 1


def test_busy_is_an_error_or_is_skipped() -> None:
    with Busy("app.alone", note="another host"):
        with pytest.raises(CommandError, match=r"Not run: .*another host") as raised:
            call()
        assert raised.value.returncode == 75
        assert isinstance(raised.value.__cause__, LockBusy)
        skipping = configured(lock_name="app.alone", lock_on_busy="skip")
        out, err = call(skipping)
        assert (out, err.startswith("Not run: ")) == ("", True)
        assert call(skipping, verbosity=0) == ("", "")
    assert call(skipping)[0].endswith("done\n")


@once_is_enough
def test_a_lock_of_its_own_that_is_busy_is_not_its_being_busy() -> None:
    def handle(self: Any, **options: Any) -> None:
        with lock("inner", wait=0):
            raise AssertionError

    command = configured(handle=handle, lock_on_busy="skip")
    with Busy("inner"), pytest.raises(LockBusy, match="inner"):
        call(command)


@once_is_enough
def test_what_it_raises_is_its_own_and_frees() -> None:
    with pytest.raises(CommandError, match="as it was told") as raised:
        call(fail=True)
    assert raised.value.returncode == 9
    assert is_free("app.alone")


@once_is_enough
def test_the_name_may_depend_on_the_options() -> None:
    class PerTenant(SingleInstanceMixin, LabelCommand):
        lock_min_hold = 60
        lock_note = "tenant by tenant"

        def get_lock_name(self, *labels: str, **options: Any) -> str:
            return f"tenant:{labels[0]}"

        def handle_label(self, label: str, **options: Any) -> str:
            return label

    assert call_command(PerTenant(), "a", stdout=StringIO()) == "a"
    with pytest.raises(CommandError, match=r"'tenant:a' .*kept until"):
        call_command(PerTenant(), "a")
    assert call_command(PerTenant(), "b", stdout=StringIO()) == "b"
    assert row("tenant:b")["note"] == "tenant by tenant"


@once_is_enough
def test_it_waits_if_told_to_and_another_database_may_have_the_lock() -> None:
    in_thread(lambda: lock("n", ttl=1, renew=False, min_hold=1).acquire().release())
    out, _ = call(configured(lock_name="n", lock_wait=10))
    assert out.endswith("done\n")
    with pytest.raises(ValueError, match="using='nowhere'"):
        call(configured(lock_using="nowhere"))


@once_is_enough
def test_inside_a_transaction_the_lock_is_free_when_that_has_ended() -> None:
    with transaction.atomic():
        call()
        assert not is_free("app.alone")
    assert is_free("app.alone")


@once_is_enough
def test_after_the_base_command_it_cannot_stand() -> None:
    with pytest.raises(TypeError, match="consistent method resolution"):
        type("Wrong", (BaseCommand, SingleInstanceMixin), {})
