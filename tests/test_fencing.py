"""A row in another database takes no write from a token that is older than the last one."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.core.exceptions import FieldDoesNotExist
from django.db import (
    DatabaseError,
    IntegrityError,
    OperationalError,
    connection,
    connections,
    models,
    transaction,
)
from django.db.models import Exists, F, OuterRef
from django.db.models.signals import pre_save
from django.test.utils import CaptureQueriesContext

from distlock import Lease, LockLost, StaleToken, lock
from distlock.fencing import FencedModel, FencedQuerySet, FencingTokenField
from tests.app.models import Account, Counter, Entry, Event, Frozen, Savings
from tests.support import in_thread, steal

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")
accounts: Any = Account.objects.using("other")

OLD, NEW = 1_000, 2_000


def make(name: str = "a", *, token: int = 0, **fields: Any) -> Account:
    return Account.objects.using("other").create(name=name, fencing_token=token, **fields)


def stored(name: str = "a") -> tuple[int, int]:
    """Balance and token, as another session sees them."""
    return in_thread(lambda: accounts.values_list("balance", "fencing_token").get(name=name))


def update(token: Any, **values: Any) -> int:
    return int(accounts.filter(name="a").fenced_update(token, **values))


def save(token: Any, **values: Any) -> int:
    account = accounts.get(name="a")
    for name, value in values.items():
        setattr(account, name, value)
    account.fenced_save(token)
    return 1


either = pytest.mark.parametrize("write", [update, save])


# -- the comparison --------------------------------------------------------------------


@either
@pytest.mark.parametrize("before", [0, NEW - 1, NEW])
def test_a_token_at_least_as_new_writes_and_is_remembered(
    write: Callable[..., int], before: int
) -> None:
    make(token=before)
    assert write(NEW, balance=5) == 1
    assert stored() == (5, NEW)


@either
def test_the_same_holder_writes_many_times(write: Callable[..., int]) -> None:
    make()
    for balance in (1, 2, 2, 2):  # also what changes nothing: rows matched are counted
        assert write(NEW, balance=balance) == 1
    assert stored() == (2, NEW)


@either
@pytest.mark.parametrize("token", [1, OLD, NEW - 1])
def test_an_older_token_is_stale_and_writes_nothing(write: Callable[..., int], token: int) -> None:
    make(token=NEW, balance=7)
    with pytest.raises(StaleToken, match=f"token {token} is older than {NEW}.*app.Account") as told:
        write(token, balance=5)
    assert (told.value.name, told.value.token, told.value.seen) == (None, token, NEW)
    assert stored() == (7, NEW)


def test_a_lease_is_taken_for_its_token() -> None:
    make()
    with lock("account") as lease:
        update(lease, balance=5)
        save(lease, balance=6)
        assert stored() == (6, lease.token)
    with lock("account") as later:
        update(later, balance=7)
        with pytest.raises(StaleToken, match=f"token {lease.token} is older than {later.token}"):
            update(lease.token, balance=5)
    assert stored() == (7, later.token)


def test_the_error_names_the_lock_of_a_lease() -> None:
    make(token=2**62)
    with lock("account") as lease:
        for write in (update, save):
            with pytest.raises(StaleToken, match="of the lock 'account' is older") as told:
                write(lease, balance=5)
            assert (told.value.name, told.value.token) == ("account", lease.token)


@either
def test_a_lease_that_is_known_to_be_lost_is_not_even_asked_about(
    write: Callable[..., int],
) -> None:
    make()
    lease = lock("account", ttl=0.2, renew=False).acquire()
    time.sleep(0.3)
    with pytest.raises(LockLost):
        write(lease, balance=5)
    assert stored() == (0, 0)
    assert write(lease.token, balance=5) == 1  # its token is as good as any
    with pytest.raises(LockLost):
        lease.release()


@either
def test_a_lease_that_was_released_is_refused(write: Callable[..., int]) -> None:
    make()
    with lock("account") as lease:
        pass
    with pytest.raises(LockLost, match="released"):
        write(lease, balance=5)


def test_a_holder_that_does_not_know_of_its_loss_is_stopped_by_the_row() -> None:
    make()
    lease = lock("account", renew=False).acquire()
    steal("account")
    newer = lock("account").holder()
    assert newer is not None
    update(newer.token, balance=9)
    lease.check()  # it still believes
    with pytest.raises(StaleToken):
        update(lease, balance=5)
    assert stored() == (9, newer.token)
    with pytest.raises(LockLost):
        lease.release()


@either
@pytest.mark.parametrize("token", [None, True, "7", 7.0, b"7", lock("x")], ids=repr)
def test_what_is_no_token_is_a_type_error(write: Callable[..., int], token: Any) -> None:
    make()
    with pytest.raises(TypeError, match=r"^lease must be a Lease or its token, not "):
        write(token)


@either
@pytest.mark.parametrize("token", [0, -1, 2**63, 10**30])
def test_a_token_out_of_range_is_a_value_error(write: Callable[..., int], token: int) -> None:
    make()
    with pytest.raises(ValueError, match=r"^lease must be a token, greater than 0 and below"):
        write(token)
    assert stored() == (0, 0)


# -- which rows ------------------------------------------------------------------------


def test_no_row_is_not_stale() -> None:
    make("b", token=NEW)
    assert update(OLD, balance=5) == 0
    assert accounts.none().fenced_update(OLD, balance=5) == 0
    assert stored("b") == (0, NEW)


def test_the_other_rows_are_left_alone() -> None:
    make("a")
    make("b", token=NEW)
    assert update(OLD, balance=5) == 1
    assert (stored("a"), stored("b")) == ((5, OLD), (0, NEW))


def test_many_rows_are_all_written_or_none() -> None:
    for number in range(5):
        make(f"n{number}", token=number)
    make("newer", token=NEW)
    with pytest.raises(StaleToken) as told:
        accounts.all().fenced_update(OLD, balance=5)
    assert told.value.seen == NEW
    assert [stored(f"n{number}") for number in range(5)] == [(0, number) for number in range(5)]
    assert accounts.exclude(name="newer").fenced_update(OLD, balance=5) == 5
    assert {stored(f"n{number}") for number in range(5)} == {(5, OLD)}


def test_the_newest_token_of_many_is_told() -> None:
    make("a", token=NEW)
    make("b", token=NEW + 1)
    with pytest.raises(StaleToken) as told:
        accounts.all().fenced_update(OLD)
    assert told.value.seen == NEW + 1


def test_a_filter_on_what_is_written_is_no_reason_to_be_stale() -> None:
    make("a", balance=1)
    make("b", balance=2, token=NEW)
    assert accounts.filter(balance=1).fenced_update(OLD, balance=2) == 1
    assert stored("a") == (2, OLD)


def test_expressions_subqueries_slices_and_orders() -> None:
    Counter.objects.using("other").create(name="a", value=4)
    make(balance=1)
    named = Counter.objects.using("other").filter(name=OuterRef("name"))
    rows = accounts.filter(Exists(named)).order_by("-balance")
    assert rows.fenced_update(OLD, balance=F("balance") + 2) == 1
    assert rows.annotate(n=F("balance") + 1).filter(n=4).fenced_update(OLD, balance=F("n")) == 1
    assert stored() == (4, OLD)
    with pytest.raises(TypeError, match="slice"):
        accounts.all()[:1].fenced_update(OLD)
    with pytest.raises(FieldDoesNotExist):
        accounts.fenced_update(OLD, nonsense=1)
    with pytest.raises(TypeError, match="fencing_token"):
        accounts.fenced_update(NEW, fencing_token=5)
    assert stored() == (4, OLD)


@pytest.mark.vendor("sqlite", "postgresql")  # Django itself cannot do it elsewhere
def test_an_order_by_another_table_is_no_filter() -> None:
    make(token=NEW)
    rows = accounts.order_by("counter__name")
    assert rows.fenced_update(NEW, balance=5) == 1
    with pytest.raises(StaleToken):
        rows.fenced_update(OLD)


def test_an_evaluated_queryset_forgets_what_it_had_read() -> None:
    make()
    rows = accounts.filter(name="a")
    assert [row.balance for row in rows] == [0]
    rows.fenced_update(OLD, balance=5)
    assert [row.balance for row in rows] == [5]


def test_a_filter_on_another_table_is_refused() -> None:
    """Django would read the keys of the rows first, and then update these, whatever has come."""
    counter = Counter.objects.using("other").create(name="c", value=1)
    make(counter=counter)
    for rows in (accounts.filter(counter__value=1), accounts.filter(counter__name="c")):
        with pytest.raises(TypeError, match=r"fenced_update\(\) needs filters .* of one table"):
            rows.fenced_update(OLD, balance=5)
    assert stored() == (0, 0)
    for rows in (
        accounts.filter(counter=counter),
        accounts.filter(counter__pk=counter.pk),
        accounts.filter(counter__in=Counter.objects.filter(value=1)),
    ):
        assert rows.fenced_update(OLD, balance=5) == 1


def test_the_condition_stands_in_the_update_itself() -> None:
    make()
    with CaptureQueriesContext(connections["other"]) as sent:
        update(OLD, balance=5)
    statements = [one["sql"] for one in sent if "UPDATE" in one["sql"].split("FOR UPDATE")[0]]
    (statement,) = statements
    assert "SELECT" not in statement
    assert statement.count("fencing_token") == 2
    assert f"<= {OLD}" in statement


def test_a_row_in_two_tables_is_refused_and_the_remedy_works() -> None:
    savings = Savings.objects.using("other").create(name="a", rate=1)
    entry = Entry.objects.using("other").create(name="e", value=1)
    for child, values in ((savings, {"rate": 2}), (entry, {"value": 2}), (entry, {"note": "n"})):
        rows = type(child).objects.using("other").filter(pk=child.pk)
        with pytest.raises(TypeError, match=r"fenced_update\(\) needs .* of one table"):
            rows.fenced_update(OLD, **values)
        with pytest.raises(TypeError, match=r"fenced_save\(\) needs a model of one table"):
            child.fenced_save(OLD)
    with transaction.atomic(using="other"):
        assert update(OLD) == 1
        savings.rate = 3
        savings.save()
    assert stored() == (0, OLD)
    assert Savings.objects.using("other").get().rate == 3


def test_a_proxy_is_the_same_table() -> None:
    make(token=NEW)
    frozen = Frozen.objects.using("other").get()
    with pytest.raises(StaleToken, match=r"app\.Frozen"):
        frozen.fenced_save(OLD)
    frozen.fenced_save(NEW)
    assert Frozen.objects.using("other").fenced_update(NEW + 1, balance=5) == 1
    assert stored() == (5, NEW + 1)


# -- save ------------------------------------------------------------------------------


def test_a_first_save_creates_the_row_with_the_token() -> None:
    account = Account(name="a", balance=3)
    account.fenced_save(OLD, using="other")
    assert stored() == (3, OLD)
    assert (account.fencing_token, account._state.adding, account._state.db) == (
        OLD,
        False,
        "other",
    )
    assert not Account.objects.using("default").exists()


def test_a_save_of_an_instance_that_was_not_read_is_compared_too() -> None:
    make(token=NEW, balance=7)
    with pytest.raises(StaleToken):
        Account(name="a", balance=3).fenced_save(OLD, using="other")
    assert stored() == (7, NEW)
    Account(name="a", balance=3).fenced_save(NEW, using="other")
    assert stored() == (3, NEW)


def test_a_save_over_a_row_whose_key_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Django inserts a new instance then, without a look; here the row is known to be there."""
    monkeypatch.setattr(Account._meta.get_field("name"), "default", "z")
    make()
    Account(name="a", balance=3).fenced_save(OLD, using="other")
    assert stored() == (3, OLD)


def test_a_save_with_a_key_from_the_database_creates_a_row() -> None:
    event = Event(text="t")
    event.fenced_save(OLD, using="other")
    event.text = "u"
    event.fenced_save(OLD)
    assert list(Event.objects.using("other").values_list("text", "fencing_token")) == [("u", OLD)]


def test_update_fields_are_kept_to() -> None:
    make(balance=1)
    account = accounts.get()
    account.balance, account.counter_id = 2, 4711
    account.fenced_save(OLD, update_fields=["balance"])
    assert stored() == (2, OLD)
    assert accounts.get().counter_id is None
    account.fenced_save(NEW, update_fields=[])  # only the token
    assert stored() == (2, NEW)
    assert account.fencing_token == NEW


def test_update_fields_of_a_row_that_is_gone_do_not_exist() -> None:
    account = make()
    accounts.all().delete()
    with pytest.raises(Account.DoesNotExist, match=r"no app\.Account 'a'"):
        account.fenced_save(OLD, update_fields=["balance"])
    with pytest.raises(Event.DoesNotExist):
        Event().fenced_save(OLD, using="other", update_fields=["text"])
    assert not accounts.exists()


def test_a_refused_save_leaves_the_instance_as_it_was() -> None:
    account = make(token=NEW)
    with pytest.raises(StaleToken):
        account.fenced_save(OLD)
    assert account.fencing_token == NEW


def test_expressions_and_deferred_fields_are_saved() -> None:
    make(balance=1)
    account = accounts.get()
    account.balance = F("balance") + 1
    account.fenced_save(OLD)
    part = accounts.only("name", "balance").get()
    part.balance += 5
    part.fenced_save(OLD)
    assert stored() == (7, OLD)


def test_an_overridden_save_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: Account, *args: Any, **options: Any) -> None:
        self.balance += 100
        super(Account, self).save(*args, **options)

    monkeypatch.setattr(Account, "save", save)
    Account(name="a", balance=1).fenced_save(OLD, using="other")
    assert stored() == (101, OLD)
    accounts.get().fenced_save(OLD)
    assert stored() == (201, OLD)


@contextlib.contextmanager
def just_before_the_write(do: Callable[[], Any]) -> Iterator[None]:
    """Let something happen between the comparison and the write of a save."""

    def receiver(sender: Any, **more: Any) -> None:
        pre_save.disconnect(receiver, sender=Account)
        do()

    pre_save.connect(receiver, sender=Account)
    try:
        yield
    finally:
        pre_save.disconnect(receiver, sender=Account)


@servers  # on SQLite nobody else can write meanwhile
def test_a_row_that_a_newer_holder_creates_at_the_same_moment_is_not_overwritten() -> None:
    account = Account(name="a", balance=1)
    with just_before_the_write(lambda: in_thread(lambda: make(token=NEW, balance=7))):
        with pytest.raises(IntegrityError):
            account.fenced_save(OLD, using="other")
    assert stored() == (7, NEW)
    with pytest.raises(StaleToken):
        account.fenced_save(OLD, using="other")
    assert stored() == (7, NEW)


@servers
def test_a_newer_holder_that_creates_too_late_writes_at_its_second_try() -> None:
    account = Account(name="a", balance=1)
    with just_before_the_write(lambda: in_thread(lambda: make(token=OLD, balance=7))):
        with pytest.raises(IntegrityError):
            account.fenced_save(NEW, using="other")
    account.fenced_save(NEW, using="other")
    assert stored() == (1, NEW)


# -- what is not fenced ------------------------------------------------------------------


def unfenced(account: Account) -> dict[str, Callable[[], Any]]:
    rows = accounts.filter(name="a")
    return {
        "save": account.save,
        "update_fields": lambda: account.save(update_fields=["balance", "fencing_token"]),
        "update": lambda: rows.update(balance=5),
        "update_or_create": lambda: accounts.update_or_create(name="a", defaults={"balance": 5}),
        "get_or_create": lambda: accounts.get_or_create(name="a"),
        "bulk_update": lambda: accounts.bulk_update([account], ["balance"]),
    }


@pytest.mark.parametrize("how", list(unfenced(Account())))
def test_an_ordinary_write_of_an_old_instance_leaves_the_token(how: str) -> None:
    account = make(token=OLD)
    update(NEW, balance=1)
    account.balance = 5
    assert account.fencing_token == OLD  # as it was read
    unfenced(account)[how]()
    assert stored() == (1 if how == "get_or_create" else 5, NEW)
    with pytest.raises(StaleToken):
        update(OLD)


def test_an_upsert_leaves_the_token() -> None:
    make(token=NEW)
    mysql = connection.vendor == "mysql"
    accounts.bulk_create(
        [Account(name="a", balance=5)],
        update_conflicts=True,
        update_fields=["balance"],
        unique_fields=None if mysql else ["name"],
    )
    assert stored() == (5, NEW)


def test_the_token_is_no_field_of_a_form_and_has_a_default_in_the_database() -> None:
    field = Account._meta.get_field("fencing_token")
    assert isinstance(field, FencingTokenField)
    assert not field.editable
    with connections["other"].cursor() as cursor:
        cursor.execute("INSERT INTO app_account (name, balance) VALUES ('a', 1)")
    assert stored() == (1, 0)
    path, arguments = field.deconstruct()[1::2]
    assert path == "distlock.fencing.FencingTokenField"
    assert arguments == {"default": 0, "db_default": 0, "editable": False}


def test_a_queryset_of_ones_own() -> None:
    class Mine(FencedQuerySet[Account]):
        def rich(self) -> Mine:
            return self.filter(balance__gt=10)

    make("a", balance=20)
    make("b", balance=1)
    manager: Any = models.Manager.from_queryset(Mine)()
    manager.model = Account
    assert manager.using("other").rich().fenced_update(OLD, balance=30) == 1
    assert (stored("a"), stored("b")) == ((30, OLD), (1, 0))
    assert issubclass(Account, FencedModel)


def test_the_model_works_without_distlock_among_the_apps() -> None:
    """So does the receiver of a token, which has no locks of its own."""
    code = (
        "import django; from django.conf import settings\n"
        "settings.configure(); django.setup()\n"
        "import distlock.fencing as f; print(f.FencedModel._meta.abstract)"
    )
    told = subprocess.check_output([sys.executable, "-W", "error", "-c", code], text=True)
    assert told == "True\n"


# -- transactions ----------------------------------------------------------------------


@either
def test_a_swallowed_stale_token_cannot_commit(write: Callable[..., int]) -> None:
    make("a", token=NEW)
    make("b")
    with transaction.atomic(using="other"):
        accounts.filter(name="b").fenced_update(OLD, balance=5)
        with contextlib.suppress(StaleToken):
            write(OLD, balance=5)
        with pytest.raises(transaction.TransactionManagementError):
            accounts.count()
    assert stored("b") == (0, 0)


def test_a_savepoint_of_ones_own_limits_what_is_rolled_back() -> None:
    make("a", token=NEW)
    make("b")
    with transaction.atomic(using="other"):
        with pytest.raises(StaleToken), transaction.atomic(using="other"):
            update(OLD, balance=5)
        accounts.filter(name="b").fenced_update(OLD, balance=5)
    assert (stored("a"), stored("b")) == ((0, NEW), (5, OLD))


@pytest.mark.django_db(databases=["default", "other"])
def test_in_a_testcase_a_stale_token_is_as_harmless_as_outside_a_transaction() -> None:
    make("a", token=NEW)
    make("b")
    with pytest.raises(StaleToken):
        accounts.all().fenced_update(OLD, balance=5)
    with pytest.raises(StaleToken):
        Account(name="a").fenced_save(OLD, using="other")
    assert set(accounts.values_list("balance", "fencing_token")) == {(0, NEW), (0, 0)}
    with transaction.atomic(using="other"):
        with contextlib.suppress(StaleToken):
            accounts.filter(name="a").fenced_update(OLD)
        with pytest.raises(transaction.TransactionManagementError):
            accounts.count()


def test_a_rolled_back_write_leaves_no_token() -> None:
    make()
    with transaction.atomic(using="other"):
        update(NEW, balance=5)
        transaction.set_rollback(True, using="other")
    assert stored() == (0, 0)
    assert update(OLD, balance=5) == 1


def test_a_stale_token_stops_a_commit_that_it_is_raised_in() -> None:
    """Raised while Django commits, it is an error of the database to Django."""
    assert issubclass(StaleToken, DatabaseError)


def test_raising_the_token_first_keeps_every_older_holder_out() -> None:
    """The read is behind the fence: what it saw cannot be changed by an older one any more."""
    make(balance=10)
    update(NEW)
    balance = accounts.get().balance
    with pytest.raises(StaleToken):
        update(OLD, balance=F("balance") + 1)
    update(NEW, balance=balance + 1)
    assert stored() == (11, NEW)


# -- two holders at a time -----------------------------------------------------------------


class Started:
    """Something that runs in a thread of its own, and may have to wait there."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.error: BaseException | None = None
        self._function = function
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._function()
        except BaseException as error:
            self.error = error
        finally:
            connections.close_all()

    def waits(self) -> bool:
        self._thread.join(0.5)
        return self._thread.is_alive()

    def end(self) -> BaseException | None:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.error


def save_unread(token: int, **values: Any) -> int:
    """A save that reads nothing first; on SQLite a read would make the write fail at once."""
    Account(name="a", **values).fenced_save(token, using="other")
    return 1


at_a_time = pytest.mark.parametrize("write", [update, save_unread])


@at_a_time
def test_an_old_write_that_waits_for_a_newer_one_is_refused(write: Callable[..., int]) -> None:
    make()
    with transaction.atomic(using="other"):
        update(NEW, balance=7)
        old = Started(lambda: write(OLD, balance=5))
        assert old.waits()
    assert isinstance(old.end(), StaleToken)
    assert stored() == (7, NEW)


@at_a_time
def test_an_old_write_that_waits_for_a_newer_one_that_rolls_back_passes(
    write: Callable[..., int],
) -> None:
    make()
    with transaction.atomic(using="other"):
        update(NEW, balance=7)
        old = Started(lambda: write(OLD, balance=5))
        assert old.waits()
        transaction.set_rollback(True, using="other")
    assert old.end() is None
    assert stored() == (5, OLD)


@at_a_time
def test_a_newer_write_that_waits_for_an_old_one_passes(write: Callable[..., int]) -> None:
    make()
    with transaction.atomic(using="other"):
        update(OLD, balance=5)
        new = Started(lambda: write(NEW, balance=7))
        assert new.waits()
    assert new.end() is None
    assert stored() == (7, NEW)


def test_a_newer_write_waits_for_a_save_between_its_comparison_and_its_write() -> None:
    make()
    newer: list[Started] = []

    def start() -> None:
        newer.append(Started(lambda: update(NEW, balance=7)))
        assert newer[0].waits()

    with just_before_the_write(start):
        save_unread(OLD, balance=5)
    assert newer[0].end() is None
    assert stored() == (7, NEW)


@servers
def test_a_row_that_is_created_meanwhile_is_waited_for() -> None:
    with transaction.atomic(using="other"):
        make(token=NEW, balance=7)
        old = Started(lambda: save_unread(OLD, balance=5))
        assert old.waits()
    assert isinstance(old.end(), IntegrityError | StaleToken)  # it waits at one or the other
    assert stored() == (7, NEW)


def test_many_holders_write_in_the_order_of_their_tokens() -> None:
    """Each write notes itself in the transaction of the row; nobody ever follows a newer one."""
    make()
    refused: list[int] = []

    def holder(number: int) -> None:
        for turn in random.Random(number).sample(range(10), 10):
            token = turn * 10 + number + 1
            with contextlib.suppress(StaleToken), transaction.atomic(using="other"):
                update(token, balance=token)
                Event.objects.using("other").create(text=str(token), fencing_token=token)
                continue
            refused.append(token)
            assert stored_here() >= token

    def stored_here() -> int:
        return int(accounts.values_list("fencing_token", flat=True).get(name="a"))

    threads = [Started(lambda number=number: holder(number)) for number in range(4)]  # type: ignore[misc]
    assert [thread.end() for thread in threads] == [None] * 4
    events = Event.objects.using("other").order_by("pk")
    written = list(events.values_list("fencing_token", flat=True))
    assert written == sorted(written)
    assert sorted(written + refused) == [*range(1, 5)] + [
        10 * turn + number for turn in range(1, 10) for number in range(1, 5)
    ]
    assert len(refused) > 0
    assert stored() == (94, 94)


@servers
def test_no_stale_increment_is_added_while_writers_race() -> None:
    """An old holder that writes on and on is never heard again once the new one has begun."""
    make()
    begun = threading.Event()
    stop = threading.Event()
    late: list[int] = []

    def old() -> None:
        while not stop.is_set():
            after = begun.is_set()
            with contextlib.suppress(StaleToken):
                update(OLD, balance=F("balance") + 1)
                if after:
                    late.append(1)

    olds = [Started(old) for _ in range(3)]
    deadline = time.monotonic() + 20
    while not stored()[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    update(NEW)
    begun.set()
    before = stored()[0]
    for _ in range(20):
        balance = accounts.get().balance
        time.sleep(0.005)
        update(NEW, balance=balance + 1)
    stop.set()
    assert [one.end() for one in olds] == [None] * 3
    assert late == []
    assert before > 0
    assert stored() == (before + 20, NEW)


@contextlib.contextmanager
def snapshots(isolation: str) -> Iterator[None]:
    """This thread's connection to the other database, at another level of isolation."""
    on = connections["other"]
    with on.cursor() as cursor:
        if on.vendor == "postgresql":
            cursor.execute(f"SET default_transaction_isolation = '{isolation}'")
        else:
            cursor.execute(f"SET SESSION TRANSACTION ISOLATION LEVEL {isolation}")
    try:
        yield
    finally:
        on.close()


@servers
@either
@pytest.mark.parametrize(
    "isolation",
    # On MariaDB a plain read locks the row at SERIALIZABLE, so that no newer write can come.
    ["REPEATABLE READ", pytest.param("SERIALIZABLE", marks=pytest.mark.vendor("postgresql"))],
)
def test_a_snapshot_from_before_a_newer_write_hides_nothing(
    isolation: str, write: Callable[..., int]
) -> None:
    make()
    refusal = OperationalError if connection.vendor == "postgresql" else StaleToken
    with snapshots(isolation):
        with pytest.raises(refusal), transaction.atomic(using="other"):
            assert accounts.get().balance == 0
            in_thread(lambda: update(NEW, balance=7))
            write(OLD, balance=5)
    assert stored() == (7, NEW)


def test_leases_and_tokens_fence_across_two_databases() -> None:
    """The whole story: a paused holder, its successor, and what the row says to each."""
    make(balance=10)
    told: list[str] = []
    paused: Lease = lock("account", ttl=0.3, renew=False).acquire()
    seen_by_paused = accounts.get().balance
    time.sleep(0.5)
    with lock("account") as successor:
        update(successor)
        seen = accounts.get().balance
        try:
            update(paused.token, balance=seen_by_paused + 1)
        except StaleToken:
            told.append("stale")
        update(successor, balance=seen + 1)
    with contextlib.suppress(LockLost):
        paused.release()
    assert told == ["stale"]
    assert stored() == (11, successor.token)
