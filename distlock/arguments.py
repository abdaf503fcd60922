"""What the arguments of a lock may be. Bad ones are errors at the call that name the argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from django.db import connections

from .deadlines import Seconds, seconds

Name = str | Callable[[Mapping[str, Any]], str]


class Default:
    """Stands for "as the settings say" in a signature."""

    def __repr__(self) -> str:
        return "<from settings>"


DEFAULT = Default()
LONGEST_NAME = 255
LONGEST_NOTE = 255


def checked_key(name: Name, argument: str = "name", longest: int = LONGEST_NAME) -> Name:
    """Return a name, or a callable that gives one."""
    if isinstance(name, str):
        return checked_name(name, argument, longest)
    if not callable(name):
        raise TypeError(f"{argument} must be a str or a callable, not {type(name).__name__}.")
    return name


def checked_name(name: object, argument: str = "name", longest: int = LONGEST_NAME) -> str:
    """Return a name that every database stores as it is. Raises `TypeError` or `ValueError`."""
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a str, not {type(name).__name__}.")
    if not 1 <= len(name) <= longest:
        raise ValueError(
            f"{argument} must have 1 to {longest} characters, not {len(name)}; "
            "hash what is longer, and keep a readable beginning."
        )
    if "\0" in name:
        raise ValueError(f"{argument} must not hold a NUL character: {name!r}.")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{argument} must be encodable as UTF-8: {name!r}.") from None
    return name


def wait_of(wait: Seconds | Default | None) -> float | Default | None:
    """Return how long to wait, in seconds; `None` is for ever."""
    return wait if wait is None or isinstance(wait, Default) else seconds(wait, "wait")


def flag_of(value: bool | Default, argument: str) -> bool | None:
    """Return a flag; `None` is as the settings say."""
    if isinstance(value, Default):
        return None
    if not isinstance(value, bool):
        raise TypeError(f"{argument} must be True or False, not {value!r}.")
    return value


def checked_on_busy(on_busy: str) -> str:
    """Return what a decorator is to do with a busy lock."""
    if on_busy not in ("raise", "skip"):
        raise ValueError(f'on_busy must be "raise" or "skip", not {on_busy!r}.')
    return on_busy


def checked_note(note: object) -> str:
    """Return a note that every database stores as it is."""
    if not isinstance(note, str):
        raise TypeError(f"note must be a str, not {type(note).__name__}.")
    if len(note) > LONGEST_NOTE or "\0" in note:
        raise ValueError(f"note must have at most {LONGEST_NOTE} characters, and no NUL.")
    if not note.isprintable() and note != note.encode(errors="replace").decode():
        raise ValueError(f"note must be encodable as UTF-8: {note!r}.")
    return note


def checked_alias(using: object) -> str | None:
    """Return a database alias that there is, or `None` for that of the settings."""
    if using is None:
        return None
    if not isinstance(using, str):
        raise TypeError(f"using must be a database alias, not {type(using).__name__}.")
    return known_alias(using)


def known_alias(alias: str) -> str:
    """Return an alias. Raises `ValueError` if DATABASES does not have it."""
    if alias not in connections:
        raise ValueError(f"using={alias!r} is not in DATABASES; it has {list(connections)}.")
    return alias
