"""PgBouncer in transaction mode: that the suite runs through it, and the server of the tests."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, transaction

from distlock.doctor import diagnose
from distlock.findings import Code
from distlock.lookout import lookout
from tests import pgbouncer
from tests.databases import Unavailable, query, rows
from tests.machine import free_port
from tests.pgbouncer import PgBouncer
from tests.support import eventually, in_thread
from tests.waiters import Waiter, held, instead_of

through_it = pytest.mark.vendor("pgbouncer")
once = pytest.mark.vendor("postgresql")


@through_it
@pytest.mark.django_db(transaction=True)
def test_each_transaction_may_run_in_another_session() -> None:
    def session() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return int(cursor.fetchone()[0])

    first = session()

    def meanwhile() -> int:
        with transaction.atomic():
            assert session() == first, "an idle session is not used again"
            return in_thread(session)

    assert in_thread(meanwhile) != first
    assert connection.connection.info.backend_pid != first, "the driver knows the session"


@through_it
@pytest.mark.django_db(transaction=True)
def test_behind_a_pooler_waiting_polls_and_that_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr("distlock.lookout.DEAF", 0.3)
    monkeypatch.setattr(lookout("default"), "_deaf", False)
    monkeypatch.setattr(lookout("default"), "_listen_at", 0.0)
    with held("x") as (lease,):
        waiter = Waiter("x")
        with instead_of("listen", lambda real, on: real(on)) as tries:
            assert eventually(lambda: len(tries) >= 3)
        released = time.monotonic()
        lease.release()
        assert waiter.result() - released < 0.8
    (said,) = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert "lock_waiting_polls" in said
    assert "pooler" in said


@pytest.fixture
def server() -> Iterator[PgBouncer]:
    try:
        made = PgBouncer()
    except Unavailable as reason:
        pytest.skip(str(reason))
    with made:
        yield made


@once
def test_it_pools_transactions_and_is_not_root(server: PgBouncer) -> None:
    assert query(server.url, "SELECT 1") == (1,)
    assert server.version.startswith("PostgreSQL")
    modes = {row[0]: row[-1] for row in rows(server.url, "SHOW POOLS", name="pgbouncer")}
    assert modes["distlock"] == "transaction"
    if Path("/proc").is_dir():
        assert Path(f"/proc/{server.pid}").stat().st_uid != 0


@once
def test_the_answer_of_another_one_is_not_taken_for_ours(server: PgBouncer, tmp_path: Path) -> None:
    assert server.is_ours() is True
    other = PgBouncer()
    other.home, other.process = tmp_path, server.process
    other.port, other.password = free_port(), server.password
    assert other.is_ours() is None  # nobody answers
    other.port = server.port
    assert other.is_ours() is False


@once
def test_stop_ends_both_and_may_be_called_twice(server: PgBouncer) -> None:
    pids, homes = [server.pid, server.behind.pid], [server.home, server.behind.home]
    server.stop()
    server.stop()
    for pid, home in zip(pids, homes, strict=True):
        assert home is not None
        assert not home.exists()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@once
def test_without_the_binary_the_reason_says_where_we_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pgbouncer, "directories", lambda *_: [tmp_path])
    with pytest.raises(Unavailable, match=rf"no pgbouncer found \(looked in {tmp_path}\)"):
        PgBouncer()


@through_it
@pytest.mark.django_db
def test_the_doctor_tells_of_a_pooler_that_server_side_cursors_would_break(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told() -> set[Code]:
        return {finding.code for finding in diagnose("default")} & {Code.POOLER, Code.NOT_EXAMINED}

    assert told() == set()
    monkeypatch.setitem(connection.settings_dict, "DISABLE_SERVER_SIDE_CURSORS", False)
    assert told() == {Code.POOLER}
