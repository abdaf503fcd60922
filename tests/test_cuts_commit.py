"""A COMMIT whose connection breaks: what is reported is what has happened."""

from __future__ import annotations

import re

import pytest
from django.db import connections

from distlock import CommitOutcomeUnknown
from tests.cuts import (
    ALIAS,
    COMMIT,
    SOON,
    Disturbed,
    Form,
    Work,
    forms,
    sweep,
    warm,
)
from tests.proxy import Cut, Proxy
from tests.support import becomes_free, is_free

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "other"]),
    pytest.mark.vendor("postgresql", "mysql"),
    pytest.mark.slow,
    pytest.mark.usefixtures("nothing_is_lost"),
]


def close_if_it_broke_unseen(work: Work, cut: Disturbed) -> None:
    """A connection that breaks while nobody speaks is a matter of Django's, as always.

    So is one that breaks when a transaction is begun on MariaDB, by SET autocommit=0.
    """
    after = isinstance(cut.rule, Cut) and cut.rule.after and work.error is None
    said = cut.rule.message.data if cut.rule.message else b""
    if after or re.search(rb"autocommit(=0|\x03OFF)", said):
        connections[ALIAS].close()


# -- at every message --------------------------------------------------------------------------


@forms
def test_a_cut_transaction_is_reported_as_it_ended(proxy: Proxy, form: Form) -> None:
    """The server learns of it, so that nothing stays unknown."""

    def scenario(name: str, cut: Disturbed) -> None:
        warm()
        work = Work(name)
        with cut:
            work.do(form)
        work.check()
        assert not isinstance(work.error, CommitOutcomeUnknown)
        assert becomes_free(name, SOON)
        work.check()
        close_if_it_broke_unseen(work, cut)
        work.check_the_next()

    sweep(proxy, scenario)


@forms
def test_without_the_database_the_outcome_is_unknown(proxy: Proxy, form: Form) -> None:
    unknown: list[str] = []

    def scenario(name: str, cut: Disturbed) -> None:
        warm()
        work = Work(name)
        with cut:
            work.do(form)
        work.check()
        if isinstance(work.error, CommitOutcomeUnknown):
            unknown.append(name)
        proxy.come_up()
        assert becomes_free(name, SOON)
        work.check()
        close_if_it_broke_unseen(work, cut)
        work.check_the_next()

    cuts = sweep(proxy, scenario, since=COMMIT, down=True)
    assert unknown, f"none of {len(cuts)}"


@forms
def test_a_commit_is_looked_up_though_the_server_keeps_the_session(
    proxy: Proxy, form: Form
) -> None:
    """Only the client sees the cut. What has not reached the server stays unknown."""

    def scenario(name: str, cut: Disturbed) -> None:
        warm()
        work = Work(name)
        with cut:
            work.do(form)
        work.check()
        if isinstance(work.error, CommitOutcomeUnknown):
            assert not is_free(name), "the server may still be told to commit"
            assert cut.rule.message is not None
            assert COMMIT in cut.rule.message.data
            cut.rule.message.link.cut()
        assert becomes_free(name, SOON)
        work.check()
        close_if_it_broke_unseen(work, cut)
        work.check_the_next()

    sweep(proxy, scenario, since=COMMIT, server_stays=True)
