"""Jobs that run once, while the processes that run them are killed at every point."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from distlock.models import Job
from tests.app.models import Counter
from tests.torture.conftest import LEVEL, Start
from tests.torture.jobs import ANYWHERE, JOBS, PLACES

pytestmark = [
    pytest.mark.torture,
    pytest.mark.vendor("postgresql", "mysql"),
    pytest.mark.timeout(3600),
]

ROUNDS = {"ci": 1, "short": 8, "long": 80}[LEVEL]


def notes(folder: Path, op: str) -> list[dict[str, Any]]:
    """What the processes of one form have noted; a killed one may have left half a line."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [note for note in found if note["op"] == op]


def effects(form: str) -> dict[str, list[str]]:
    """The rows that each job of a form has left."""
    found: dict[str, list[str]] = defaultdict(list)
    for (name,) in Counter.objects.filter(name__startswith=form).values_list("name"):
        found[re.sub(r"/\w+$", "", name)].append(name)
    return found


def test_each_job_takes_effect_once(start: Start, tmp_path: Path) -> None:
    folders = {form: tmp_path / form for form in PLACES}
    processes = []
    for form, folder in folders.items():
        folder.mkdir()
        processes.append(start("tests.torture.jobs", form, ROUNDS, folder))
    assert [process.wait(3000) for process in processes] == [0] * len(processes)
    for form, folder in folders.items():
        deaths = notes(folder, "death")
        assert {death["place"] for death in deaths} == set(PLACES[form]), "nobody died there"
        assert len(deaths) == ROUNDS * (len(PLACES[form]) - 1 + ANYWHERE)
        check(
            form, folder, {f"{death['name']}/{job}" for death in deaths for job in range(JOBS + 1)}
        )


def check(form: str, folder: Path, keys: set[str]) -> None:
    """Every job has its receipt and its one effect, and everybody was told the same."""
    receipts = {job.key: job.result for job in Job.objects.filter(key__startswith=form)}
    assert set(receipts) == keys
    assert set(Job.objects.values_list("state", flat=True)) == {"done"}
    for note in notes(folder, "result"):
        assert note["result"] == receipts[note["key"]]
    found = effects(form)
    if form != "plain":
        assert found == {key: [result] for key, result in receipts.items()}, "lost, or twice"
        return
    assert all(result in found[key] for key, result in receipts.items()), "lost"
    twice = sum(len(names) - 1 for names in found.values())
    losses = [note for note in notes(folder, "again") if note["error"] == "LockLost"]
    assert twice <= len(notes(folder, "death")) + len(losses), "only what was killed runs again"
