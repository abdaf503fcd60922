"""Real processes add one to a counter under every kind of fence, while everything goes wrong.

No update may be lost, protected commits must be ordered by token, and each run must prove that its
nemesis bit: one in which no holder lost its lease, or was cut off amid its work, proves nothing.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
from django.db import connection

from tests.databases import connect, query
from tests.machine import temp_root
from tests.private_server import Server
from tests.servers import SERVERS
from tests.torture import nemeses
from tests.torture.conftest import LEVEL
from tests.torture.figures import RUNS, Figures
from tests.torture.history import Entry, History, lost_updates
from tests.torture.points import COMBINATIONS, POINTS
from tests.torture.watch import Watch
from tests.torture.workers import Workers, migrate

pytestmark = [
    pytest.mark.torture,
    pytest.mark.vendor("postgresql", "mysql"),
    pytest.mark.timeout(3600),
]

TTL = 0.6
FENCES = ("guard", "atomic", "inside", "guard")
NEXT_GRANT = TTL + 1.0
"""L2: a dead holder's lock is granted within that time."""
MEASURED = ("kill", "die")
SLACK = 2.0
"""Two processors and a dozen processes: that long may a process wait for its turn."""
FAKETIME = "/usr/lib/*/faketime/libfaketime.so.1"

HARMS = {
    "ci": {"pause": 4, "kill": 5, "terminate": 6, "crash": 2, "freeze": 2, "clock": 4},
    "short": {"pause": 30, "kill": 30, "terminate": 30, "crash": 6, "freeze": 6, "clock": 12},
    "long": {"pause": 300, "kill": 200, "terminate": 200, "crash": 60, "freeze": 60, "clock": 100},
}[LEVEL]
HARMS["die"] = len(POINTS) + len(COMBINATIONS) * {"ci": 0, "short": 2, "long": 8}[LEVEL]
HARMS["deafen"] = {"ci": 10, "short": 50, "long": 300}[LEVEL]
HARMS["everything"] = {"ci": 1, "short": 5, "long": 40}[LEVEL]

DEAF = {"deafen": 0.2, "everything": 0.02}
"""How likely the answer to a COMMIT is lost."""
MORE = 10
"""So many more harms are done until one has bitten."""


# -- servers that may be killed ------------------------------------------------------------------


@pytest.fixture(scope="module")
def steady() -> Iterator[Server]:
    """A durable server by the machine's own clock."""
    with _server() as server:
        migrate(server.url)
        yield server


@pytest.fixture(scope="module")
def jumping() -> Iterator[tuple[Server, nemeses.Clock]]:
    """A durable server that lives, alone, by a clock which a file moves."""
    libraries = glob.glob(FAKETIME)
    assert libraries, "libfaketime is not installed (Debian: faketime)"
    with tempfile.TemporaryDirectory(prefix="distlock-", dir=temp_root()) as folder:
        Path(folder).chmod(0o755)
        clock = nemeses.Clock(Path(folder) / "offset")
        server = _server()
        server.environment = {
            "LD_PRELOAD": libraries[0],
            "FAKETIME_TIMESTAMP_FILE": f"{folder}/offset",
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_RESET": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # as when somebody sets the time
        }
        with server:
            migrate(server.url)
            yield server, clock


def _server() -> Server:
    product = {"mysql": "mariadb"}.get(connection.vendor, connection.vendor)
    return SERVERS[product](durable=True)


class Begin(Protocol):
    """Sets the scene for a run."""

    def __call__(self, nemesis: str, *, jumps: bool = False) -> nemeses.Scene: ...


@pytest.fixture
def begin(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Begin]:
    """Set the scene for a run: a server, a counter and a lock of its name, and nobody there yet."""
    scenes: list[nemeses.Scene] = []

    def begin(nemesis: str, *, jumps: bool = False) -> nemeses.Scene:
        clock = None
        if jumps:
            server, clock = request.getfixturevalue("jumping")
        else:
            server = request.getfixturevalue("steady")
        name = f"{nemesis} {time.monotonic_ns()}"
        deaf = ("--deaf", DEAF.get(nemesis, 0.0))
        workers = Workers(server.url, tmp_path, "tests.torture.guarded", TTL, tmp_path, name, *deaf)
        scene = nemeses.Scene(name, workers, server, Watch(server, name), TTL, clock)
        scene.deaths = itertools.islice(scene.deaths, HARMS["die"])
        scenes.append(scene)
        query(server.url, f"INSERT INTO app_counter (name, value) VALUES ('{name}', 0)")
        return scene

    yield begin
    for scene in scenes:
        scene.watch.close()
        scene.workers.end()
        nemeses.repair(scene.server)


# -- one run -------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a run left behind."""

    history: History
    value: int
    ledger: list[Entry]
    losses: int

    @property
    def lost_updates(self) -> list[str]:
        return lost_updates(self.value, self.ledger)


def loses_and_tells(found: Result) -> bool:
    """Whether a lease was ended by others, and a holder was told of it."""
    return bool(found.losses and found.history.lost)


def loses(found: Result) -> bool:
    """Whether a lease was ended by others: the dead cannot be told."""
    return found.losses > 0


def cuts_off(found: Result) -> bool:
    """Whether a holder's transaction was cut off: its lease may well go on."""
    return bool(found.history.cut_off)


BITES = {
    "pause": loses_and_tells,
    "kill": loses,
    "die": lambda found: loses(found) and bool(found.history.with_outcome("unknown")),
    "terminate": cuts_off,
    "crash": cuts_off,
    "deafen": lambda found: bool(found.history.with_outcome("unknown")),
    "freeze": loses_and_tells,
    "clock": loses_and_tells,
    "everything": lambda found: loses_and_tells(found) and cuts_off(found),
}


def result(scene: nemeses.Scene) -> Result:
    """What the workers say they did, and what the database says."""
    with contextlib.closing(connect(scene.server.url)) as session:
        cursor = session.cursor()
        cursor.execute(f"SELECT name, value FROM app_counter WHERE name LIKE '{scene.name}%'")
        rows = dict(cursor.fetchall())
    value = rows.pop(scene.name)
    ledger = [
        Entry(key, int(token), wrote)
        for (_, key, token), wrote in ((name.split("/"), wrote) for name, wrote in rows.items())
    ]
    return Result(History.read(scene.workers.folder), value, ledger, scene.watch.losses())


def run(
    scene: nemeses.Scene,
    nemesis: str,
    bites: Callable[[Result], bool],
    fences: tuple[str, ...] = FENCES,
) -> Result:
    """Let a nemesis loose on the workers, until it has bitten."""
    began = time.monotonic()
    for fence in fences:
        scene.workers.start(fence)
    scene.workers.wait_until_all_work()
    for number in range(HARMS[nemesis] + MORE):
        if number >= HARMS[nemesis] and bites(result(scene)):
            break
        getattr(nemeses, nemesis)(scene, number % 2 == 0)
    scene.dismiss()
    time.sleep(TTL + 0.5)  # so that somebody follows the last one that was killed
    scene.workers.finish(60)
    found = result(scene)
    if found.history.deaf:
        scene.harms["COMMIT unanswered"] = len(found.history.deaf)
    fenced = fences == FENCES
    RUNS.append(
        Figures.of(
            nemesis if fenced else f"{nemesis}, without a fence",
            scene.harms,
            found.history,
            losses=found.losses,
            lost_updates=len(found.lost_updates),
            seconds=time.monotonic() - began,
            measured=nemesis in MEASURED,
            fenced=fenced,
        )
    )
    assert len(found.history.with_outcome("ok")) >= 10, scene.workers.said()
    assert bites(found), f"{nemesis} has not bitten, so this proves nothing: {RUNS[-1]}"
    return found


@pytest.mark.parametrize("nemesis", BITES)
def test_no_update_is_lost(nemesis: str, begin: Begin) -> None:
    jumps = nemesis in ("clock", "everything")
    found = run(begin(nemesis, jumps=jumps), nemesis, BITES[nemesis])
    history = found.history
    if nemesis == "crash":
        # The grant of atomic=True may be forgotten with the server: it is fenced by its own COMMIT.
        history.holds = [hold for hold in history.holds if hold["fence"] != "atomic"]
    assert history.faults(found.value, found.ledger, one_holder=not jumps) == []
    if nemesis in MEASURED:
        late = [wait for wait in history.waits_after_kills() if wait[0] > NEXT_GRANT + SLACK]
        assert late == [], "a dead holder's lock was not granted in time"
    if nemesis == "die":
        assert {kill["point"] for kill in history.kills} >= set(POINTS)


def test_without_a_fence_the_same_pauses_lose_updates(begin: Begin) -> None:
    """If nothing were lost here, the runs above would prove nothing."""

    def bites(found: Result) -> bool:
        return bool(found.lost_updates)

    assert run(begin("none"), "pause", bites, ("none",) * 4).lost_updates
