"""A picture of several engines at the same work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vattention.errors import ConfigError

if TYPE_CHECKING:
    from vattention.bench.throughput import Line

_COLOURS = ("#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#999999")


def plot_sides(path: str, lines: Sequence[Line], names: Sequence[str], *, title: str) -> None:
    """Bars of every metric and case, a colour a side, with the range of the rounds; the suffix picks the format.

    Raises:
        ConfigError: the file cannot be written, or its format is not known.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(line.metric for line in lines))
    figure = Figure(figsize=(9, 3 * len(metrics)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(metrics), 1, squeeze=False)[:, 0]
    width = 0.8 / len(names)
    for axes, metric in zip(panels, metrics, strict=True):
        shown = [line for line in lines if line.metric == metric]
        for place, name in enumerate(names):
            values = [line.values[name] for line in shown]
            low = [value.median - value.low for value in values]
            high = [value.high - value.median for value in values]
            axes.bar(
                [position + (place - (len(names) - 1) / 2) * width for position in range(len(shown))],
                [value.median for value in values],
                width,
                yerr=(low, high),
                color=_COLOURS[place % len(_COLOURS)],
                label=name,
            )
        axes.set_xticks(range(len(shown)), [line.case for line in shown])
        axes.set_ylabel(metric)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_title(title, loc="left")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot {path}: {error}") from None
