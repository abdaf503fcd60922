"""System checks: `distlock.E001` and on, `distlock.W001` and on; docs/checks.md has them all.

They are findings of `doctor.py`. `manage.py lock_doctor` has those, and more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from django.core import checks
from django.db import Error, connections

from .conf import problems, settings
from .doctor import server_findings, settings_findings
from .findings import Code, Finding

OF_THE_SERVER = {
    Code.OLD_VERSION,
    Code.NO_TRANSACTIONS,
    Code.READ_ONLY,
    Code.FORGETFUL,
    Code.CORRUPTIBLE,
    Code.BINARY_LOG,
    Code.NOT_EXAMINED,
}
"""Of what a server says about itself: that which no project can want."""


def check_settings(app_configs: Sequence[Any] | None, **kwargs: Any) -> list[checks.CheckMessage]:
    """Tell what is wrong with DISTLOCK, and with the alias that it names."""
    return _messages(settings_findings())


def check_database(
    app_configs: Sequence[Any] | None, *, databases: Sequence[str] | None = None, **kwargs: Any
) -> list[checks.CheckMessage]:
    """Tell what is wrong with the server: `check --database default`, and before each `migrate`."""
    if any(problems()) or settings().USING not in (databases or ()):
        return []
    connection = connections[settings().USING]
    try:
        connection.ensure_connection()
    except Error:  # who asked for this check is about to use the database, and will be told
        return []
    found = server_findings(connection)
    return _messages(finding for finding in found if finding.code in OF_THE_SERVER)


def _messages(findings: Iterable[Finding]) -> list[checks.CheckMessage]:
    return [
        (checks.Error if finding.is_error else checks.Warning)(
            finding.message,
            hint=f"{finding.remedy} See {finding.link} of distlock.".strip(),
            id=finding.code.value,
        )
        for finding in findings
    ]
