"""Break each safety line of the backends on purpose, and see that a test fails.

    python -m tests.conformance.mutations [--db postgresql] [--only WORD]

Every mutant in mutants/ is one replacement in a temporary copy of the project, in which the tests
that should notice are run:

    # what goes wrong [modules of these tests, without test_]
    - text in distlock/backends/<name of the file>.py, of one or more lines
    + text in its place, or none

Prints `killed` with the first test that noticed, or `SURVIVED`. Ends with an error if one
survived, if its text is not found any more, or if it is no valid SQL or Python. It takes some
minutes, so the suite does not run it: do so by hand after a change of a statement.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tests.run import ROOT, served

RUN_LIMIT = 300.0
FOLDER = Path(__file__).parent
FILES = {
    "sqlite": ["sqlite", "base"],
    "postgresql": ["postgresql", "generic", "base"],
    "mariadb": ["mysql", "generic"],
}
NO_MUTANT = re.compile(
    r"syntax|SyntaxError|NameError|ImportError|ProgrammingError|no such column|1064|1054|arguments"
)
"""An error that any test would notice: the text does not fit, and proves nothing."""


@dataclass
class Mutant:
    """One line broken."""

    why: str
    tests: list[str]
    minus: list[str] = field(default_factory=list)
    plus: list[str] = field(default_factory=list)

    def applied(self, text: str) -> str:
        """Return a module's text with the line broken: as it was, if it is not there."""
        return text.replace("\n".join(self.minus), "\n".join(self.plus))


def mutants(name: str) -> list[Mutant]:
    """The mutants of one module of distlock/backends."""
    found: list[Mutant] = []
    for line in (FOLDER / "mutants" / f"{name}.txt").read_text().splitlines():
        if head := re.fullmatch(r"# (.+) \[(.+)\]", line):
            found.append(Mutant(head[1], head[2].split()))
        elif line.startswith("-"):
            found[-1].minus.append(line[2:])
        elif line.startswith("+"):
            found[-1].plus.append(line[2:])
        elif line:
            raise ValueError(f"{name}.txt: what is {line!r}?")
    return found


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

    def check(self) -> None:
        """Raise unless the tests pass in the copy, and on the package in the copy."""
        where = "import distlock; print(distlock.__file__)"
        said = subprocess.check_output([sys.executable, "-c", where], cwd=self.root, text=True)
        if not said.startswith(str(self.root)):
            raise SystemExit(f"the copy is not what is imported, but {said}")
        status, output = self.test([])
        if status:
            raise SystemExit(f"without a mutant the tests fail:\n{output}")

    def test(self, modules: list[str]) -> tuple[int, str]:
        """Run test modules, or all of them, up to the first failure."""
        paths = [f"tests/conformance/test_{module}.py" for module in modules]
        options = ["-x", "-q", "-rf", "--tb=no", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *(paths or ["tests/conformance"])],
            cwd=self.root,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT,
        )
        return done.returncode, done.stdout + done.stderr

    def verdict(self, module: str, mutant: Mutant) -> str:
        """Return what became of a mutant; all is well if that begins with "killed"."""
        path = self.root / "distlock" / "backends" / f"{module}.py"
        text = path.read_text()
        broken = mutant.applied(text)
        if broken == text:
            return "NOT FOUND"
        path.write_text(broken)
        try:
            status, output = self.test(mutant.tests)
        finally:
            path.write_text(text)
        if status == 0:
            return "SURVIVED"
        first = re.search(r"^FAILED \S+::(\S.*)", output, re.MULTILINE)
        if status != 1 or first is None or NO_MUTANT.search(first[1]):
            return f"NO MUTANT: pytest ended with {status}: {output[-500:]}"
        return f"killed by {first[1][:120]}"


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description="Break each safety line, and see a test fail.")
    parser.add_argument("--db", action="append", choices=list(FILES))
    parser.add_argument("--only", default="", help="only mutants that have this in their name")
    options = parser.parse_args()
    bad = total = 0
    for database in options.db or FILES:
        with tempfile.TemporaryDirectory() as folder, served(database, durable=False) as url:
            copy = Copy(folder, url)
            copy.check()
            for module in FILES[database]:
                for mutant in mutants(module):
                    if options.only in mutant.why:
                        verdict = copy.verdict(module, mutant)
                        total += 1
                        bad += not verdict.startswith("killed")
                        say(f"{database} {module}: {mutant.why}: {verdict}")
    say(f"\n{total} mutants, {total - bad} killed, {bad} not")
    return 1 if bad or not total else 0


if __name__ == "__main__":
    sys.exit(main())
