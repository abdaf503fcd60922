"""A bar for long work: on a terminal only, after the first second, and if tqdm is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from django.db.models import QuerySet


@contextmanager
def progress(
    rows: QuerySet[Any], noun: str, *, quiet: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with the last key of a batch and the number of rows done so far.

    Rows are not counted, which may take longer than the work: the bar goes along the keys.
    """
    tqdm = None if quiet or not sys.stderr.isatty() else _tqdm()
    first, last = (_edge(rows, "pk"), _edge(rows, "-pk")) if tqdm else (0, 0)
    if tqdm is None or last <= first:
        yield lambda key, count: None
        return
    form = "{percentage:3.0f}%|{bar}|{postfix} [{elapsed}<{remaining}]"
    with tqdm(total=last - first, delay=1, leave=False, bar_format=form, file=sys.stderr) as bar:

        def tell(key: int, count: int) -> None:
            bar.set_postfix_str(f"{count} {noun}", refresh=False)
            bar.update(key - first - bar.n)

        yield tell


def _edge(rows: QuerySet[Any], order: str) -> int:
    return int(rows.order_by(order).values_list("pk", flat=True).first() or 0)


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
