"""System checks: `distlock.E001` and on, `distlock.W001` and on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.core import checks

from .conf import problems

IDS = {"unknown": "distlock.E001", "invalid": "distlock.E002"}


def check_settings(app_configs: Sequence[Any] | None, **kwargs: Any) -> list[checks.CheckMessage]:
    """E001: an unknown key in DISTLOCK. E002: a value of the wrong type, or out of range."""
    return [checks.Error(message, id=IDS[kind]) for kind, message in problems()]
