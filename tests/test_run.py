"""The runner's own logic: what it counts, what it prints last, and when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run import ROOT, Outcome, Runner, counts, joined, required, summary

pytestmark = pytest.mark.vendor("sqlite")

GOOD = Outcome("sqlite", "SQLite 3.40.1", passed=120, skipped=3)
BAD = Outcome("postgresql", "PostgreSQL 15.14", passed=100, failed=2)
ABSENT = Outcome("mariadb", not_run="no mariadbd found (looked in /usr/sbin)")


def report(folder: Path, **numbers: int) -> Path:
    attributes = " ".join(f'{name}="{number}"' for name, number in numbers.items())
    path = folder / "report.xml"
    path.write_text(f"<testsuites><testsuite {attributes}/></testsuites>")
    return path


def test_a_report_is_counted(tmp_path: Path) -> None:
    assert counts(report(tmp_path, tests=10, failures=1, errors=2, skipped=3)) == (4, 3, 3)


def test_a_missing_or_torn_report_counts_nothing(tmp_path: Path) -> None:
    assert counts(tmp_path / "absent.xml") == (0, 0, 0)
    (tmp_path / "torn.xml").write_text("<testsuites><tests")
    assert counts(tmp_path / "torn.xml") == (0, 0, 0)


def test_the_passes_of_one_database_are_added_up(tmp_path: Path) -> None:
    outcome = Outcome("sqlite")
    outcome.add("sqlite", 0, report(tmp_path, tests=10, skipped=1), may_be_empty=False)
    outcome.add("sqlite again", 1, report(tmp_path, tests=3, failures=1), may_be_empty=True)
    assert outcome.counts == "11 passed, 1 failed, 1 skipped"
    assert outcome.problems == []


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (5, "no test was selected"),
        (3, "pytest ended with status 3"),
        (-11, "pytest ended with status -11"),
        (1, "pytest ended with status 1"),
    ],
)
def test_a_bad_end_is_a_failure_even_if_no_test_failed(
    tmp_path: Path, status: int, said: str
) -> None:
    outcome = Outcome("sqlite", "SQLite 3")
    outcome.add("sqlite", status, report(tmp_path, tests=2), may_be_empty=False)
    assert outcome.line() == f"sqlite      2 passed, 1 failed, 0 skipped (SQLite 3); sqlite: {said}"


def test_what_passes_when_it_is_tried_again_is_named(tmp_path: Path) -> None:
    first, second = tmp_path / "report.xml", tmp_path / "again.xml"
    first.write_text(
        '<testsuites><testsuite tests="4" failures="2" errors="1">'
        '<testcase classname="tests.test_a" name="test_x[1]"><failure/></testcase>'
        '<testcase classname="tests.test_a" name="test_x[2]"><failure/></testcase>'
        '<testcase classname="tests.test_b" name="test_y"><error/></testcase>'
        '<testcase classname="tests.test_b" name="test_z"/>'
        "</testsuite></testsuites>"
    )
    second.write_text(
        '<testsuites><testsuite tests="3" failures="1">'
        '<testcase classname="tests.test_a" name="test_x[1]"/>'
        '<testcase classname="tests.test_a" name="test_x[2]"><failure/></testcase>'
        '<testcase classname="tests.test_b" name="test_y"/>'
        "</testsuite></testsuites>"
    )
    outcome = Outcome("sqlite", "SQLite 3")
    outcome.add("sqlite", 1, first, may_be_empty=False)
    assert outcome.failed == 3
    outcome.passed_again(first, second)
    assert outcome.line() == (
        "sqlite      3 passed, 1 failed, 0 skipped (SQLite 3); "
        "only at the second try: test_a.test_x[1], test_b.test_y"
    )


def test_the_second_pass_may_select_nothing(tmp_path: Path) -> None:
    outcome = Outcome("sqlite")
    outcome.add("sqlite again", 5, report(tmp_path, tests=0), may_be_empty=True)
    assert (outcome.failed, outcome.problems) == (0, [])


def test_the_summary_has_a_line_per_database_and_the_total_alone_at_the_end() -> None:
    text, good = summary([GOOD, BAD, ABSENT], set())
    assert text.splitlines() == [
        "sqlite      120 passed, 0 failed, 3 skipped (SQLite 3.40.1)",
        "postgresql  100 passed, 2 failed, 0 skipped (PostgreSQL 15.14)",
        "mariadb     not run: no mariadbd found (looked in /usr/sbin)",
        "",
        "220 passed, 2 failed, 3 skipped",
    ]
    assert not good


def test_a_database_that_is_not_there_fails_only_where_it_is_required() -> None:
    assert summary([GOOD, ABSENT], {"sqlite"})[1]
    text, good = summary([GOOD, ABSENT], {"mariadb"})
    assert not good
    assert "mariadb was required, but not run" in text


def test_a_database_that_was_not_selected_but_is_required_fails() -> None:
    assert not summary([GOOD], {"postgresql"})[1]


def test_nothing_run_is_not_success() -> None:
    assert not summary([ABSENT], set())[1]


def test_required_names() -> None:
    assert required("") == set()
    assert required(" postgresql, mariadb,") == {"postgresql", "mariadb"}
    with pytest.raises(ValueError, match="unknown mysql; valid names: sqlite, postgresql, mariadb"):
        required("postgresql,mysql")


def test_the_parts_of_a_database_are_all_of_it_and_make_one_line() -> None:
    runner = Runner(["-q"], torture=False, quiet=True)
    rest, *apart = runner.parts("mariadb").values()
    paths = [path for part in apart for path in part]
    assert rest == [f"--ignore={path}" for path in paths]
    assert len(paths) == len(set(paths)) > 5
    assert all((ROOT / path).exists() for path in paths)
    for whole in (
        Runner(["tests/test_run.py::x"], torture=False, quiet=True),
        Runner([], torture=True, quiet=True),
        Runner([], torture=False, quiet=False),
    ):
        assert whole.parts("mariadb") == {"": []}
    one = joined(
        [
            Outcome("mariadb", "MariaDB", passed=3, unsteady=["a"]),
            Outcome("mariadb", "MariaDB", passed=2, failed=1, skipped=1, problems=["p"]),
        ]
    )
    assert one.line() == (
        "mariadb     5 passed, 1 failed, 1 skipped (MariaDB); p; only at the second try: a"
    )
