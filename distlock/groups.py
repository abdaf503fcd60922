"""The group that a lock is counted in: metrics and spans have it as a label, never the name.

By default it is the name's first part, up to a colon, slash, at sign or space, without what looks
like a number or an id: `invoice:42`, `invoice-42:send` and `invoice/jane` are `invoice`. The
setting `GROUP` names another function. However it is made, a process knows a limited number of
groups; what comes later is `other`.
"""

from __future__ import annotations

import logging
import re

from django.utils.module_loading import import_string

from .conf import settings
from .events import log

OTHER = "other"
MOST = 100
"""Groups in a process, besides `other`."""
LONGEST = 64
"""Characters of a group."""
KINDS = ("once", "enqueue")
"""First parts that say what kind of name it is: the part after it belongs to the group."""

END = re.compile(r"[/@ ]")
"""What ends the first part, besides the colon: what comes after it may well be a value."""
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
WORD = re.compile(r"[^\W_]+")
NUMBERED = re.compile(r"([^\W\d_]+)\d+")
HEXADECIMAL = re.compile(r"[0-9a-f]+", re.IGNORECASE)
GAP = re.compile(r"([\W_])[\W_]+")

_known: set[str] = set()
_complained: set[str] = set()


def group_of(name: str) -> str:
    """Return the group of a lock's name, in which a bounded number of groups is possible.

    Raises nothing: where the function of the setting raises, or returns no name, it is `other`.
    """
    group = _given(name)[:LONGEST] or OTHER
    if group in _known or group == OTHER:
        return group
    if len(_known) < MOST:  # no mutex, which a fork might keep: a few too many do no harm
        _known.add(group)
        return group
    _complain("too_many_groups group=%r: it, and each new one, is counted as 'other'", group)
    return OTHER


def default_group(name: str) -> str:
    """Return the first part of a name, without numbers and ids; "" if nothing is left."""
    head, _, rest = name.partition(":")
    kind = ""
    while head in KINDS and rest:
        kind += f"{head}:"
        head, _, rest = rest.partition(":")
    words = WORD.sub(_word, UUID.sub("", END.split(head.lstrip("/@ "), maxsplit=1)[0]))
    return (kind + GAP.sub(r"\1", words)).strip(" -_.,:;@/#+|")


def _word(match: re.Match[str]) -> str:
    """Return a word without the number at its end, and nothing for what looks like an id."""
    word = match[0]
    if not any(character.isdigit() for character in word):
        return word
    numbered = NUMBERED.fullmatch(word)
    return numbered[1] if numbered and not HEXADECIMAL.fullmatch(word) else ""


def _given(name: str) -> str:
    function = settings().GROUP or default_group
    try:
        group = (import_string(function) if isinstance(function, str) else function)(name)
    except Exception:
        _complain("group_failed group=%r: the function in GROUP has raised", None, exc_info=True)
        return OTHER
    if isinstance(group, str):
        return group
    _complain("group_failed group=%r: the function in GROUP must return a str", str(group))
    return OTHER


def _complain(text: str, group: str | None, *, exc_info: bool = False) -> None:
    """Log that, once."""
    if text not in _complained:
        _complained.add(text)
        log(logging.WARNING, text, group=group, exc_info=exc_info)
