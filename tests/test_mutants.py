"""The lists of mutants fit the code: a text that is not there any more would break nothing.

That the tests notice each of them takes hours, and is `make mutations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conformance import mutations as conformance
from tests.contrib import mutations as contrib
from tests.mutants import Mutant, fault, read
from tests.torture import mutations as torture

pytestmark = pytest.mark.vendor("sqlite")  # once: no database is asked


def faults(mutants: Sequence[Mutant]) -> list[str]:
    return [f"{each.module}: {each.why}: {why}" for each in mutants if (why := fault(each))]


@pytest.mark.parametrize("name", ["sqlite", "postgresql", "mysql", "generic", "base"])
def test_the_mutants_of_statements_fit_the_code(name: str) -> None:
    mutants = conformance.mutants(name)
    assert mutants
    assert faults(mutants) == []


@pytest.mark.parametrize("server", torture.SERVERS)
def test_the_mutants_of_the_package_fit_the_code(server: str) -> None:
    mutants = torture.own(server)
    assert mutants
    assert faults(mutants) == []


@pytest.mark.parametrize("name", contrib.MODULES)
def test_the_mutants_of_the_adapters_fit_the_code(name: str) -> None:
    mutants = contrib.mutants(name)
    assert mutants
    assert faults(mutants) == []


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        (contrib.FOLDER, set(contrib.MODULES)),
        (torture.FOLDER, set(torture.MODULES).union(*torture.SERVERS.values())),
        (conformance.FOLDER, set().union(*conformance.FILES.values())),
    ],
)
def test_every_list_is_run(folder: Path, names: set[str]) -> None:
    assert {path.stem for path in folder.iterdir()} <= names


def test_the_statements_that_fencing_rests_on_are_among_the_mutants() -> None:
    names = {mutant.why for server in torture.SERVERS for mutant in torture.rested_on(server)}
    assert names == torture.RESTED_ON


@pytest.mark.parametrize(
    ("head", "minus", "why"),
    [
        ("[leases]", "def no_such_function", "its text is not found"),
        ("[leases]", "def release(self)", "it is no Python"),
        ("[leases] (oracle)", "self.check()", "there is no database oracle"),
        ("[no_such_module]", "self.check()", "there are no tests no_such_module"),
        ("[leases::test_no_such]", "self.check()", "there are no tests leases::test_no_such"),
        ("[leases::test_leaving_after_a_loss_raises]", "self.check()", None),
    ],
)
def test_a_mutant_that_is_none_is_found(
    tmp_path: Path, head: str, minus: str, why: str | None
) -> None:
    file = tmp_path / "leases.txt"
    file.write_text(f"# it goes wrong {head}\n- {minus}\n+ pass\n")
    (mutant,) = read(file, "distlock/leases.py")
    found = fault(mutant)
    assert found is None if why is None else found is not None and found.startswith(why)
