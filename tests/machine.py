"""What this machine has to offer a server: binaries, a port, a user, a temp folder."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.databases import Unavailable


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago: the caller copes with a lost race."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def directories(*patterns: str) -> list[Path]:
    """The directories that match the patterns, in their order, and then those of PATH."""
    usual = [found for pattern in patterns for found in sorted(glob.glob(pattern), reverse=True)]
    return [Path(d) for d in dict.fromkeys(usual + os.get_exec_path()) if os.path.isdir(d)]


def first(places: list[Path], *names: str) -> Path | None:
    """The first executable of one of the names, an earlier name before an earlier place."""
    found = (place / name for name in names for place in places)
    return next((path for path in found if os.access(path, os.X_OK)), None)


def shown(places: list[Path]) -> str:
    return ", ".join(map(str, places)) or "no directory at all"


def reported_version(binary: Path) -> tuple[int, ...]:
    """The version that a binary prints; an empty tuple, lower than all, if it does not run."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=20)
        if number := re.search(r"\d+(\.\d+)*", said.stdout):
            return tuple(int(part) for part in number[0].split("."))
    return ()


def unprivileged(users: tuple[str, ...]) -> dict[str, Any]:
    """Arguments for ``subprocess`` that give up root, since neither server runs as root."""
    if os.geteuid() != 0:
        return {}
    for name in (*users, "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise Unavailable(f"run as root, and there is no user {' or '.join((*users, 'nobody'))}")


def temp_root() -> str:
    """The first temp folder that every user can reach: TMPDIR may lie in a private home."""
    for candidate in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        path = Path(candidate).resolve()
        if path.is_dir() and all(d.stat().st_mode & 0o001 for d in (path, *path.parents)):
            return candidate
    raise Unavailable("there is no temp folder that an unprivileged user can reach")


def die_with_parent() -> None:
    """In the child, on Linux: have the kernel end the server if its parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGQUIT)  # PR_SET_PDEATHSIG
