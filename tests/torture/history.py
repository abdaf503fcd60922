"""What the holders of one name say they did, and whether that can be true.

Each process appends one JSON line per operation to a file of its own. `at` is when it was noted, on
the machine's monotonic clock, which all processes of a host share.

    grant     since, token           granted at some point between `since` and `at`
    hold      since, until, token, fence
                                     held, and rightly trusted, all the time between
    commit    key, fence, token, wrote, sent, outcome
                                     a protected transaction: ok, failed or unknown; the last counts
    lost      token                  a holder was told of its loss
    unknown   token                  a holder was told that nobody can know
    error     token                  the database did not answer; with a token: amid a transaction
    killed    pid, point             a process was killed
    deaf                             the answer to a COMMIT was lost

# Note [The ledger]
Every transaction writes one more than it read, and in the same transaction leaves an entry of its
own, which nothing overwrites. So the entries tell which transactions took effect, whatever their
writers were told: they must have written 1, 2, 3 and so on to the final value, one each. A number
that stands there twice is an update that was lost.
"""

from __future__ import annotations

import json
import os
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, zip_longest
from math import inf
from pathlib import Path
from typing import Any, TextIO

Operation = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """What one committed transaction left behind; see Note [The ledger]."""

    key: str
    token: int
    wrote: int


LISTS = {
    "grant": "grants",
    "hold": "holds",
    "lost": "lost",
    "unknown": "unknown",
    "error": "errors",
    "killed": "kills",
    "deaf": "deaf",
}


class Recorder:
    """Appends this process's operations; each line reaches the system before the next one."""

    def __init__(self, folder: str | Path) -> None:
        self._file: TextIO = (Path(folder) / f"{os.getpid()}.jsonl").open("a", buffering=1)

    def note(self, op: str, **fields: Any) -> None:
        """Append an operation."""
        self._file.write(json.dumps({"op": op, "at": time.monotonic(), **fields}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass
class History:
    """The operations of all processes."""

    grants: list[Operation] = field(default_factory=list)
    holds: list[Operation] = field(default_factory=list)
    commits: list[Operation] = field(default_factory=list)
    lost: list[Operation] = field(default_factory=list)
    unknown: list[Operation] = field(default_factory=list)
    errors: list[Operation] = field(default_factory=list)
    kills: list[Operation] = field(default_factory=list)
    deaf: list[Operation] = field(default_factory=list)

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
                    getattr(history, LISTS[operation["op"]]).append(operation)
        history.commits = list(last.values())
        return history

    def with_outcome(self, outcome: str) -> list[Operation]:
        """The protected transactions that ended so."""
        return [commit for commit in self.commits if commit["outcome"] == outcome]

    @property
    def cut_off(self) -> list[Operation]:
        """The transactions of holders that ended because the database did not answer."""
        return [error for error in self.errors if error["token"]]

    # -- what must not be --------------------------------------------------------------------------

    def faults(self, value: int, ledger: list[Entry], *, one_holder: bool = True) -> list[str]:
        """Everything that cannot be true, if the counter ended at `value` with these entries.

        `one_holder`: S1 is promised, because the database's clock did not jump.
        """
        return [
            *self.counter_faults(value),
            *self.untruths(ledger),
            *lost_updates(value, ledger),
            *unordered(ledger),
            *self.late_commits(ledger),
            *self.disorder(),
            *(self.overlaps() if one_holder else ()),
        ]

    def overlaps(self) -> list[str]:
        """S1: nobody was granted the lock while another held it and had reason to trust that."""
        faults, latest = [], None
        for hold in sorted(self.holds, key=lambda hold: hold["since"]):
            if latest is not None and hold["since"] < latest["until"]:
                faults.append(f"token {hold['token']} was held while {latest['token']} was")
            if latest is None or hold["until"] > latest["until"]:
                latest = hold
        return faults + self._granted_to_another()

    def _granted_to_another(self) -> list[str]:
        """Also the grants to those who died before they could note that they held it."""
        grants = sorted(self.grants, key=lambda grant: grant["at"])
        answered = [grant["at"] for grant in grants]
        return [
            f"token {grant['token']} was granted while {hold['token']} was held"
            for hold in self.holds
            for grant in grants[
                bisect_left(answered, hold["since"]) : bisect_right(answered, hold["until"])
            ]
            if grant["since"] >= hold["since"] and grant["token"] != hold["token"]
        ]

    def disorder(self) -> list[str]:
        """S5: what was granted later has a greater token, and no token is granted twice."""
        faults = []
        answered = sorted(self.grants, key=lambda grant: grant["at"])
        greatest, passed = -1, 0
        for grant in sorted(self.grants, key=lambda grant: grant["since"]):
            while answered[passed]["at"] < grant["since"]:
                greatest = max(greatest, answered[passed]["token"])
                passed += 1
            if grant["token"] <= greatest:
                faults.append(f"token {grant['token']} was granted after {greatest}")
        tokens = sorted(grant["token"] for grant in self.grants)
        twice = {first for first, second in pairwise(tokens) if first == second}
        return faults + [f"token {token} was granted twice" for token in sorted(twice)]

    def late_commits(self, ledger: list[Entry]) -> list[str]:
        """S2: nobody committed after a later holder had been granted the lock."""
        there = {entry.key for entry in ledger}
        grants = sorted(self.grants, key=lambda grant: grant["at"])
        answered = [grant["at"] for grant in grants]
        greatest = list(accumulate((grant["token"] for grant in grants), max, initial=-1))
        faults = []
        for commit in self.commits:
            if commit["key"] not in there:
                continue
            later = greatest[bisect_left(answered, commit["sent"])]
            if later > commit["token"]:
                faults.append(f"token {commit['token']} committed after {later} was granted")
        return faults

    def counter_faults(self, value: int) -> list[str]:
        """Every known commit counts once, an unknown one at most once."""
        ok, unknown = len(self.with_outcome("ok")), len(self.with_outcome("unknown"))
        if ok <= value <= ok + unknown:
            return []
        return [f"the counter is {value}, but {ok} commits are known and {unknown} unknown"]

    def untruths(self, ledger: list[Entry]) -> list[str]:
        """S6: nobody was told of a success or a failure that was none."""
        told = {commit["key"]: commit["outcome"] for commit in self.commits}
        there = {entry.key: entry for entry in ledger}
        faults = [
            f"token {entry.token} wrote {entry.wrote}, and was told that it {outcome}"
            for entry in ledger
            if (outcome := told.get(entry.key, "sent no COMMIT")) not in ("ok", "unknown")
        ]
        missing = [commit for commit in self.with_outcome("ok") if commit["key"] not in there]
        return faults + [
            f"token {commit['token']} was told that it wrote {commit['wrote']}, and did not"
            for commit in missing
        ]

    # -- what is measured --------------------------------------------------------------------------

    def waits_after_kills(self) -> list[tuple[float, str]]:
        """How long after a kill somebody was granted the lock (L2), and where the dead one was.

        If another was killed before that, who may have been granted it, the time runs from there.
        """
        answered = sorted(grant["at"] for grant in self.grants)
        kills = sorted(self.kills, key=lambda kill: kill["at"])
        waits = []
        for kill, next_kill in zip_longest(kills, kills[1:]):
            following = answered[bisect_right(answered, kill["at"]) :][:1]
            if following and next_kill is not None and next_kill["at"] < following[0]:
                continue
            waits.append((following[0] - kill["at"] if following else inf, kill["point"]))
        return waits


def lost_updates(value: int, ledger: list[Entry]) -> list[str]:
    """No update was lost: each number was written once, up to the final one."""
    by_number: dict[int, list[int]] = defaultdict(list)
    for entry in ledger:
        by_number[entry.wrote].append(entry.token)
    twice = [
        f"{number} was written {len(tokens)} times, by tokens {sorted(tokens)}"
        for number, tokens in sorted(by_number.items())
        if len(tokens) > 1
    ]
    missing = sorted(set(range(1, value + 1)) ^ by_number.keys())
    return twice + [f"the counter is {value}; who wrote {number}?" for number in missing]


def unordered(ledger: list[Entry]) -> list[str]:
    """S2: those that took effect are ordered by token."""
    faults, greatest = [], -1
    for entry in sorted(ledger, key=lambda entry: entry.wrote):
        if entry.token <= greatest:
            faults.append(f"token {entry.token} wrote {entry.wrote} after token {greatest}")
        greatest = max(greatest, entry.token)
    return faults
