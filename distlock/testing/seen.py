"""The terms of this process, from the moment this is imported: at the top of a test module."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from .. import signals
from ..terms import Term

_terms: WeakSet[Term] = WeakSet()


def terms() -> list[Term]:
    """Return those that are neither released nor lost."""
    return [term for term in list(_terms) if not (term.over or term.inherited)]


def _note(sender: object, *, lease: Any, **kwargs: object) -> None:
    _terms.add(lease._term)


signals.lock_acquired.connect(_note, dispatch_uid="distlock.testing")
