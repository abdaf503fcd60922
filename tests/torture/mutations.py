"""Break each safety line of the package on purpose, and see that a test fails.

    python -m tests.torture.mutations [--db postgresql] [--module leases] [--only WORD] [--jobs 2]

Three kinds of lines: those of the statements that fencing and mutual exclusion rest on (by name,
from tests/conformance/mutants), those of mutants/<module>.txt here, in the rest of the package, and
a few statements as one might write them and must not. `tests/mutants.py` says what is in the files,
and what is printed. It takes an hour, so the suite does not run it: do so by hand after a change of
a module, with `--only` or for one database.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.conformance.mutations import mutants as statements
from tests.mutants import Mutant, read, run

FOLDER = Path(__file__).parent / "mutants"
MODULES = (
    "jobs",
    "calls",
    "receipts",
    "fields",
    "hooks",
    "transactions",
    "atomics",
    "leases",
    "terms",
    "keeper",
    "acquisitions",
    "contexts",
    "errands",
    "background",
    "turns",
    "lookout",
    "queues",
    "ears",
    "waiting",
    "places",
    "connections",
    "limits",
    "locks",
    "longholds",
)
SERVERS = {"postgresql": ["postgresql", "generic"], "mariadb": ["mysql", "generic"]}

RESTED_ON = {
    "a guard locks nothing",  # the row lock of the guard
    "owner dropped in guard",
    "token dropped in guard",  # the token check
    "owner dropped in renew",  # the owner from a compare-and-set
    "owner dropped in release",
    "owner dropped in free",
    "token dropped in release",
    "microseconds dropped",  # and the high-water mark, in the token
    "microseconds dropped in an upsert",
    "microseconds dropped in force",
    "previous + 1 dropped",
    "previous + 1 dropped in an upsert",
    "previous + 1 dropped in force",
    "high-water mark dropped in insert",
    "no mark is written",
    "the mark is not written",
    "the mark goes down",
    "a grant locks too weakly",  # FOR UPDATE before a grant
    "a grant locks nothing",
    "freeing locks too weakly",
    "force locks too weakly",  # FOR UPDATE before a force-release
    "force locks nothing",
    "a purge locks too weakly",
    "expiry dropped in renew",  # an expired lease is never renewed back to life
    "every release sets it",  # synchronous_commit, in the user's transaction
    "set_config in a release inside a transaction",
    "a trace passes a pin by",
    "a guard looks at an old snapshot only",  # and the same at REPEATABLE READ
    "a guard passes under a snapshot from before the grant",
    "a guard sees only what was there at the snapshot",
    "a release sees only what was there at the snapshot",
    "a release looks at an old snapshot only",
    "a rolled-back release counts as committed",
}
"""The names of mutants of statements. A vendor need not have each, but somebody must."""


def rested_on(server: str) -> list[Mutant]:
    """The mutants of a server's own statements, then the portable ones."""
    modules = [*SERVERS[server], "base"]
    return [mutant for name in modules for mutant in statements(name) if mutant.why in RESTED_ON]


def own(server: str) -> list[Mutant]:
    """The mutants in the folder mutants."""
    paths = [f"distlock/{name}.py" for name in MODULES]
    paths += [f"distlock/backends/{name}.py" for name in SERVERS[server]]
    files = ((FOLDER / f"{Path(path).stem}.txt", path) for path in paths)
    return [mutant for file, path in files if file.exists() for mutant in read(file, path)]


if __name__ == "__main__":
    sets = {server: rested_on(server) + own(server) for server in SERVERS}
    known = {mutant.why for mutants in sets.values() for mutant in mutants}
    if unknown := RESTED_ON - known:
        sys.exit(f"no such mutants: {', '.join(sorted(unknown))}")
    sys.exit(run("Break each safety line of the package, and see a test fail.", sets))
