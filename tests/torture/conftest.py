"""Real processes on the database under test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from django.db import connection

from tests.databases import version
from tests.torture.figures import RUNS, table

ROOT = Path(__file__).resolve().parents[2]

LEVEL = os.environ.get("DISTLOCK_TORTURE", "short")
"""How hard: `ci`, `short` (the default) or `long`."""


def environment() -> dict[str, str]:
    """An environment in which a process finds the database that pytest made."""
    base, _, _ = os.environ["DISTLOCK_TEST_URL"].rpartition("/")
    name = str(connection.settings_dict["NAME"])
    url = f"sqlite:///{name}" if connection.vendor == "sqlite" else f"{base}/{name}"
    return {**os.environ, "DISTLOCK_TEST_URL": url, "DJANGO_SETTINGS_MODULE": "tests.settings"}


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(transactional_db: None) -> Iterator[Start]:
    """Start `python -m MODULE ARGUMENTS`; whatever still runs at the end is killed, by its pid."""
    processes: list[subprocess.Popen[bytes]] = []

    def begin(module: str, *arguments: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment())
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait(10)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures, and keep them where docs/promises.md can be made from them."""
    if not RUNS:
        return
    server = version(os.environ["DISTLOCK_TEST_URL"])
    text = f"{server}, `DISTLOCK_TORTURE={LEVEL} make torture`\n\n{table(RUNS)}\n"
    folder = ROOT / ".test-results"
    folder.mkdir(exist_ok=True)
    (folder / f"torture-{connection.vendor}.md").write_text(text)
    terminalreporter.section("torture")
    terminalreporter.write_line(text)
