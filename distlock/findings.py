"""What is wrong with a set-up, for `manage.py check`, `migrate` and `lock_doctor` alike."""

from __future__ import annotations

import enum
from dataclasses import dataclass

PAGE = "docs/checks.md"
"""Has a heading for each code."""


class Code(enum.Enum):
    """Every code there is: an E is an error, a W is a warning. A number is never used again."""

    UNKNOWN_SETTING = "distlock.E001"
    INVALID_SETTING = "distlock.E002"
    UNSUPPORTED = "distlock.E003"
    OLD_VERSION = "distlock.E004"
    NO_TRANSACTIONS = "distlock.E005"
    READ_ONLY = "distlock.E006"
    NO_PRIVILEGE = "distlock.E007"
    NO_TABLE = "distlock.E008"
    NO_ANSWER = "distlock.E009"

    ROUTED_ELSEWHERE = "distlock.W001"
    ONE_HOST = "distlock.W002"
    FORGETFUL = "distlock.W003"
    CORRUPTIBLE = "distlock.W004"
    BINARY_LOG = "distlock.W005"
    SMALL_POOL = "distlock.W006"
    SNAPSHOTS = "distlock.W007"
    CLOCKS_DIFFER = "distlock.W008"
    CLOCK_SET_BACK = "distlock.W009"
    TIME_ZONE = "distlock.W010"
    KEEPALIVES = "distlock.W011"
    DEAD_SESSIONS = "distlock.W012"
    SHORT_SESSIONS = "distlock.W013"
    POOLER = "distlock.W014"
    NOT_PURGED = "distlock.W015"
    NOT_VACUUMED = "distlock.W016"
    NOT_EXAMINED = "distlock.W017"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: what was found, and what to do about it."""

    code: Code
    message: str
    remedy: str = ""

    @property
    def is_error(self) -> bool:
        """Whether a promise does not hold; else it may not hold in some event."""
        return self.code.value.startswith("distlock.E")

    @property
    def link(self) -> str:
        """Where the docs tell more."""
        return f"{PAGE}#{self.code.value.replace('.', '').lower()}"
