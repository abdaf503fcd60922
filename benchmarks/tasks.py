"""What a process does for a measurement: the tasks of ``worker``."""

from __future__ import annotations

import itertools
import math
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from tests.databases import Unavailable

from .contenders.base import Contender
from .figures import Turn, percentile
from .progress import Progress

if TYPE_CHECKING:
    from .watching import Watch

Ready = Callable[[], None]
WARM = 50
"""Cycles after which a session has what it keeps for later."""
SETTLE = 1.0
"""Seconds after which those who wait have done what they do once."""


def prepare(contender: Contender, ready: Ready) -> dict[str, str]:
    """Make its tables and try it once; say why it cannot run here."""
    ready()
    try:
        contender.prepare()
        contender.cycle("prepare")
    except (ImportError, Unavailable) as reason:
        return {"missing": " ".join(str(reason).split())}
    return {}


def timed(
    cycle: Callable[[str], None],
    names: Sequence[str],
    cycles: int,
    seconds: float = math.inf,
) -> list[float]:
    """The seconds of each of so many cycles, over the names in turn; less if time runs out."""
    spent: list[float] = []
    end = time.monotonic() + seconds
    for name in itertools.islice(itertools.cycle(names), cycles):
        if time.monotonic() > end:
            break
        start = time.perf_counter()
        cycle(name)
        spent.append(time.perf_counter() - start)
    return spent


def latency(
    contender: Contender, ready: Ready, names: Sequence[str], cycles: int, seconds: float
) -> dict[str, float]:
    """Cycles one after the other: seconds of the median, of the 99th percentile, and of CPU."""
    warm = timed(contender.cycle, names, max(20, len(names)))
    ready()
    cpu = time.process_time()
    spent = timed(contender.cycle, names, cycles, seconds)
    cpu = time.process_time() - cpu
    return {
        "p50": percentile(spent, 0.5),
        "p99": percentile(spent, 0.99),
        "cpu": cpu / len(spent),
        "cycles": len(warm) + len(spent),
    }


def together(work: Callable[[str], object], workers: Sequence[str]) -> None:
    """Run the work in a thread for each worker. An error of one is raised when all are done."""
    errors: list[BaseException] = []

    def run(worker: str) -> None:
        try:
            work(worker)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(worker,), name=worker, daemon=True) for worker in workers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def throughput(
    contender: Contender, ready: Ready, worker: str, threads: int, seconds: float
) -> float:
    """Cycles per second of threads with ten names each."""
    barrier = threading.Barrier(threads + 1)
    counts: list[int] = []
    end = 0.0

    def work(me: str) -> None:
        names = [f"{me}:{number}" for number in range(10)]
        try:
            timed(contender.cycle, names, 20)
        except BaseException:
            barrier.abort()
            raise
        barrier.wait()
        barrier.wait()
        done = 0
        for name in itertools.cycle(names):
            contender.cycle(name)
            if time.monotonic() > end:
                break
            done += 1
        counts.append(done)

    def start() -> None:
        nonlocal end
        barrier.wait()
        ready()
        end = time.monotonic() + seconds
        barrier.wait()

    starter = threading.Thread(target=start, daemon=True)
    starter.start()
    together(work, [f"{worker}t{number}" for number in range(threads)])
    return sum(counts) / seconds


def contend(
    contender: Contender,
    ready: Ready,
    worker: str,
    name: str,
    threads: int,
    hold: float,
    progress: str,
) -> list[Turn]:
    """Take one name again and again, until it is time to stop; the turns of all threads."""
    turns: list[Turn] = []
    timed(contender.cycle, [f"{name}:{worker}"], 5)
    shared = Progress(progress)
    first = int(worker.removeprefix("p")) * threads
    ready()

    def work(me: str) -> None:
        number = first + int(me.rpartition("t")[2])
        while not shared.stopped:
            asked = time.monotonic()
            held = contender.acquire(name)
            granted = time.monotonic()
            time.sleep(hold)
            released = time.monotonic()
            contender.release(name, held)
            turns.append(Turn(me, asked, granted, released))
            shared.count(number)
        contender.close()

    together(work, [f"{worker}t{number}" for number in range(threads)])
    return turns


def contend_in_spans(contender: Contender, ready: Ready, **arguments: Any) -> dict[str, Any]:
    """What `contend` does, and the spans of what it consists of. A figure is for a profile only."""
    from .spans import of_a_hand_over, recorded

    with recorded(of_a_hand_over()) as spans:
        turns = contend(contender, ready, **arguments)
    return {"turns": turns, "spans": spans}


def hold(contender: Contender, ready: Ready, name: str) -> None:
    """Hold one name until the parent says go."""
    held = contender.acquire(name)
    ready()
    contender.release(name, held)


def wait(
    contender: Contender, ready: Ready, worker: str, name: str, threads: int
) -> dict[str, float]:
    """Wait for a name that is held, until the parent says go; how many got it all the same.

    Also CPU per second meanwhile, and for distlock the messages to the database.
    """
    timed(contender.cycle, [f"{name}:{worker}"], 5)
    granted: list[Any] = []

    def work(me: str) -> None:
        granted.append(contender.acquire(name))

    for number in range(threads):
        threading.Thread(target=work, args=(f"{worker}t{number}",), daemon=True).start()
    time.sleep(SETTLE)
    with ExitStack() as stack:
        watch = stack.enter_context(_watch()) if contender.ours else None
        cpu, start = time.process_time(), time.monotonic()
        ready()
        cpu, span = time.process_time() - cpu, time.monotonic() - start
    found = {"cpu": cpu / span, "granted": float(len(granted))}
    return found if watch is None else {**found, "messages": len(watch.seen) / span}


def _watch() -> Watch:
    from .watching import Watch

    return Watch()


def churn(
    contender: Contender, ready: Ready, names: Sequence[str], cycles: int, seconds: float
) -> dict[str, float]:
    """Cycles over the names, as many as asked for or as the seconds allow."""
    ready()
    end = time.monotonic() + seconds
    spent: list[float] = []
    while len(spent) < cycles and time.monotonic() < end:
        spent += timed(contender.cycle, names, len(names))
    tenth = max(1, len(spent) // 10)
    return {
        "cycles": len(spent),
        "first": percentile(spent[:tenth], 0.5),
        "last": percentile(spent[-tenth:], 0.5),
        "p99": percentile(spent, 0.99),
    }


def renew(contender: Contender, ready: Ready, names: Sequence[str], times: int) -> int:
    """Hold all the names of distlock and renew each lease so many times."""
    leases = [contender.acquire(name) for name in names]
    time.sleep(1.2)  # then the next statement has the server report what the grants did
    leases[0].renew()
    ready()
    for _ in range(times):
        for lease in leases:
            lease.renew()
    return times * len(leases)


def purge(contender: Contender, ready: Ready) -> float:
    """Run the command as cron does; its seconds."""
    from django.core.management import call_command

    contender.cycle("purge")
    ready()
    start = time.monotonic()
    call_command("purge_locks", verbosity=0)
    return time.monotonic() - start


def beside(contender: Contender, ready: Ready, names: Sequence[str]) -> list[tuple[float, float]]:
    """Cycles until the parent says "go" once more: when each began, and its seconds."""
    timed(contender.cycle, names, 50)
    ready()
    stopped = threading.Event()

    def listen() -> None:
        sys.stdin.readline()
        stopped.set()

    threading.Thread(target=listen, daemon=True).start()
    spent = []
    for name in itertools.cycle(names):
        start = time.monotonic()
        contender.cycle(name)
        spent.append((start, time.monotonic() - start))
        if stopped.is_set():
            return spent
    raise AssertionError("a cycle has no end")


def keep(
    contender: Contender, ready: Ready, count: int, threads: int, ttl: float, seconds: float
) -> dict[str, float]:
    """Hold so many names and let them be renewed; what that costs while nothing else is done."""
    from distlock import lock

    leases: list[Any] = []

    def work(me: str) -> None:
        for number in range(count // threads):
            leases.append(lock(f"keep:{me}:{number}", ttl=ttl).acquire())  # noqa: PERF401

    start = time.monotonic()
    together(work, [str(number) for number in range(threads)])
    taken = time.monotonic() - start
    ready()
    with _watch() as watch:
        before = resource.getrusage(resource.RUSAGE_SELF)
        time.sleep(seconds)
        after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "leases": len(leases),
        "acquired": taken,
        "lost": sum(lease.lost for lease in leases),
        "statements": len(watch.seen),
        "busy": sum(each.seconds for each in watch.seen),
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def layers(contender: Contender, ready: Ready, name: str, cycles: int) -> dict[str, float]:
    """Where the time of an acquire and release goes; see ``layers.py``."""
    from .layers import measure

    ready()
    return measure(contender, name, cycles)


def steps(contender: Contender, ready: Ready, name: str, cycles: int) -> dict[str, float]:
    """The median cycle, in seconds, and what it consists of."""
    from .spans import of_a_cycle, recorded

    calls, mine = of_a_cycle(), threading.current_thread().name
    timed(contender.cycle, [name], WARM)
    ready()
    found: dict[str, list[float]] = {}
    with recorded(calls) as spans:
        for _ in range(cycles):
            spans.clear()
            whole = timed(contender.cycle, [name], 1)[0]
            parts = dict.fromkeys(calls, 0.0)
            for span in spans:
                if span.thread == mine:
                    parts[span.what] += span.end - span.begin
            rest = whole - sum(parts.values())
            for part, seconds in {"whole": whole, **parts, "rest": rest}.items():
                found.setdefault(part, []).append(seconds)
    return {part: percentile(seconds, 0.5) for part, seconds in found.items() if any(seconds)}


TASKS: dict[str, Callable[..., Any]] = {
    task.__name__: task
    for task in (
        prepare,
        latency,
        throughput,
        contend,
        contend_in_spans,
        hold,
        wait,
        churn,
        renew,
        purge,
        beside,
        keep,
        layers,
        steps,
    )
}
