"""Real processes on the database under test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from django.db import connection

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
