"""docs/promises.md names, for each promise, tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.vendor("sqlite")

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "promises.md").read_text()
PROMISES = [f"S{number}" for number in range(1, 9)] + [f"L{number}" for number in range(1, 6)]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


@pytest.mark.parametrize("promise", PROMISES)
def test_each_promise_names_a_test(promise: str) -> None:
    _, found, text = PAGE.partition(f"**{promise}.")
    assert found, f"{promise} is missing"
    assert re.search(r"`tests/[\w/]+\.py::\w+`", re.split(r"\*\*[SL]\d\.", text)[0])


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_each_test_named_is_there(file: str, name: str) -> None:
    assert f"def {name}(" in (ROOT / file).read_text()
