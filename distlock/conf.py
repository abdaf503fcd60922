"""The one reader of settings: `DISTLOCK = {"TTL": 30, ...}`.

A wrong entry is a system-check error (`distlock.E001`, `E002`); reading one that was not checked
raises `ImproperlyConfigured` with the same words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from django.apps import apps
from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.utils.module_loading import import_string

from .deadlines import Seconds, seconds

SETTING = "DISTLOCK"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting with its default. Durations are seconds."""

    USING: str = "default"
    TTL: Seconds = 30
    WAIT: Seconds | None = 10
    RENEW: bool = True
    CRASH_SAFE: bool = True
    PURGE_AFTER: Seconds = 30 * 24 * 3600
    GROUP: Callable[[str], str] | str | None = None
    """What metrics and spans count a name in, or the dotted path of it; see `groups.py`."""
    TRACE_NAMES: bool = True


def settings() -> Settings:
    """Return the settings in force. Raises `ImproperlyConfigured` for an unusable one.

    Also where the app is missing in INSTALLED_APPS.
    """
    return _read()


def problems() -> Iterator[tuple[str, str]]:
    """Yield (kind, message) for each wrong entry; kind is "unknown" or "invalid"."""
    given = getattr(django_settings, SETTING, {})
    if not isinstance(given, Mapping):
        yield "invalid", f"{SETTING} must be a dict, not {type(given).__name__}."
        return
    known = [field.name for field in dataclasses.fields(Settings)]
    for key, value in given.items():
        if key not in known:
            choices = ", ".join(known)
            yield "unknown", f"{SETTING} has an unknown key {key!r}. It knows {choices}."
        elif fault := _fault(key, value):
            yield "invalid", f"{SETTING}[{key!r}] {fault}"


def _fault(key: str, value: Any) -> str | None:
    if key == "USING":
        if not isinstance(value, str):
            return f"must be a database alias, not {value!r}."
        return None if value in django_settings.DATABASES else f"{value!r} is not in DATABASES."
    if key == "GROUP":
        return _fault_of_group(value)
    if key in ("RENEW", "CRASH_SAFE", "TRACE_NAMES"):
        return None if isinstance(value, bool) else f"must be True or False, not {value!r}."
    if key == "WAIT" and value is None:
        return None
    try:
        seconds(value, key, positive=key == "TTL")
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _fault_of_group(value: Any) -> str | None:
    try:
        found = import_string(value) if isinstance(value, str) else value
    except Exception as error:  # whatever a module of the project's raises
        return f"cannot be imported from {value!r}: {error}"
    if value is None or callable(found):
        return None
    return f"must be a function of a lock's name, or the dotted path of one, not {value!r}."


@lru_cache(maxsize=1)
def _read() -> Settings:
    if not apps.is_installed("distlock"):  # whose checks do not run then
        raise ImproperlyConfigured(
            'Locks need their app: add "distlock" to INSTALLED_APPS and run manage.py migrate.'
        )
    for _, message in problems():
        raise ImproperlyConfigured(message)
    return Settings(**getattr(django_settings, SETTING, {}))


def _forget(*, setting: str, **kwargs: object) -> None:
    if setting in (SETTING, "DATABASES", "INSTALLED_APPS"):
        _read.cache_clear()


setting_changed.connect(_forget, dispatch_uid="distlock.conf")
