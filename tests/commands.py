"""`manage.py` as a process of its own, on the database under test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from django.db import connections

from tests.machine import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 30.0
MANAGE = [sys.executable, str(ROOT / "manage.py")]


def environ() -> dict[str, str]:
    """Where the process finds the databases that pytest made."""
    names = {alias: str(connections[alias].settings_dict["NAME"]) for alias in connections}
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.contrib.settings",
        "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",  # what hangs says where
        **{f"DISTLOCK_WORKER_DATABASE_{alias}": name for alias, name in names.items()},
    }


@contextmanager
def manage(*arguments: str, prepare: Any = None, **how: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a command beside the test. `prepare` is called in the child before it."""

    def prepared() -> None:
        die_with_parent()
        if prepare:
            prepare()

    usual: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(
        [*MANAGE, *arguments],
        cwd=ROOT,
        text=True,
        preexec_fn=prepared,
        **{"env": environ(), **usual, **how},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end: the status, and what was said on both streams."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        try:
            said: Any = process.communicate(timeout=2)
        except subprocess.TimeoutExpired as still:  # a child of its own has the pipes, too
            said = still.stdout, still.stderr
        raise AssertionError(f"It goes on after {LIMIT} s: {said}") from None
    return process.returncode, out, err


def done(*arguments: str, **how: Any) -> tuple[int, str, str]:
    """Run a command to its end."""
    with manage(*arguments, **how) as process:
        return ended(process)


def is_alive(pid: int) -> bool:
    """Whether a process is there, and more than an entry in the table."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def kill(pid: int) -> None:
    if is_alive(pid):
        os.kill(pid, signal.SIGKILL)
