"""Break the project on purpose, one line at a time, and see that a test fails.

A mutant is one replacement in a temporary copy of the project, in which the tests that should
notice are run. They stand in text files:

    # what goes wrong [names of tests] (databases, if not all)
    - text in the module, of one or more lines
    + text in its place, or none

A name of tests is that of a module without test_, with its folder below tests/ if it has one, and
perhaps of one test in it: `leases`, `conformance/guard`, `life::test_two_generators`. Each mutant
is `killed`, with the first test that noticed, or `SURVIVED`, or it is none, because its text is not
found any more or is no valid SQL or Python, or its tests fail without it. All but the first are
failures. What can be told without a test is told by `fault`, which `tests/test_mutants.py` asks.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from tests.run import ROOT, served

DATABASES = ("sqlite", "postgresql", "mariadb")
RUN_LIMIT = 600.0
HEAD = re.compile(r"# (.+?) \[(.+)\](?: \((.+)\))?")
NO_MUTANT = re.compile(
    r"NO MUTANT|syntax|SyntaxError|NameError|ImportError|no such column"
    r"|ProgrammingError(?!: \(2014,)|\((?:1064|1054),|arguments"
)
"""An error that any test would notice: the text does not fit, and proves nothing."""
FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+?::.*?)(?: - (.*))?$", re.MULTILINE)


@dataclass
class Mutant:
    """One line broken."""

    module: str
    """Its path in the project."""
    why: str
    tests: list[str]
    databases: list[str]
    minus: list[str] = field(default_factory=list)
    plus: list[str] = field(default_factory=list)

    def applied(self, text: str) -> str:
        """Return the module's text with the line broken: as it was, if it is not there."""
        return text.replace("\n".join(self.minus), "\n".join(self.plus))


def read(path: Path, module: str, tests: str = "") -> list[Mutant]:
    """Read the mutants of a module. Names of tests without a folder are below tests/ + `tests`."""
    found: list[Mutant] = []
    for line in path.read_text().splitlines():
        if head := HEAD.fullmatch(line):
            names = [name if "/" in name else tests + name for name in head[2].split()]
            found.append(Mutant(module, head[1], names, (head[3] or "").split()))
        elif line.startswith("-"):
            found[-1].minus.append(line[2:])
        elif line.startswith("+"):
            found[-1].plus.append(line[2:])
        elif line:
            raise ValueError(f"{path}: what is {line!r}?")
    return found


def node(name: str) -> str:
    """Return what pytest calls the tests of a name."""
    name, *test = name.split("::")
    folder, _, module = name.rpartition("/")
    return "::".join([f"{Path('tests', folder)}/test_{module}.py", *test])


def fault(mutant: Mutant) -> str | None:
    """Return why a mutant cannot be one, as far as its text tells; else `None`."""
    text = (ROOT / mutant.module).read_text()
    broken = mutant.applied(text)
    if broken == text:
        return "its text is not found"
    try:
        ast.parse(broken)
    except SyntaxError as error:
        return f"it is no Python: {error}"
    if unknown := set(mutant.databases).difference(DATABASES):
        return f"there is no database {unknown.pop()}"
    return next(
        (f"there are no tests {name}" for name in mutant.tests if not _is_there(name)), None
    )


def _is_there(name: str) -> bool:
    path, *test = node(name).split("::")
    if not (ROOT / path).exists():
        return False
    found: list[ast.stmt] = ast.parse((ROOT / path).read_text()).body
    for part in test:
        named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        inside = [each for each in found if isinstance(each, named) and each.name == part]
        if not inside:
            return False
        found = inside[0].body
    return True


class Copy:
    """A copy of the project in a temporary folder, in which one file is broken at a time."""

    def __init__(self, folder: str, url: str) -> None:
        self.root = Path(folder) / "copy"
        self.environ = {
            **os.environ,
            "DISTLOCK_TEST_URL": url,
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "500",  # so that the error is named whole
        }
        for name in ("distlock", "tests"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, self.root / name, ignore=ignored)
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        where = "import distlock; print(distlock.__file__)"
        said = subprocess.check_output([sys.executable, "-c", where], cwd=self.root, text=True)
        if not said.startswith(str(self.root)):
            raise SystemExit(f"the copy is not what is imported, but {said}")
        self._without: dict[str, str | None] = {}

    def _fails_without(self, names: list[str]) -> str | None:
        """Return the first test of these names that fails without a mutant; else `None`."""
        for name in names:
            if name not in self._without:
                self._without[name] = self.failure(name)
        return next(filter(None, map(self._without.get, names)), None)

    def failure(self, name: str) -> str | None:
        """Return the first test of a name that fails, and fails again, and why; else `None`.

        A test that fails once, on a machine that is busy, has noticed nothing.
        """
        passed_by: list[str] = []
        while True:
            status, output = self._pytest(node(name), *passed_by)
            if status in (0, 5):  # 5: there are none for this database
                return None
            first = FAILURE.search(output)
            if status != 1 or first is None:
                return f"NO MUTANT: pytest ended with {status}: {output[-500:]}"
            again, _ = self._pytest(first[1])
            if again:
                return first[0].partition("::")[2]
            passed_by.append(f"--deselect={first[1]}")

    def _pytest(self, *arguments: str) -> tuple[int, str]:
        """Run tests up to the first failure; a mutant may also make them hang."""
        options = ["-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "--timeout=60"]
        if "::" not in arguments[0]:  # a test that is named is wanted, however slow
            options += ["-m", "not torture and not slow"]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *arguments],
                cwd=self.root,
                env=self.environ,
                capture_output=True,
                text=True,
                timeout=RUN_LIMIT,
            )
        except subprocess.TimeoutExpired:
            return 1, f"FAILED all::nothing came of it within {RUN_LIMIT} s - hangs"
        return done.returncode, done.stdout + done.stderr

    def verdict(self, mutant: Mutant) -> str:
        """Return what became of a mutant; all is well if that begins with "killed"."""
        if failure := self._fails_without(mutant.tests):
            return f"PROVES NOTHING: without it, too, fails {failure}"
        path = self.root / mutant.module
        text = path.read_text()
        broken = mutant.applied(text)
        if broken == text:
            return "NOT FOUND"
        path.write_text(broken)
        try:
            failure = next(filter(None, map(self.failure, mutant.tests)), None)
        finally:
            path.write_text(text)
        if failure is None:
            return "SURVIVED"
        return failure if NO_MUTANT.search(failure) else f"killed by {failure[:120]}"


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def run(description: str, mutants: Mapping[str, Sequence[Mutant]]) -> int:
    """Try the mutants of each database, as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--db", action="append", choices=list(mutants))
    parser.add_argument("--module", action="append", help="only mutants of distlock/../MODULE.py")
    parser.add_argument("--only", action="append", help="only mutants with this in their name")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time, each on a server")
    options = parser.parse_args()
    bad = total = 0
    for database in options.db or mutants:
        chosen = [
            mutant
            for mutant in mutants[database]
            if any(word in mutant.why for word in options.only or [""])
            and Path(mutant.module).stem in (options.module or [Path(mutant.module).stem])
            and database in (mutant.databases or [database])
        ]
        verdicts = tried(database, chosen, options.jobs)
        total += len(verdicts)
        bad += sum(not verdict.startswith("killed") for verdict in verdicts)
    say(f"\n{total} mutants, {total - bad} killed, {bad} not")
    return 1 if bad or not total else 0


def tried(database: str, mutants: Sequence[Mutant], jobs: int) -> list[str]:
    """Try mutants on one database, say what became of each, and return it."""
    with ExitStack() as stack:
        free: SimpleQueue[Copy] = SimpleQueue()
        for _ in range(jobs):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            free.put(Copy(folder, stack.enter_context(served(database, durable=False))))

        def verdict(mutant: Mutant) -> str:
            copy = free.get()
            try:
                found = copy.verdict(mutant)
            finally:
                free.put(copy)
            say(f"{database} {Path(mutant.module).stem}: {mutant.why}: {found}")
            return found

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(verdict, mutants))
