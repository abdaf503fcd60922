"""Real processes add one to a counter under every kind of fence, while everything goes wrong.

No update may be lost, protected commits must be ordered by token, and each run must prove that its
nemesis bit: one in which no holder lost its lease proves nothing.
"""

from __future__ import annotations

import glob
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.db import connection

from tests.databases import query
from tests.private_server import Server
from tests.servers import SERVERS
from tests.torture import nemeses
from tests.torture.conftest import LEVEL
from tests.torture.history import History
from tests.torture.workers import Workers

pytestmark = [
    pytest.mark.torture,
    pytest.mark.vendor("postgresql", "mysql"),
    pytest.mark.timeout(7200),
]

TTL = 0.6
FENCES = ("guard", "atomic", "inside", "guard")
HARMS = {
    "ci": {"pause": 8, "kill": 8, "terminate": 15, "crash": 2, "freeze": 2, "clock": 4},
    "short": {"pause": 25, "kill": 25, "terminate": 40, "crash": 5, "freeze": 5, "clock": 10},
    "long": {"pause": 300, "kill": 300, "terminate": 300, "crash": 50, "freeze": 50, "clock": 100},
}[LEVEL]
HARMS["everything"] = HARMS["pause"] * 2


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A durable server of its own: it will be killed."""
    with SERVERS[{"mysql": "mariadb"}.get(connection.vendor, connection.vendor)](
        durable=True
    ) as server:
        yield server


@pytest.fixture
def workers(server: Server, tmp_path: Path) -> Iterator[Workers]:
    found = Workers(server.url, tmp_path)
    found.manage("migrate", "--run-syncdb", "-v0")
    query(server.url, "INSERT INTO app_counter (name, value) VALUES ('torture', 0)")
    yield found
    found.end()


def number(server: Server, sql: str) -> int:
    found = query(server.url, sql)
    assert found is not None
    return int(found[0])


def run(name: str, workers: Workers, server: Server, fences: tuple[str, ...] = FENCES) -> History:
    """Let a nemesis loose on the workers; return what they say they did."""
    for fence in fences:
        workers.start("tests.torture.guarded", fence, TTL, workers.folder)
    time.sleep(2)
    for _ in range(HARMS[name]):
        getattr(nemeses, name)(workers, server, TTL)
    workers.finish(60)
    history = History.read(workers.folder)
    told = len(history.lost)
    losses = number(server, "SELECT losses FROM distlock_distributedlock WHERE name = 'torture'")
    outcomes = [commit["outcome"] for commit in history.commits]
    print(  # noqa: T201  (the figures of docs/promises.md)
        f"\n{name}: {HARMS[name]} harms, {outcomes.count('ok')} commits, "
        f"{outcomes.count('failed')} refused, {outcomes.count('unknown')} unknown, "
        f"{told} told of a loss, {losses} leases ended by others"
    )
    assert outcomes.count("ok") > 20, workers.said()
    assert told or losses or history.errors, "the nemesis did not bite"
    return history


def check(history: History, server: Server) -> None:
    value = number(server, "SELECT value FROM app_counter WHERE name = 'torture'")
    assert history.counter_faults(value) == []
    assert history.overwritten() == []
    assert history.unordered_commits() == []


@pytest.mark.parametrize("name", ["pause", "kill", "terminate", "crash", "freeze", "everything"])
def test_no_update_is_lost(name: str, workers: Workers, server: Server) -> None:
    history = run(name, workers, server)
    check(history, server)
    if name in ("pause", "freeze", "everything"):
        assert history.lost, "no holder lost its lease, so this proves nothing"


@pytest.fixture
def faked_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server, and only the server, lives by a clock that a file moves."""
    libraries = glob.glob(nemeses.FAKETIME)
    assert libraries, "libfaketime is not installed (Debian: faketime)"
    offset = tmp_path / "offset"
    offset.write_text("+0\n")
    offset.chmod(0o666)
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/tmp") and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    environment = {
        "LD_PRELOAD": libraries[0],
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_RESET": "1",
    }
    real = Server.__init__

    def init(self: Server, **arguments: bool) -> None:
        real(self, **arguments)
        self.environment = environment

    monkeypatch.setattr(Server, "__init__", init)


def test_no_update_is_lost_though_the_clock_jumps(
    faked_clock: None, workers: Workers, server: Server
) -> None:
    history = run("clock", workers, server)
    check(history, server)
    assert history.lost, "no holder lost its lease, so this proves nothing"


if LEVEL != "ci":  # eight pauses may all miss

    def test_without_a_fence_the_same_pauses_lose_updates(workers: Workers, server: Server) -> None:
        """If nothing were lost here, the runs above would prove nothing."""
        history = run("pause", workers, server, ("none",) * 4)
        value = number(server, "SELECT value FROM app_counter WHERE name = 'torture'")
        assert history.counter_faults(value) or history.overwritten()
