"""The statements that Django sends, whoever sends them: for layers and for the keeper."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from django.db.backends.utils import CursorWrapper


class Statement(NamedTuple):
    sql: str
    parameters: Any
    seconds: float


class Watch:
    """Remembers every statement of every connection of this process while it is entered."""

    def __init__(self) -> None:
        self.seen: list[Statement] = []

    def __enter__(self) -> Watch:
        self.execute = original = CursorWrapper.execute

        def execute(cursor: CursorWrapper, sql: Any, params: Any = None) -> Any:
            start = time.perf_counter()
            try:
                return original(cursor, sql, params)
            finally:
                self.seen.append(Statement(str(sql), params, time.perf_counter() - start))

        CursorWrapper.execute = execute  # type: ignore[method-assign]
        return self

    def __exit__(self, *exc: object) -> None:
        CursorWrapper.execute = self.execute  # type: ignore[method-assign]
