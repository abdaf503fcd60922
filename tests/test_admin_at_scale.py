"""The admin with a million locks and jobs: a few queries, and each one by an index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from distlock.admin import paging
from distlock.models import DistributedLock, Job
from tests.conformance.rows import execute, query
from tests.test_admin import browser, text

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.vendor("postgresql", "mysql"),
    pytest.mark.slow,
    pytest.mark.timeout(240),
]

MILLION = 1_000_000
LOCKS, JOBS = "/admin/distlock/distributedlock/", "/admin/distlock/job/"
TABLES = ("distlock_distributedlock", "distlock_job", "distlock_ticket")
MIDDLE = "lock:0500000"
NUMBERS = {
    "postgresql": "generate_series(1, %s) AS n (seq)",
    "mysql": "seq_1_to_1000000 WHERE seq <= %s",
}
LOCK = "CONCAT('lock:', LPAD(RTRIM(CAST(seq AS char(7))), 7, '0')), seq, 'web-1', CURRENT_TIMESTAMP"
JOB = "CONCAT('job:', LPAD(RTRIM(CAST(seq AS char(7))), 7, '0')), 'running', CURRENT_TIMESTAMP"


def fill() -> None:
    key = connection.ops.quote_name("key")
    for columns, values in (
        ("distlock_distributedlock (name, fencing_token, host, expires_at)", LOCK),
        (f"distlock_job ({key}, state, expires_at)", JOB),
    ):
        numbers = NUMBERS[connection.vendor]
        execute(f"INSERT INTO {columns} SELECT {values} FROM {numbers}", [MILLION])


@pytest.fixture
def million(transactional_db: None) -> Iterator[Client]:
    """A browser, and a million rows in each table."""
    fill()
    for table in TABLES:
        execute(f"{'ANALYZE TABLE' if connection.vendor == 'mysql' else 'ANALYZE'} {table}")
    yield browser("view_distributedlock", "view_job", "force_release", "free_job", "rerun_job")
    for table in TABLES:
        execute(f"TRUNCATE TABLE {table}")


@contextmanager
def cheap(most: int = 10) -> Iterator[None]:
    """Fail unless the block sends few statements, each of which reads rows by an index."""
    with CaptureQueriesContext(connection) as sent:
        yield
    statements = [each["sql"] for each in sent.captured_queries]
    assert len(statements) <= most, statements
    ours = [sql for sql in statements if any(table in sql for table in TABLES)]
    assert ours
    for sql in ours:
        assert "COUNT(*)" not in sql
        plan = explained(sql)
        assert not scans(plan), f"{sql}\n{plan}"


def explained(sql: str) -> Any:
    if connection.vendor == "postgresql":
        # With what was read, and not only what was expected.
        [[found]] = query(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql.replace('%', '%%')}")
        return found if isinstance(found, list) else json.loads(found)
    return query(f"ANALYZE FORMAT=JSON {sql.replace('%', '%%')}")[0][0]


def scans(plan: Any) -> list[str]:
    """What a plan reads without an index, or more of than a page has rows."""
    if connection.vendor == "postgresql":
        nodes = list(nodes_of(plan[0]["Plan"]))
        return [
            str(node)
            for node in nodes
            if (node["Node Type"] == "Seq Scan" and node.get("Relation Name") in TABLES[:2])
            or node["Actual Rows"] * node["Actual Loops"] > 500
            or node.get("Rows Removed by Filter", 0) > 500
        ]
    kinds = re.findall(r'"access_type": "(\w+)"', plan)
    rows = [float(number) for number in re.findall(r'"r_rows": ([0-9.]+)', plan)]
    return [kind for kind in kinds if kind == "ALL"] + [str(each) for each in rows if each > 500]


def nodes_of(node: Any) -> Iterator[Any]:
    yield node
    for child in node.get("Plans", ()):
        yield from nodes_of(child)


def test_a_million_rows(million: Client) -> None:
    client = million
    client.get(LOCKS)
    held = DistributedLock.objects.get(name=MIDDLE).pk
    job = Job.objects.get(key="job:0500000").pk
    after = quote(json.dumps([MIDDLE, 0]))
    for address in (
        LOCKS,
        f"{LOCKS}?after={after}",
        f"{LOCKS}?before={after}",
        f"{LOCKS}?o=-1",
        f"{LOCKS}?o=-1&after={after}",
        f"{LOCKS}?q=lock:05",
        f"{LOCKS}?q=lock:0512345",
        f"{LOCKS}?q=lock:05&after={after}",
        f"{LOCKS}?q=nothing",
        f"{LOCKS}?q=l",
        f"{LOCKS}live/?" + "&".join(f"pk={held + more}" for more in range(50)),
        f"{LOCKS}{held}/change/",
        JOBS,
        f"{JOBS}?after=[{job}]",
        f"{JOBS}?before=[{job}]",
        f"{JOBS}?q=job:05",
        f"{JOBS}?q=job:0512345",
        f"{JOBS}?q=nothing",
        f"{JOBS}{job}/change/",
    ):
        with cheap():
            response = client.get(address)
        assert response.status_code == 200, address
    assert "lock:0512345" in text(client.get(f"{LOCKS}?q=lock:0512345"))
    assert "lock:0500001" in text(client.get(f"{LOCKS}?after={after}"))
    assert "lock:0499999" in text(client.get(f"{LOCKS}?before={after}"))
    what_may_scan_is_stopped(client)
    all_of_them_are_too_many(client)


def what_may_scan_is_stopped(client: Client) -> None:
    said = text(client.get(f"{LOCKS}?q=no-such-host&in=all"))
    assert "There is nothing to show" in said or "was stopped" in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paging, "PATIENCE", 0.05)
        for address in (
            f"{LOCKS}?q=no-such-host&in=all",
            f"{LOCKS}?state=held",
            f"{LOCKS}?host=nowhere",
            f"{LOCKS}?o=-3",
            f"{JOBS}?state=queued",
        ):
            assert "was stopped" in text(client.get(address)), address
        assert "was stopped" not in text(client.get(LOCKS))


def all_of_them_are_too_many(client: Client) -> None:
    post = {"action": "force_release", "_selected_action": ["1"], "select_across": "1"}
    with CaptureQueriesContext(connection) as sent:
        assert client.post(LOCKS, post).status_code == 302
    asked = [each["sql"] for each in sent.captured_queries if TABLES[0] in each["sql"]]
    assert all("LIMIT" in sql or "IN (" in sql for sql in asked), asked
