"""The checker itself: a history that can be true has no faults, and each fault is found."""

from __future__ import annotations

import json
from collections import Counter
from math import inf
from pathlib import Path
from typing import Any

import pytest

from tests.torture.figures import Figures, table
from tests.torture.history import Entry, History, Recorder, lost_updates, unordered

pytestmark = pytest.mark.vendor("sqlite")  # no database is asked: once is enough


def grant(token: int, since: float, at: float) -> dict[str, Any]:
    return {"op": "grant", "token": token, "since": since, "at": at}


def hold(token: int, since: float, until: float) -> dict[str, Any]:
    return {"op": "hold", "token": token, "since": since, "until": until, "at": until}


def commit(token: int, wrote: int, sent: float, outcome: str = "ok") -> dict[str, Any]:
    key = f"key {token}"
    return {"key": key, "token": token, "wrote": wrote, "sent": sent, "outcome": outcome}


def killed(at: float, point: str = "anywhere") -> dict[str, Any]:
    return {"op": "killed", "at": at, "point": point, "pid": 1}


def entry(token: int, wrote: int) -> Entry:
    return Entry(f"key {token}", token, wrote)


@pytest.fixture
def history() -> History:
    """Three holders, one after another; the outcome of the third is not known, and it committed."""
    return History(
        grants=[grant(10, 0.0, 1.0), grant(20, 2.0, 3.0), grant(30, 3.5, 5.0)],
        holds=[hold(10, 1.0, 2.5), hold(20, 3.0, 4.0), hold(30, 5.0, 6.0)],
        commits=[commit(10, 1, 2.5), commit(20, 2, 4.0), commit(30, 3, 6.0, "unknown")],
    )


LEDGER = [entry(10, 1), entry(20, 2), entry(30, 3)]


def test_what_can_be_true_has_no_faults(history: History) -> None:
    assert history.faults(3, LEDGER) == []


def test_an_unknown_outcome_may_be_a_failure(history: History) -> None:
    assert history.faults(2, LEDGER[:2]) == []


def test_a_failure_and_a_kill_before_commit_leave_nothing(history: History) -> None:
    history.commits[2]["outcome"] = "failed"
    history.grants.append(grant(40, 6.0, 6.5))  # and then it was killed
    assert history.faults(2, LEDGER[:2]) == []


# -- S1 ------------------------------------------------------------------------------------------


def test_two_that_hold_at_once(history: History) -> None:
    history.holds[1]["since"] = 2.4
    assert history.overlaps() == ["token 20 was held while 10 was"]
    assert history.faults(3, LEDGER) == history.overlaps()
    assert history.faults(3, LEDGER, one_holder=False) == []


def test_one_that_holds_through_the_next_but_one() -> None:
    history = History(holds=[hold(10, 1.0, 9.0), hold(20, 2.0, 3.0), hold(30, 4.0, 5.0)])
    assert history.overlaps() == [
        "token 20 was held while 10 was",
        "token 30 was held while 10 was",
    ]


def test_a_grant_to_one_that_died_while_another_held(history: History) -> None:
    history.grants.append(grant(25, 3.2, 3.4))
    assert history.overlaps() == ["token 25 was granted while 20 was held"]


def test_a_grant_that_may_have_come_after_the_end_of_a_hold(history: History) -> None:
    history.grants[1]["since"] = 2.4
    assert history.overlaps() == []


# -- S2 ------------------------------------------------------------------------------------------


def test_a_commit_after_that_of_a_later_holder(history: History) -> None:
    ledger = [entry(20, 1), entry(10, 2), entry(30, 3)]
    assert unordered(ledger) == ["token 10 wrote 2 after token 20"]
    assert unordered(ledger)[0] in history.faults(3, ledger)


def test_a_commit_after_a_later_grant(history: History) -> None:
    """Though the later holder has committed nothing."""
    history.commits[0]["sent"] = 3.1
    assert history.late_commits(LEDGER) == ["token 10 committed after 20 was granted"]
    assert history.late_commits(LEDGER)[0] in history.faults(3, LEDGER)


def test_an_unknown_commit_after_a_later_grant(history: History) -> None:
    history.grants.append(grant(40, 5.5, 5.9))
    assert history.late_commits(LEDGER) == ["token 30 committed after 40 was granted"]
    assert history.late_commits(LEDGER[:2]) == [], "it did not take effect"


def test_a_commit_may_be_sent_while_the_next_grant_is_asked_for(history: History) -> None:
    history.grants[1]["since"] = 1.0
    assert history.late_commits(LEDGER) == []


# -- S5 ------------------------------------------------------------------------------------------


def test_a_token_that_goes_back(history: History) -> None:
    history.grants.append(grant(15, 5.5, 6.0))
    assert history.disorder() == ["token 15 was granted after 30"]
    assert history.disorder()[0] in history.faults(3, LEDGER)


def test_a_token_that_goes_back_a_little(history: History) -> None:
    history.grants.append(grant(25, 5.5, 6.0))
    assert history.disorder() == ["token 25 was granted after 30"]


def test_two_grants_at_once_may_be_noted_in_any_order() -> None:
    assert History(grants=[grant(20, 0.0, 1.0), grant(10, 0.5, 2.0)]).disorder() == []


def test_a_token_granted_twice() -> None:
    history = History(grants=[grant(20, 0.0, 1.0), grant(20, 0.5, 2.0)])
    assert history.disorder() == ["token 20 was granted twice"]


# -- the counter ---------------------------------------------------------------------------------


def test_an_update_that_was_overwritten(history: History) -> None:
    history.commits[2] = commit(30, 2, 6.0)
    ledger = [*LEDGER[:2], entry(30, 2)]
    assert lost_updates(2, ledger) == ["2 was written 2 times, by tokens [20, 30]"]
    assert history.counter_faults(2) == ["the counter is 2, but 3 commits are known and 0 unknown"]


def test_an_update_of_an_unknown_commit_that_was_overwritten(history: History) -> None:
    """The counter alone does not show it: the ledger does."""
    history.commits[2]["wrote"] = 2
    ledger = [*LEDGER[:2], entry(30, 2)]
    assert history.counter_faults(2) == []
    assert history.faults(2, ledger) == ["2 was written 2 times, by tokens [20, 30]"]


def test_an_update_that_vanished(history: History) -> None:
    assert lost_updates(2, LEDGER) == ["the counter is 2; who wrote 3?"]
    assert lost_updates(4, LEDGER) == ["the counter is 4; who wrote 4?"]


def test_a_failure_that_was_none(history: History) -> None:
    history.commits[2]["outcome"] = "failed"
    assert history.untruths(LEDGER) == ["token 30 wrote 3, and was told that it failed"]
    assert set(history.untruths(LEDGER)) <= set(history.faults(3, LEDGER))


def test_a_commit_of_one_that_had_not_sent_it(history: History) -> None:
    del history.commits[2]
    assert history.untruths(LEDGER) == ["token 30 wrote 3, and was told that it sent no COMMIT"]


def test_a_success_that_was_none(history: History) -> None:
    assert history.untruths(LEDGER[1:]) == ["token 10 was told that it wrote 1, and did not"]


# -- L2 ------------------------------------------------------------------------------------------


def test_the_wait_after_a_kill(history: History) -> None:
    history.kills = [killed(1.5, "in-body"), killed(4.5)]
    assert history.waits_after_kills() == [(1.5, "in-body"), (0.5, "anywhere")]


def test_the_wait_after_two_kills_runs_from_the_second(history: History) -> None:
    history.kills = [killed(2.5), killed(1.5)]
    assert history.waits_after_kills() == [(0.5, "anywhere")]


def test_nobody_follows_one_that_was_killed(history: History) -> None:
    history.kills = [killed(5.5)]
    assert history.waits_after_kills() == [(inf, "anywhere")]


# -- files, and figures --------------------------------------------------------------------------


def test_a_history_is_read_as_it_was_noted(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.note("grant", token=1, since=0.0)
    recorder.note("commit", key="a", token=1, wrote=1, sent=0.0, outcome="unknown")
    recorder.note("commit", key="a", token=1, wrote=1, sent=0.0, outcome="ok")
    recorder.note("error", token=0)
    recorder.note("error", token=2)
    recorder.close()
    torn = json.dumps({"op": "lost", "at": 1.0, "token": 3})
    (tmp_path / "other.jsonl").write_text(f"{torn}\n{torn[:-5]}")
    history = History.read(tmp_path)
    assert [grant["token"] for grant in history.grants] == [1]
    assert [commit["outcome"] for commit in history.commits] == ["ok"]
    assert [loss["token"] for loss in history.lost] == [3]
    assert [error["token"] for error in history.cut_off] == [2]


def test_figures_are_a_table_with_a_sum(history: History) -> None:
    history.kills = [killed(1.5)]
    history.lost = [{"token": 10}]
    common: dict[str, Any] = {"losses": 1000, "seconds": 59.6}
    first = Figures.of("kill", Counter(SIGKILL=3), history, lost_updates=0, **common)
    harms = Counter(SIGSTOP=4, SIGKILL=1)
    second = Figures.of("crash", harms, history, lost_updates=0, measured=False, **common)
    control = Figures.of("none", Counter(), History(), lost_updates=7, fenced=False, **common)
    assert table([first, control, second]).splitlines()[2:] == [
        "| kill | 3 SIGKILL | 2 | 0 | 1 | 1 | 0 | 1,000 | 1.50 s | 0 | 60 |",
        "| crash | 1 SIGKILL, 4 SIGSTOP | 2 | 0 | 1 | 1 | 0 | 1,000 |  | 0 | 60 |",
        "| **all** | 4 SIGKILL, 4 SIGSTOP | 4 | 0 | 2 | 2 | 0 | 2,000 | 1.50 s | 0 | 119 |",
        "| none |  | 0 | 0 | 0 | 0 | 0 | 1,000 |  | 7 | 60 |",
    ]
