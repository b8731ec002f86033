"""Pictures of a replay. matplotlib comes with the bench extra, and loads only here."""

from __future__ import annotations

import importlib.util

from vattention.bench.replay import Series
from vattention.errors import ConfigError

_GIB = 1 << 30
_LINES = (
    ("static", "static reservation", "#999999", "-"),
    ("paged_256", "paged, blocks of 256", "#d55e00", "-"),
    ("paged_16", "paged, blocks of 16", "#e69f00", "-"),
    ("mapped", "mapped (vattention)", "#0072b2", "-"),
    ("needed", "needed", "#000000", ":"),
)
"""Column, label, colour (of a palette that colour-blind readers can tell apart) and dashes."""


def check_plotting() -> None:
    """Raises ConfigError, with what to install, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'vattention[bench]'")


def plot_memory(path: str, series: Series, *, title: str, unit: str) -> None:
    """Draw bytes over steps, and waste over steps, into `path`; its suffix picks the format.

    Args:
        unit: label of the axis of the bytes, which are drawn in GiB.

    Raises:
        ConfigError: the file cannot be written, or its format is not known.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    size, waste = figure.subplots(2, 1, sharex=True)
    steps = range(1, len(series) + 1)
    for column, label, colour, dashes in _LINES:
        values = getattr(series, column)
        size.plot(steps, [value / _GIB for value in values], dashes, color=colour, label=label, linewidth=1.5)
        if column in ("mapped", "paged_16", "paged_256"):
            share = [100 * (value / needed - 1) for value, needed in zip(values, series.needed, strict=True)]
            waste.plot(steps, share, color=colour, linewidth=1)
    size.set_title(title, loc="left")
    size.set_ylabel(unit)
    size.set_ylim(bottom=0)
    waste.set_ylabel("wasted, % of needed")
    waste.set_ylim(bottom=0)
    waste.set_xlabel("step")
    for axes in (size, waste):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0)
    figure.legend(*size.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot {path}: {error}") from None
