"""The picture: latency, hand-over and waiting, one bar for each contender."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .contenders import CONTENDERS
from .targets import Results


class Panel(NamedTuple):
    workload: str
    field: str
    scale: float
    title: str


PANELS = [
    Panel("latency", "p50", 1e6, "acquire + release, p50, us"),
    Panel("hand-over", "p50@32", 1e3, "hand-over among 32, gap p50, ms"),
    Panel("waiting", "statements", 1, "statements / s while 32 wait"),
]
OURS, THEIRS = "#1f77b4", "#b8b8b8"


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(results: Results, path: Path) -> None:
    """Write the picture. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in PANELS if results["workloads"].get(panel.workload)]
    if not panels:
        return
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 6), squeeze=False, layout="constrained"
    )
    for panel, ax in zip(panels, axes[0], strict=True):
        table = results["workloads"][panel.workload]
        keys = [key for key in CONTENDERS if table.get(key, {}).get(panel.field) is not None]
        values = [table[key][panel.field] * panel.scale for key in keys]
        colours = [OURS if CONTENDERS[key].ours else THEIRS for key in keys]
        bars = ax.barh(keys, values, color=colours)
        ax.bar_label(bars, fmt=_label, padding=3, fontsize=8)
        ax.invert_yaxis()
        ax.margins(x=0.15)
        if values and max(values) > 20 * min(values):
            ax.set_xscale("symlog", linthresh=1)
        ax.set_title(panel.title)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
