"""Break each safety line of the adapters on purpose, and see that a test fails.

    python -m tests.contrib.mutations [--db sqlite] [--only WORD] [--jobs 2]

The mutants stand in mutants/<name of the file in distlock/contrib>.txt; `tests/mutants.py` says
what is in there, and what is printed. It takes some minutes, so the suite does not run it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.mutants import Mutant, read, run

FOLDER = Path(__file__).parent / "mutants"
MODULES = (
    "celery",
    "_instances",
    "_deliveries",
    "beat",
    "beat_database",
    "_ticks",
    "_lazily",
    "http",
    "_requests",
    "_responses",
    "tasks",
    "prometheus._receivers",
    "opentelemetry._receivers",
)
DATABASES = ("sqlite", "postgresql")


def mutants(name: str) -> list[Mutant]:
    """The mutants of one module of distlock/contrib."""
    module = name.replace(".", "/")
    return read(FOLDER / f"{name}.txt", f"distlock/contrib/{module}.py", "contrib/")


if __name__ == "__main__":
    every = [mutant for name in MODULES for mutant in mutants(name)]
    sets = {
        database: [mutant for mutant in every if database in (mutant.databases or ["sqlite"])]
        for database in DATABASES
    }
    sys.exit(run("Break each safety line of the adapters, and see a test fail.", sets))
