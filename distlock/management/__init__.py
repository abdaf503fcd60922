"""Commands for `manage.py`, and what makes a command of your own run once at a time."""

from __future__ import annotations

from .single_instance import SingleInstanceMixin

__all__ = ["SingleInstanceMixin"]
