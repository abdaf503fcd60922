"""What the holders of one name say they did, and whether that can be true.

Each process appends one JSON line per operation to a file of its own: when it began and ended, on
the machine's monotonic clock, which all processes of a host share.

    hold     token, from, to       between the return of acquire and the call of release
    commit   key, token, wrote, outcome
                                   a protected transaction: ok, failed or unknown; the last counts
    lost     token                 a holder was told of its loss
    error    token                 the database did not answer
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

KINDS = {"hold": "holds", "lost": "lost", "error": "errors"}


class Recorder:
    """Appends this process's operations; each line reaches the system before the next one."""

    def __init__(self, folder: str) -> None:
        self._file: TextIO = (Path(folder) / f"{os.getpid()}.jsonl").open("a", buffering=1)

    def note(self, op: str, **fields: Any) -> None:
        """Append an operation."""
        self._file.write(json.dumps({"op": op, "at": time.monotonic(), **fields}) + "\n")


@dataclass
class History:
    """The operations of all processes."""

    holds: list[dict[str, Any]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> History:
        """Read what every process wrote; a killed one may have left half a line."""
        history, last = cls(), {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    operation = json.loads(line)
                except ValueError:
                    continue
                if operation["op"] == "commit":
                    last[operation["key"]] = operation
                else:
                    getattr(history, KINDS[operation["op"]]).append(operation)
        history.commits = list(last.values())
        return history

    def overlaps(self) -> list[str]:
        """S1: no two holders that were not told of a loss held at the same time."""
        lost = {operation["token"] for operation in self.lost}
        faults, latest = [], None
        for hold in sorted(self.holds, key=lambda hold: hold["from"]):
            if hold["token"] in lost:
                continue
            if latest is not None and hold["from"] < latest["to"]:
                faults.append(f"token {hold['token']} began while {latest['token']} held")
            if latest is None or hold["to"] > latest["to"]:
                latest = hold
        return faults

    def disorder(self) -> list[str]:
        """S5: tokens grow strictly, in the order in which the lock was held."""
        return _not_growing(sorted(self.holds, key=lambda hold: hold["from"]), "granted")

    def unordered_commits(self) -> list[str]:
        """S2: protected transactions are ordered by token, by the number that each one wrote."""
        return _not_growing(sorted(self._known, key=lambda commit: commit["wrote"]), "committed")

    def overwritten(self) -> list[str]:
        """No two known commits wrote the same number: one of them would be lost."""
        numbers = [commit["wrote"] for commit in self._known]
        return [
            f"{number} was written twice" for number in set(numbers) if numbers.count(number) > 1
        ]

    @property
    def _known(self) -> list[dict[str, Any]]:
        return [commit for commit in self.commits if commit["outcome"] == "ok"]

    def counter_faults(self, value: int) -> list[str]:
        """No update was lost: every known commit counts once, an unknown one at most once."""
        ok = sum(commit["outcome"] == "ok" for commit in self.commits)
        unknown = sum(commit["outcome"] == "unknown" for commit in self.commits)
        if ok <= value <= ok + unknown:
            return []
        return [f"the counter is {value}, but {ok} commits are known and {unknown} unknown"]


def _not_growing(operations: Iterable[dict[str, Any]], what: str) -> list[str]:
    faults, previous = [], -1
    for operation in operations:
        if operation["token"] <= previous:
            faults.append(f"token {operation['token']} was {what} after {previous}")
        previous = max(previous, operation["token"])
    return faults
