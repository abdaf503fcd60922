"""Run the suite on every database: what is behind ``make test`` and ``make torture``.

    python tests/run.py                                          all databases
    python tests/run.py --db postgresql -- tests/test_x.py -k y  one of them, some tests
    python tests/run.py --serve mariadb                          only a server, until Ctrl-C

What follows ``--`` goes to pytest, and so does PYTEST_ARGS. For each database a private server is
started (tests/servers.py) and stopped afterwards, unless the environment names one:

DISTLOCK_TEST_POSTGRESQL_URL, ..._MARIADB_URL, ..._PGBOUNCER_URL   use this server, not our own
DISTLOCK_REQUIRE    databases that must not be missing: postgresql,mariadb,pgbouncer
DISTLOCK_JOBS       3 runs three parts at a time, each on a server of its own, and shows their
                    output when they are done; a database's tests are a few parts
DISTLOCK_AGAIN      how many failures of a part may be tried a second time, when nothing else runs
                    any more: the machine may have been busy. They are named at the end, and what
                    fails again is a failure
DISTLOCK_DURABLE    1: commits wait for the disk (always so with --torture)
DISTLOCK_TORTURE    ci, short (default) or long: how hard the tests marked ``torture`` are, and
                    those of many processes in tests/contrib
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, this file finds only its own folder there
    sys.path.insert(0, str(ROOT))

from tests.databases import Unavailable, version  # noqa: E402
from tests.pgbouncer import PgBouncer  # noqa: E402
from tests.private_server import Server  # noqa: E402
from tests.servers import SERVERS as DATABASE_SERVERS  # noqa: E402

SERVERS: dict[str, type[Server]] = {**DATABASE_SERVERS, "pgbouncer": PgBouncer}
NAMES = ("sqlite", *SERVERS)
LONGEST_FIRST = ("postgresql", "mariadb", "sqlite", "pgbouncer")
RESULTS = ROOT / ".test-results"
WHOLE: dict[str, list[str]] = {"": []}
APART = {
    "-contrib": ["tests/contrib"],
    "-faults": [
        f"tests/{path.name}"
        for pattern in ("cuts", "interrupts", "isolation", "fenc")
        for path in sorted((ROOT / "tests").glob(f"test_{pattern}*.py"))
    ],
}
PARTS = {"": [f"--ignore={path}" for paths in APART.values() for path in paths], **APART}
"""What is run at the same time, by what is added to a database's name."""
RUN_LIMIT = 3600.0  # seconds for one pytest; a single test has its own limit, in setup.cfg
TORTURE_LIMIT = 6 * 3600.0


@dataclass
class Outcome:
    """What became of one database."""

    name: str
    version: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)
    unsteady: list[str] = field(default_factory=list)  # failed at first, and then passed
    not_run: str = ""  # the reason

    @property
    def counts(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"

    def line(self) -> str:
        if self.not_run:
            return f"{self.name:<11} not run: {self.not_run}"
        problems = "".join(f"; {problem}" for problem in self.problems)
        if self.unsteady:
            problems += f"; only at the second try: {', '.join(self.unsteady)}"
        return f"{self.name:<11} {self.counts} ({self.version}){problems}"

    def add(self, label: str, status: int, report: Path, *, may_be_empty: bool) -> None:
        """Count one pytest run. A run that ends badly is at least one failure."""
        passed, failed, skipped = counts(report)
        if status == 5 and may_be_empty:  # pytest's status for "no test was selected"
            return
        if status and not failed:
            failed = 1
            what = "no test was selected" if status == 5 else f"pytest ended with status {status}"
            self.problems.append(f"{label}: {what}")
        self.passed += passed
        self.failed += failed
        self.skipped += skipped

    def join(self, other: Outcome) -> None:
        """Count another part's tests, too."""
        self.version = self.version or other.version
        self.not_run = self.not_run or other.not_run
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped
        self.problems += other.problems
        self.unsteady += other.unsteady

    def passed_again(self, report: Path, second: Path) -> None:
        """Count as passed, by name, what failed in a report and did not in the second one."""
        names = [name for name in failures(report) if name not in failures(second)]
        self.unsteady += names
        self.passed += len(names)
        self.failed -= len(names)


def failures(report: Path) -> list[str]:
    """The names of the tests that failed, in a JUnit report that is whole."""
    cases = ElementTree.parse(report).iter("testcase")
    return [
        f"{case.get('classname', '').removeprefix('tests.')}.{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]


def counts(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped in a JUnit report; nothing if it is missing or torn."""
    try:
        suites = list(ElementTree.parse(report).iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return 0, 0, 0
    number = {
        name: sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    }
    failed = number["failures"] + number["errors"]
    return max(number["tests"] - failed - number["skipped"], 0), failed, number["skipped"]


def required(value: str) -> set[str]:
    """The names in DISTLOCK_REQUIRE. An unknown one is a mistake, not a wish for nothing."""
    names = {name.strip() for name in value.split(",")} - {""}
    if unknown := sorted(names - set(NAMES)):
        raise ValueError(
            f"DISTLOCK_REQUIRE: unknown {', '.join(unknown)}; valid names: {', '.join(NAMES)}"
        )
    return names


def summary(outcomes: list[Outcome], needed: set[str]) -> tuple[str, bool]:
    """The last lines to print, and whether all is well."""
    missing = needed - {outcome.name for outcome in outcomes if not outcome.not_run}
    total = Outcome("total")
    for outcome in outcomes:
        total.passed += outcome.passed
        total.failed += outcome.failed
        total.skipped += outcome.skipped
    lines = [outcome.line() for outcome in outcomes]
    lines += [f"{name} was required, but not run" for name in sorted(missing)]
    good = not missing and not total.failed and total.passed > 0
    return "\n".join([*lines, "", total.counts]), good


@contextmanager
def served(name: str, durable: bool) -> Iterator[str]:
    """The URL of a database: a new SQLite file, the server that is named, or one of our own."""
    if name == "sqlite":
        with tempfile.TemporaryDirectory(prefix="distlock-") as folder:
            yield f"sqlite:///{folder}/distlock"
    elif url := os.environ.get(f"DISTLOCK_TEST_{name.upper()}_URL"):
        yield url
    else:
        with SERVERS[name](durable=durable) as server:
            yield server.url


@dataclass
class Failed:
    """A pytest run with a few failures, to be tried again."""

    outcome: Outcome
    label: str
    report: Path
    args: list[str]
    environ: dict[str, str]


class Runner:
    """Runs pytest in child processes, and ends them when it is told to stop."""

    def __init__(self, pytest_args: list[str], *, torture: bool, quiet: bool) -> None:
        self.pytest_args = pytest_args
        self.torture = torture
        self.quiet = quiet
        self.again = int(os.environ.get("DISTLOCK_AGAIN", "0"))
        self.durable = torture or os.environ.get("DISTLOCK_DURABLE") == "1"
        self.failed: list[Failed] = []
        self.children: set[subprocess.Popen[bytes]] = set()
        self.printing = threading.Lock()
        self.stopped = False

    def parts(self, name: str) -> dict[str, list[str]]:
        """The parts of a database's run: one, if somebody waits for its output or names tests."""
        paths = [arg for arg in self.pytest_args if Path(arg.partition("::")[0]).exists()]
        whole = self.torture or not self.quiet or paths or name == "pgbouncer"
        return WHOLE if whole else PARTS

    def run(self, name: str, part: str = "") -> Outcome:
        """Run the passes of one part on one database."""
        outcome = Outcome(name)
        try:
            with served(name, self.durable) as url:
                outcome.version = version(url)
                self.passes(outcome, url, part)
        except Unavailable as reason:
            outcome.not_run = " ".join(str(reason).split())
        return outcome

    def passes(self, outcome: Outcome, url: str, part: str = "") -> None:
        name = outcome.name + part
        own = [*self.parts(outcome.name)[part], *self.pytest_args]
        if self.torture:
            self.one_pass(outcome, name, url, ["-m", "torture", *own])
            return
        self.one_pass(outcome, name, url, ["-m", "not torture", *own])
        # Dates are where USE_TZ matters; the tests about them run a second time without it.
        again = [*own, "-m", "usetz and not torture"]
        self.one_pass(outcome, f"{name}-usetz-off", url, again, use_tz="0")

    def one_pass(
        self, outcome: Outcome, label: str, url: str, args: list[str], use_tz: str = "1"
    ) -> None:
        if self.stopped:
            return
        report = RESULTS / f"{label}.xml"
        report.unlink(missing_ok=True)
        if outcome.name == "pgbouncer":  # its idle sessions would not let the database be dropped
            args = ["--reuse-db", *args]
        args += ["-o", f"cache_dir={RESULTS / label}.cache"]
        environ = {"DISTLOCK_TEST_URL": url, "DISTLOCK_USE_TZ": use_tz}
        status = self.pytest(label, [f"--junitxml={report}", *args], environ)
        outcome.add(label, status, report, may_be_empty=use_tz == "0")
        if status == 1 and 0 < len(failures(report)) <= self.again:
            self.failed.append(Failed(outcome, label, report, args, environ))

    def second_tries(self) -> None:
        """Run what failed once more, one after the other, each on a new server."""
        for each in self.failed:
            second = each.report.with_suffix(".again.xml")
            args = ["--last-failed", f"--junitxml={second}", *each.args]
            with served(each.outcome.name, self.durable) as url:
                environ = {**each.environ, "DISTLOCK_TEST_URL": url}
                if self.pytest(f"{each.label}, what failed", args, environ) in (0, 1):
                    each.outcome.passed_again(each.report, second)

    def pytest(self, label: str, args: list[str], environ: Mapping[str, str]) -> int:
        """Run pytest and return its exit status; 124 if it took too long."""
        with tempfile.TemporaryFile() as output:
            target = output if self.quiet else None
            child = subprocess.Popen(
                [sys.executable, "-m", "pytest", *args],
                cwd=ROOT,
                env={**os.environ, **environ},
                stdout=target,
                stderr=target,
            )
            self.children.add(child)
            try:
                return child.wait(TORTURE_LIMIT if self.torture else RUN_LIMIT)
            except subprocess.TimeoutExpired:
                return 124
            finally:
                self.children.discard(child)
                child.kill()
                child.wait()
                self.show(label, output)

    def show(self, label: str, output: IO[bytes]) -> None:
        output.seek(0)
        if text := output.read().decode(errors="replace"):
            with self.printing:
                print(f"----- {label}\n{text}", flush=True)

    def stop(self, patience: float) -> None:
        """End the running tests; the threads that started servers then stop them.

        Ctrl-C in a terminal has reached pytest already: ``patience`` lets it finish its report.
        """
        self.stopped = True
        for number, seconds in ((0, patience), (signal.SIGINT, 20.0), (signal.SIGKILL, 5.0)):
            for child in list(self.children):
                child.send_signal(number)
            deadline = time.monotonic() + seconds
            while self.children and time.monotonic() < deadline:
                time.sleep(0.05)


def run(names: list[str], runner: Runner, jobs: int) -> list[Outcome]:
    """The outcomes, in the order of the names. Ctrl-C stops everything, servers included."""
    RESULTS.mkdir(exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            name: [pool.submit(runner.run, name, part) for part in runner.parts(name)]
            for name in sorted(names, key=LONGEST_FIRST.index)
        }
        try:
            outcomes = {name: [each.result() for each in futures[name]] for name in names}
            runner.second_tries()
            return [joined(outcomes[name]) for name in names]
        except (KeyboardInterrupt, SystemExit) as end:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop(patience=5.0 if isinstance(end, KeyboardInterrupt) else 0.0)
            raise


def joined(outcomes: list[Outcome]) -> Outcome:
    """One outcome of all parts of a database."""
    for other in outcomes[1:]:
        outcomes[0].join(other)
    return outcomes[0]


def serve(name: str) -> None:
    """Start a private server, say how to reach it, and keep it until Ctrl-C."""
    with SERVERS[name](durable=os.environ.get("DISTLOCK_DURABLE") == "1") as server:
        print(f"# {server.version}, pid {server.pid}, data in {server.data}; Ctrl-C stops it")
        print(f"export DISTLOCK_TEST_URL={server.url}")
        print(f"export DISTLOCK_TEST_{name.upper()}_URL={server.url}", flush=True)
        while server.process is not None and server.process.poll() is None:
            time.sleep(0.2)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--db", action="append", choices=NAMES, help="only this one; repeatable")
    parser.add_argument("--torture", action="store_true", help="only the tests marked torture")
    parser.add_argument("--serve", choices=list(SERVERS), help="only start a server")
    return parser.parse_args(argv)


def interrupt(number: int, _frame: object) -> None:
    """End the run at the first signal; later ones must not cut the stopping of servers short."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: None)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def main(argv: list[str]) -> int:
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parse(argv[:cut])
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)
    if options.serve:
        serve(options.serve)
        return 0
    named = {name for name in SERVERS if os.environ.get(f"DISTLOCK_TEST_{name.upper()}_URL")}
    names = [name for name in NAMES if not options.db or name in options.db]
    if options.torture and not options.db:
        names.remove("pgbouncer")
    # Whoever names a server or a database wants it to be run.
    needed = required(os.environ.get("DISTLOCK_REQUIRE", "")) | named.intersection(names)
    needed |= set(options.db or ())
    jobs = int(os.environ.get("DISTLOCK_JOBS", "1"))
    own = shlex.split(os.environ.get("PYTEST_ARGS", "")) + argv[cut + 1 :]
    runner = Runner(own, torture=options.torture, quiet=jobs > 1)
    text, good = summary(run(names, runner, jobs), needed)
    print(f"\n{text}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (Unavailable, ValueError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
