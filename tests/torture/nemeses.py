"""What goes wrong: pauses, kills, cut sessions, crashes, a server that stands still, wrong clocks.

Each nemesis is called again and again while the workers run, and does one harm per call. If it is
`aimed`, it hits the process that holds the lock at that moment: that is stopped first, and harmed
only if the server then still says that it is the holder. Otherwise anyone is hit, at any moment.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.private_server import Server
from tests.torture.points import COMBINATIONS, PASSED_BY, POINTS
from tests.torture.watch import Watch
from tests.torture.workers import Worker, Workers

T = TypeVar("T")

LIMIT = 30.0
SETTLE = 0.02
"""After a process has stopped, the server may still work on what it had sent."""
DOOMED = 3
"""How many wait for their death at a time."""


class Clock:
    """The offset of the server's clock, in a file that libfaketime reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.jump(0)

    def jump(self, seconds: int) -> None:
        """Let the clock jump, there or back."""
        self._offset += seconds
        written = self._path.with_suffix(".new")
        written.write_text(f"{self._offset:+d}\n")
        written.chmod(0o644)
        written.replace(self._path)  # at once: half a line would be another time


@dataclass
class Scene:
    """Everything that can be harmed, and the name of the lock and the counter."""

    name: str
    workers: Workers
    server: Server
    watch: Watch
    ttl: float
    clock: Clock | None = None
    harms: Counter[str] = field(default_factory=Counter)
    """What was done, by the names of the table in docs/promises.md."""
    doomed: dict[Worker, tuple[str, str]] = field(default_factory=dict)
    deaths: Iterator[tuple[str, str]] = field(default_factory=lambda: all_deaths())
    """The fences and points at which the next ones are to die."""

    def some_time(self, least: float, most: float) -> float:
        """A span between so many ttl."""
        return random.uniform(least, most) * self.ttl

    def dismiss(self) -> None:
        """Kill those who have not come by their points yet."""
        for worker in self.doomed:
            self.workers.kill(worker)
            self.harms["SIGKILL"] += 1
        self.doomed.clear()


def all_deaths() -> Iterator[tuple[str, str]]:
    """Each fence and point where one can die: first each point once, then all again and again."""
    for point in POINTS:
        yield (
            random.choice([fence for fence, points in PASSED_BY.items() if point in points]),
            point,
        )
    while True:
        yield from random.sample(COMBINATIONS, len(COMBINATIONS))


Nemesis = Callable[[Scene, bool], None]


def pause(scene: Scene, aimed: bool) -> None:
    """SIGSTOP a worker for 0.5 to 3 ttl, as a garbage collection or a migration would.

    Aimed: until another one has been granted the lock.
    """
    worker, token = _stop_holder(scene, unpinned=True) if aimed else (_stop_any(scene), 0)
    time.sleep(scene.some_time(0.5, 3))
    if aimed:
        _wait_for_another(scene, token)
    _resume(worker)
    scene.harms["SIGSTOP"] += 1


def kill(scene: Scene, aimed: bool) -> None:
    """SIGKILL a worker, and start another: one of all, so that somebody is there to follow it."""
    scene.workers.wait_until_all_work()
    if aimed:
        worker, _ = _stop_holder(scene)
    else:
        time.sleep(random.uniform(0, 0.3))
        worker = scene.workers.any()
    scene.workers.replace(worker)
    scene.harms["SIGKILL"] += 1


def die(scene: Scene, aimed: bool) -> None:
    """Let a worker kill itself at a named point, one point after another. Always aimed."""
    while len(scene.doomed) < DOOMED and (death := next(scene.deaths, None)):
        scene.doomed[scene.workers.start_doomed(*death)] = death
    dead = _wait_until(
        lambda: next((each for each in scene.doomed if each.poll() is not None), None),
        f"nobody comes by {list(scene.doomed.values())}",
    )
    assert dead is not None
    assert dead.poll() == -signal.SIGKILL, scene.workers.said()
    del scene.doomed[dead]
    scene.harms["SIGKILL"] += 1


def terminate(scene: Scene, aimed: bool) -> None:
    """End a session on the server. Aimed: that of the holder's open transaction."""
    if aimed:
        worker, session = _stop_amid_transaction(scene)
        scene.watch.end_session(session)
        _resume(worker)
    else:
        time.sleep(random.uniform(0, 0.2))
        with contextlib.suppress(Exception):  # it may just have ended
            scene.watch.end_session(scene.watch.some_session())
    scene.harms["session ended"] += 1


def crash(scene: Scene, aimed: bool) -> None:
    """SIGKILL the server and start it again on its data. Aimed: amid the holder's transaction."""
    worker = None
    if aimed:
        worker, _ = _stop_amid_transaction(scene)
    else:
        time.sleep(random.uniform(0.1, 0.5))
    _signal_server(scene.server, signal.SIGKILL)
    scene.server.kill()
    if worker is not None:
        _resume(worker)
    scene.server.start()
    scene.harms["server SIGKILL"] += 1
    time.sleep(scene.ttl)


def deafen(scene: Scene, aimed: bool) -> None:
    """Let the answer to a COMMIT be lost: the workers that are told so do it. Always aimed."""
    before = scene.workers.noted("deaf")
    _wait_until(lambda: scene.workers.noted("deaf") > before, "nobody loses an answer")


def freeze(scene: Scene, aimed: bool) -> None:
    """SIGSTOP the whole server for 1 to 3 ttl. Aimed: the holder's machine stands still, too."""
    worker, token = _stop_holder(scene, unpinned=True) if aimed else (None, 0)
    if worker is None:
        time.sleep(random.uniform(0.1, 0.5))
    _signal_server(scene.server, signal.SIGSTOP)
    time.sleep(scene.some_time(1, 3))
    _signal_server(scene.server, signal.SIGCONT)
    if worker is not None:
        _wait_for_another(scene, token)
        _resume(worker)
    scene.harms["server SIGSTOP"] += 1


def clock(scene: Scene, aimed: bool) -> None:
    """Let the database's clock jump by up to an hour. Aimed: forward over a lease; else back.

    It does not stay back: whoever is killed then would keep the lock for that long.
    """
    assert scene.clock is not None
    span = random.randint(10, 3600)
    if aimed:
        worker, token = _stop_holder(scene, unpinned=True)
        scene.clock.jump(span)
        _wait_for_another(scene, token)
        _resume(worker)
    else:
        scene.clock.jump(-span)
        time.sleep(random.uniform(0.3, 1))
        scene.clock.jump(span)
        scene.harms["clock jump"] += 1
    scene.harms["clock jump"] += 1


ALL: dict[str, Nemesis] = {
    "pause": pause,
    "kill": kill,
    "die": die,
    "terminate": terminate,
    "crash": crash,
    "freeze": freeze,
    "clock": clock,
}


def everything(scene: Scene, aimed: bool) -> None:
    """All of the others, each as often as the others, in no order."""
    for nemesis in random.sample(list(ALL.values()), len(ALL)):
        nemesis(scene, aimed)
        time.sleep(random.uniform(0, 0.3))


# -- aiming --------------------------------------------------------------------------------------


def _stop_holder(scene: Scene, *, unpinned: bool = False) -> tuple[Worker, int]:
    """Stop the process that holds the lock; return it and its token.

    `unpinned`: nor does it have the row locked, so that its lease can end while it stands still.
    """
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        held = scene.watch.holder()
        worker = scene.workers.of(held[0]) if held else None
        if held is None or worker is None:
            scene.workers.check()
            time.sleep(0.002)
            continue
        _stop(worker)
        time.sleep(SETTLE)
        if scene.watch.holder() == held and not (unpinned and scene.watch.pinned()):
            return worker, held[1]
        _let_go(worker)
    raise AssertionError(f"nobody could be stopped while holding the lock: {scene.workers.said()}")


def _stop_amid_transaction(scene: Scene) -> tuple[Worker, int]:
    """Stop the holder while it has a transaction open; return it and its session."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        worker, _ = _stop_holder(scene)
        session = scene.workers.session(worker)
        if session is not None and scene.watch.works(session):
            return worker, session
        _let_go(worker)
    raise AssertionError(f"no holder works in a transaction: {scene.workers.said()}")


def _stop_any(scene: Scene) -> Worker:
    worker = scene.workers.any()
    _stop(worker)
    return worker


def _stop(worker: Worker) -> None:
    """Stop a process, and return when it stands still."""
    worker.send_signal(signal.SIGSTOP)
    _wait_until(lambda: _state(worker.pid) in "TZX", f"{worker.pid} does not stop")


def _resume(worker: Worker) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.send_signal(signal.SIGCONT)


def _let_go(worker: Worker) -> None:
    """Resume a process that was not to be stopped, and let it come to its end."""
    _resume(worker)
    time.sleep(random.uniform(0.01, 0.05))


def _wait_for_another(scene: Scene, token: int) -> None:
    """Return when somebody else has been granted the lock."""
    _wait_until(
        lambda: scene.watch.token() != token,
        f"token {token} stands still, and nobody else is granted the lock",
    )


def _wait_until(found: Callable[[], T], otherwise: str) -> T:
    """Return what the function finds at last."""
    deadline = time.monotonic() + LIMIT
    while not (result := found()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.005)
    return result


def _signal_server(server: Server, number: signal.Signals) -> None:
    """Signal the server's main process and its children, which are its sessions on PostgreSQL."""
    for pid in [server.pid, *_children(server.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def repair(server: Server) -> None:
    """Let a server run that a broken run left stopped or dead."""
    if server.process is None:
        server.start()
    _signal_server(server, signal.SIGCONT)


def _children(pid: int) -> list[int]:
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int(_stat(int(entry.name))[1]) == pid:
                    children.append(int(entry.name))
    return children


def _state(pid: int) -> str:
    """The letter that says what a process does; X when it is gone."""
    try:
        return _stat(pid)[0]
    except OSError:
        return "X"


def _stat(pid: int) -> list[str]:
    """What /proc says of a process, from its state on: state, parent, .."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
