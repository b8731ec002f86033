"""What a part is given and what it gives back: samples for the JSON, a short table, panels for a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vattention.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """How a part runs.

    Attributes:
        device: where.
        seconds: about how long; what is not done by then is named in the report as left out.
        tiny: sizes at which a CPU is through in a second or so. Their figures mean nothing.
        seed: of lengths and tokens.
        trace: a CSV of lengths, see `bench.trace`; None: synthetic ones.
        vllm_python: the Python of an environment with vLLM; None: there is none.
    """

    device: torch.device
    seconds: float = 120.0
    tiny: bool = False
    seed: int = 0
    trace: str | None = None
    vllm_python: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of K and V and weights."""
        return torch.bfloat16


@dataclass(frozen=True)
class Panel:
    """One set of axes. Series are name -> points (x, y), or (x, y, low, high)."""

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, ...]]]
    logarithmic: bool = False


@dataclass(frozen=True)
class Report:
    """What came of a part.

    Attributes:
        samples: everything measured, for the JSON.
        text: a table, and what has to be said about it.
        panels: for the plot; none: no plot.
        skipped: why nothing was measured; None where something was.
    """

    samples: Mapping[str, Any]
    text: str
    panels: Sequence[Panel] = field(default_factory=tuple)
    skipped: str | None = None


def plot(path: Path, panels: Sequence[Panel], *, title: str) -> None:
    """Draw the panels side by side; the suffix of `path` picks the format.

    Raises:
        ConfigError: the file cannot be written, or its format is not known.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in panel.series.items():
            xs, ys = [point[0] for point in points], [point[1] for point in points]
            axes.plot(xs, ys, marker="o", markersize=4, label=name)
            if points and len(points[0]) == 4:
                axes.fill_between(xs, [point[2] for point in points], [point[3] for point in points], alpha=0.2)
        if panel.logarithmic:
            axes.set_xscale("log", base=2)
        axes.set_xlabel(panel.x)
        axes.set_ylabel(panel.y)
        axes.set_ylim(bottom=0)
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot {path}: {error}") from None


def left_out(names: Sequence[str]) -> str:
    """A line about cases there was no time for; nothing where there are none."""
    return f"\nleft out for lack of time: {', '.join(names)}" if names else ""
