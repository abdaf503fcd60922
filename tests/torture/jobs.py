"""Processes that do jobs once and are killed: `python -m tests.torture.jobs FORM ROUNDS FOLDER`.

For each place where a process may die, ROUNDS times: forks three children, each of which does the
same jobs, in an order of its own, until all are done. The first kills itself at that place, or is
killed at any moment, and another takes its turn; the others live. The effect of a job is one new
row, and the row's name is the job's result. What each child was told is noted in FOLDER.

FORM says how a job is run:

    atomic    once(..).run(job)
    inside    in a transaction of the caller's
    plain     once(.., atomic=False).run(job): at least once
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sys
import time
import traceback
import uuid
from typing import Any

import django

from tests.torture import points
from tests.torture.history import Recorder
from tests.torture.points import PASSED_BY, Points

AT_RECEIPT = ("before-receipt", "after-receipt")
PLACES = {
    "atomic": ("", *PASSED_BY["atomic"], *AT_RECEIPT),
    "inside": ("", *PASSED_BY["inside"], *AT_RECEIPT),
    "plain": ("", *PASSED_BY["atomic"], *AT_RECEIPT),
}
"""Where a child dies: "" is anywhere, else a point of `points.py`, or one around the receipt."""
ANYWHERE = 4
"""How often a child is killed anywhere for once at each point."""
JOBS = 8

TTL = 0.7
STEP = 0.002
LIFE = 0.1
"""Seconds at most that a child lives which is killed anywhere."""
CHILDREN = 3
LIMIT = 60.0


def main(argv: list[str]) -> None:
    """Have all jobs done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("form", choices=PLACES)
    parser.add_argument("rounds", type=int)
    parser.add_argument("folder")
    options = parser.parse_args(argv)
    django.setup()
    points.CHANCE = 1.0
    numbers = itertools.count()
    for place in PLACES[options.form] * options.rounds:
        for _ in range(1 if place else ANYWHERE):
            one_round(options, place, f"{options.form} {next(numbers)}")


def one_round(options: argparse.Namespace, place: str, name: str) -> None:
    """Have the jobs of one name done, while at least one child dies."""
    doomed = fork(options, name, JOBS + 1, place)
    for _ in range(CHILDREN - 1):
        fork(options, name, JOBS)
    if not place:
        time.sleep(random.uniform(0, LIFE))
        os.kill(doomed, signal.SIGKILL)
    for _ in range(CHILDREN + 1):
        pid, status = os.wait()
        if pid == doomed:
            assert os.WTERMSIG(status) == signal.SIGKILL, f"{place!r}: it lived until {status}"
            Recorder(options.folder).note("death", place=place, name=name)
            fork(options, name, JOBS + 1)
        else:
            assert status == 0, f"{place!r}: a child ended with {status}"


def fork(options: argparse.Namespace, name: str, jobs: int, die_at: str | None = None) -> int:
    """Start a child, which inherits no connection."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(int(LIMIT))
    try:
        work(options, name, jobs, die_at)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def work(options: argparse.Namespace, name: str, jobs: int, die_at: str | None) -> None:
    """Do the jobs, unless they are done. The last one is for the doomed, who else might live."""
    from distlock import LockBusy, LockLost

    recorder = Recorder(options.folder)
    passed = Points(recorder, die_at or "")
    passed.install()
    wrap_receipt(passed)
    random.seed(os.getpid())
    order = [*random.sample(range(JOBS), JOBS), *range(JOBS, jobs)]
    for key in (f"{name}/{number}" for number in order):
        deadline = time.monotonic() + LIMIT / 2
        while True:
            try:
                recorder.note("result", key=key, result=do(options.form, key, passed))
                break
            except (LockBusy, LockLost) as error:  # the machine is busy, and a lease is short
                recorder.note("again", key=key, error=type(error).__name__)
                assert time.monotonic() < deadline, f"{key} is never done"
    if die_at is not None:
        signal.pause()


def do(form: str, key: str, passed: Points) -> Any:
    """Do one job."""
    from django.db import transaction

    from distlock import once

    job = once(key, ttl=TTL, wait=2, atomic=form != "plain")
    if form == "inside":
        with transaction.atomic():
            return job.run(effect, key, passed)
    return job.run(effect, key, passed)


def effect(key: str, passed: Points) -> str:
    """Leave a row that is like no other."""
    from tests.app.models import Counter

    time.sleep(STEP)
    row = Counter.objects.create(name=f"{key}/{uuid.uuid4().hex}")
    passed.reach("in-body")
    time.sleep(STEP)
    return row.name


def wrap_receipt(passed: Points) -> None:
    """Add the points around the receipt."""
    from distlock import receipts

    real = receipts.finish

    def finish(*args: Any, **more: Any) -> None:
        passed.reach("before-receipt")
        real(*args, **more)
        passed.reach("after-receipt")

    receipts.finish = finish


if __name__ == "__main__":
    main(sys.argv[1:])
