"""Eight processes, one name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.app.models import Counter
from tests.torture.conftest import LEVEL, Start
from tests.torture.history import History

PROCESSES = 8
SECTIONS = 2_000 if LEVEL == "ci" else 20_000


@pytest.mark.torture
@pytest.mark.timeout(1800)
def test_no_overlap_and_growing_tokens(start: Start, tmp_path: Path) -> None:
    Counter.objects.create(name="torture", value=0)
    workers = [
        start("tests.torture.worker", SECTIONS // PROCESSES, tmp_path) for _ in range(PROCESSES)
    ]
    for worker in workers:
        assert worker.wait(1500) == 0

    history = History.read(tmp_path)
    assert len(history.holds) == len(history.grants) == SECTIONS
    assert history.lost == []
    assert history.overlaps() == []
    assert history.disorder() == []
    assert Counter.objects.get(name="torture").value == SECTIONS
