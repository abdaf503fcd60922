"""Text in columns, for a terminal: what cannot be printed is escaped, what is too wide is cut."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

GAP = "  "
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
SHORTEST = 8


def table(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Return a line per row, as wide as is needed, or at most `width`: the widest columns give."""
    cells = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(columns_of, column)) for column in zip(*cells, strict=True)]
    if width is not None:
        excess = sum(widths) + len(GAP) * (len(widths) - 1) - width
        while excess > 0 and max(widths) > SHORTEST:
            widths[widths.index(max(widths))] -= 1
            excess -= 1
    return [
        GAP.join(_fit(cell, size) for cell, size in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def shown(text: str) -> str:
    """Return a text so that blanks at its ends are seen, and no control character acts."""
    return text if text.isprintable() and text == text.strip() else repr(text)


def columns_of(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(map(_width, text))


def _width(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _fit(text: str, size: int) -> str:
    """Return the text in exactly that many columns."""
    if columns_of(text) > size:
        while columns_of(text) > size - 1:
            text = text[:-1]
        text += ELLIPSIS
    return text + " " * (size - columns_of(text))
