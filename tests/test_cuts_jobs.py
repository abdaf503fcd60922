"""A job whose connection breaks at its end: whoever calls again finds the receipt, or runs it.

What comes before, the look for the receipt and the acquire, is tried elsewhere.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from django.db import DatabaseError, connection, connections, transaction

from distlock import CommitOutcomeUnknown, once
from distlock.models import Job
from tests.app.models import Counter
from tests.cuts import ALIAS, COMMIT, SOON, Disturbed, sweep, warm
from tests.proxy import Proxy
from tests.support import in_thread

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "other"]),
    pytest.mark.vendor("postgresql", "mysql"),
    pytest.mark.slow,
    pytest.mark.usefixtures("nothing_is_lost"),
]

Form = Callable[[str], str]

RECEIPT = f"UPDATE {connection.ops.quote_name(Job._meta.db_table)}".encode()
"""What only the message with the receipt contains."""


def effect(name: str) -> str:
    """Leave a row that is like no other."""
    return Counter.objects.using(ALIAS).create(name=f"{name}/{uuid.uuid4().hex}").name


def atomic(name: str) -> str:
    return once(name, wait=SOON, ttl=60, using=ALIAS).run(effect, name)


def inside(name: str) -> str:
    with transaction.atomic(using=ALIAS):
        return atomic(name)


forms = pytest.mark.parametrize("form", [atomic, inside])


def effects(name: str) -> list[str]:
    """What has taken effect, as a connection past the proxy sees it."""
    rows = Counter.objects.filter(name__startswith=f"{name}/").values_list("name", flat=True)
    return in_thread(lambda: list(rows))


def call(form: Form, name: str) -> str | DatabaseError:
    try:
        return form(name)
    except DatabaseError as error:
        return error


def check(form: Form, name: str, first: str | DatabaseError) -> None:
    """What was reported has happened, and a second call makes it happen exactly once."""
    if isinstance(first, str):
        assert effects(name) == [first], "reported as done"
    elif not isinstance(first, CommitOutcomeUnknown):
        assert effects(name) == [], f"reported as not done: {first!r}"
    connections[ALIAS].close()
    second = form(name)
    assert effects(name) == [second]
    assert in_thread(lambda: Job.objects.get(key=name)).result == second
    assert form(name) == second


@forms
def test_from_the_receipt_on_at_every_message(proxy: Proxy, form: Form) -> None:
    def scenario(name: str, cut: Disturbed) -> None:
        warm()
        with cut:
            first = call(form, name)
        check(form, name, first)

    assert len(sweep(proxy, scenario, since=RECEIPT)) >= 10


def test_a_commit_whose_answer_is_lost_for_good(proxy: Proxy) -> None:
    unknown: list[str] = []

    def scenario(name: str, cut: Disturbed) -> None:
        warm()
        with cut:
            first = call(atomic, name)
        proxy.come_up()
        if isinstance(first, CommitOutcomeUnknown):
            unknown.extend(effects(name) or [""])
        check(atomic, name, first)

    sweep(proxy, scenario, since=COMMIT, down=True)
    assert any(unknown), "nothing was committed unseen, so this proves nothing"
