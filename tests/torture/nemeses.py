"""What goes wrong: pauses, kills, cut sessions, crashes, a server that stands still, wrong clocks.

Each nemesis is called again and again while the workers run, and does one harm per call.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.databases import query
from tests.private_server import Server
from tests.torture.workers import Workers

FAKETIME = "/usr/lib/*/faketime/libfaketime.so.1"

Nemesis = Callable[[Workers, Server, float], None]


def pause(workers: Workers, server: Server, ttl: float) -> None:
    """SIGSTOP a worker for 0.5 to 3 ttl, as a garbage collection or a migration would."""
    worker = workers.any()
    worker.send_signal(signal.SIGSTOP)
    time.sleep(random.uniform(0.5, 3) * ttl)
    with contextlib.suppress(ProcessLookupError):
        worker.send_signal(signal.SIGCONT)


def kill(workers: Workers, server: Server, ttl: float) -> None:
    """SIGKILL a worker at a random moment, and start another."""
    time.sleep(random.uniform(0.2, 1))
    workers.replace(workers.any())


def terminate(workers: Workers, server: Server, ttl: float) -> None:
    """End a random session on the server."""
    time.sleep(random.uniform(0, 0.2))
    with contextlib.suppress(Exception):
        if server.scheme == "postgresql":
            query(
                server.url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> "
                "pg_backend_pid() AND datname = 'distlock' ORDER BY random() LIMIT 1",
            )
        else:
            found = query(
                server.url,
                "SELECT id FROM information_schema.processlist WHERE db = 'distlock' "
                "AND id <> CONNECTION_ID() ORDER BY RAND() LIMIT 1",
            )
            if found:
                query(server.url, f"KILL {found[0]}")


def crash(workers: Workers, server: Server, ttl: float) -> None:
    """SIGKILL the server and start it again on its data."""
    time.sleep(random.uniform(0.3, 1))
    _signal_server(server, signal.SIGKILL)
    server.kill()
    server.start()
    time.sleep(ttl)


def freeze(workers: Workers, server: Server, ttl: float) -> None:
    """SIGSTOP the whole server for 1 to 3 ttl."""
    time.sleep(random.uniform(0.3, 1))
    _signal_server(server, signal.SIGSTOP)
    time.sleep(random.uniform(1, 3) * ttl)
    _signal_server(server, signal.SIGCONT)


def clock(workers: Workers, server: Server, ttl: float) -> None:
    """Let the database's clock jump by up to an hour, there or back."""
    path = Path(server.environment["FAKETIME_TIMESTAMP_FILE"])
    path.write_text(f"{random.randint(-3600, 3600):+d}\n")
    time.sleep(random.uniform(0.5, 2))


def everything(workers: Workers, server: Server, ttl: float) -> None:
    """One of the others, at random."""
    random.choice([pause, pause, kill, terminate, freeze])(workers, server, ttl)


def _signal_server(server: Server, number: signal.Signals) -> None:
    """Signal the server's main process and its children, which are its sessions on PostgreSQL."""
    for pid in [server.pid, *_children(server.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _children(pid: int) -> list[int]:
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid:
                    children.append(int(entry.name))
    return children
