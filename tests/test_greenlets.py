"""Under gevent's and eventlet's monkey patching: greenlets in place of threads, in a process each.

psycopg waits for the network in Python where gevent has patched `select`, so other greenlets run
meanwhile. It does not know eventlet, and mysqlclient knows neither: there a statement stops every
greenlet of the process until the server answers. What distlock sends is short, and bounded on the
server, so locks work all the same.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.db import connection

from tests.waiters import output_of

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
servers = pytest.mark.vendor("postgresql", "mysql")
libraries = pytest.mark.parametrize("library", ["gevent", "eventlet"])

PATCH = {
    "gevent": "import gevent.monkey\ngevent.monkey.patch_all()\n",
    "eventlet": (
        "import warnings\n"
        "warnings.simplefilter('ignore')  # it says of itself that it is deprecated\n"
        "import eventlet\neventlet.monkey_patch()\n"
    ),
}

PRELUDE = """
import json, sys, threading, time, django
django.setup()
from django.db import connection, connections, transaction
from distlock import LockLost, lock
from distlock.signals import lock_lost

ticks = []
def tick():
    while True:
        ticks.append(time.monotonic())
        time.sleep(0.02)
threading.Thread(target=tick, daemon=True).start()

def stalled():
    time.sleep(0.05)
    longest = max(later - sooner for sooner, later in zip(ticks, ticks[1:]))
    del ticks[:-1]
    return longest

def waiter(name, served):
    def wait():
        try:
            with lock(name, wait=20):
                served.append(time.monotonic())
        finally:
            connections.close_all()
    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    return thread

said = {}
def say():
    connections.close_all()
    print(json.dumps(said))
"""

LIFE = """
lease = lock("x", ttl=1.2).acquire()
served = [[] for _ in range(4)]
waiters = [waiter("x", one) for one in served]
time.sleep(2.5)
lease.check()
said["waited"] = not any(served)
released = time.monotonic()
lease.release()
for one in waiters:
    one.join(10)
moments = [one[0] for one in served]
said["in order"] = moments == sorted(moments)
said["first"] = moments[0] - released
said["stalled"] = stalled()

told = []
lock_lost.connect(receiver := lambda **more: told.append(1))
lease = lock("y", ttl=1.2).acquire()
with connection.cursor() as cursor:
    cursor.execute("UPDATE distlock_distributedlock SET owner = 'thief' WHERE name = 'y'")
time.sleep(1)
said["told"] = len(told)
said["lost"] = lease.lost
lease._released = True

with transaction.atomic(), lock("z", ttl=1.2) as lease:
    time.sleep(2)
    lease.check()
say()
"""

SLOW = """
with connection.cursor() as cursor:
    cursor.execute("SELECT 1")
    stalled()
    cursor.execute("SELECT pg_sleep(1)" if connection.vendor == "postgresql" else "SELECT SLEEP(1)")
said["stalled"] = stalled()
say()
"""


def told_by(library: str, code: str, **environ: str) -> dict[str, Any]:
    """What a process says that is patched before it imports anything else."""
    said = output_of(PATCH[library] + PRELUDE + code, environ=environ)
    found: dict[str, Any] = json.loads(said)
    return found


@servers
@libraries
def test_locks_are_waited_for_handed_over_renewed_and_lost(library: str) -> None:
    said = told_by(library, LIFE)
    assert said["waited"]
    assert said["in order"]
    assert said["first"] < (0.3 if connection.vendor == "postgresql" else 0.9)
    assert said["told"] == 1
    assert said["lost"]
    assert said["stalled"] < 0.5, "what distlock sends has stopped the other greenlets"


@servers
@libraries
def test_a_slow_statement_stops_other_greenlets_where_the_driver_cannot_yield(library: str) -> None:
    """What is said at the top of this module."""
    said = told_by(library, SLOW)
    if library == "gevent" and connection.vendor == "postgresql":
        assert said["stalled"] < 0.5
    else:
        assert said["stalled"] > 0.9


@pytest.mark.vendor("postgresql")
def test_psycopg_yields_under_eventlet_if_it_is_told_how_to_wait() -> None:
    said = told_by("eventlet", SLOW, PSYCOPG_WAIT_FUNC="wait_selector")
    assert said["stalled"] < 0.5
    said = told_by("eventlet", LIFE, PSYCOPG_WAIT_FUNC="wait_selector")
    assert said["told"] == 1
    assert said["in order"]
