"""One name handed over among the threads of several processes: no lost wake-up, no two holders."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from itertools import pairwise

import pytest

from tests.waiters import ended, running

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

SECONDS = 5
PROCESSES, THREADS = 4, 4

WORK = """
import json, sys, threading, time, django
django.setup()
from django.db import connections
from distlock import lock

end, threads = float(sys.argv[1]), int(sys.argv[2])
held = []
def work():
    try:
        while time.monotonic() < end:
            with lock("x", wait=30, ttl=60) as lease:
                since = time.monotonic()
                time.sleep(0.002)
                held.append((lease.token, since, time.monotonic()))
    finally:
        connections.close_all()
workers = [threading.Thread(target=work) for _ in range(threads)]
for one in workers:
    one.start()
for one in workers:
    one.join()
print(json.dumps(held))
"""


@pytest.mark.slow
def test_a_lock_never_lies_about_while_others_wait_for_it() -> None:
    """The lease is far longer than a gap may be: nobody is served because one has ended."""
    end = time.monotonic() + 3 + SECONDS
    with ExitStack() as stack:
        processes = [stack.enter_context(running(WORK, end, THREADS)) for _ in range(PROCESSES)]
        said = [json.loads(ended(process)) for process in processes]
    assert all(said), "not every process had the lock"
    holds = sorted((token, since, until) for one in said for token, since, until in one)
    gaps = []
    for (_, _, until), (_, since, _) in pairwise(holds):
        assert since >= until, "two had it at once"
        gaps.append(since - until)
    assert len(holds) > 40
    assert max(gaps) < 1.2, sorted(gaps)[-5:]
    sys.stdout.write(f"{len(holds)} grants, the longest gap {max(gaps):.3f} s\n")
