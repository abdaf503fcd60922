"""Break each safety line of the backends on purpose, and see that a test fails.

    python -m tests.conformance.mutations [--db postgresql] [--only WORD] [--jobs 2]

The mutants stand in mutants/<name of the file in distlock/backends>.txt; `tests/mutants.py` says
what is in there, and what is printed. It takes some minutes, so the suite does not run it: do so by
hand after a change of a statement.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.mutants import Mutant, read, run

FOLDER = Path(__file__).parent / "mutants"
FILES = {
    "sqlite": ["sqlite", "base"],
    "postgresql": ["postgresql", "plans", "generic", "base"],
    "mariadb": ["mysql", "plans", "generic"],
}


def mutants(name: str) -> list[Mutant]:
    """The mutants of one module of distlock/backends."""
    return read(FOLDER / f"{name}.txt", f"distlock/backends/{name}.py", "conformance/")


if __name__ == "__main__":
    sets = {
        database: [mutant for name in names for mutant in mutants(name)]
        for database, names in FILES.items()
    }
    sys.exit(run("Break each safety line of the backends, and see a test fail.", sets))
