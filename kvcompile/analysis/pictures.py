"""What the pictures of analyses share: panels, curves by layer, maps of heads."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvcompile.report.plot import DENSE, INK, KEPT, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT, WIDTH = 4.2, 4.2  # inches of a panel of width 1


def panels(figure: Figure, *widths: float) -> list[Axes]:
    """Axes side by side, in the look of the report."""
    figure.set_size_inches(WIDTH * sum(widths), HEIGHT)
    axes = list(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
    for ax in axes:
        look(ax)
    return axes


def layer_curve(
    ax: Axes, prompts: Sequence[Sequence[float]], heads: Sequence[Any], title: str, percent: bool = False
) -> None:
    """Values by layer: their mean over prompts, the range of prompts, the mean of every head as a point.

    Shapes: prompts `[prompts][layers]`, heads `[prompts][layers][heads]`.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    by_layer = list(zip(*prompts, strict=True))
    layers = range(len(by_layer))
    for layer in layers:
        points = [statistics.fmean(values) for values in zip(*(p[layer] for p in heads), strict=True)]
        ax.scatter([layer] * len(points), points, s=7, color=DENSE, linewidth=0, label="a head" if not layer else None)
    low, high = [min(v) for v in by_layer], [max(v) for v in by_layer]
    if len(prompts) > 1:
        ax.fill_between(
            layers, low, high, color=KEPT, alpha=0.22, linewidth=0, label=f"range of {len(prompts)} prompts"
        )
    ax.plot(layers, [statistics.fmean(v) for v in by_layer], color=KEPT, linewidth=1.6, marker="o", ms=3, label="layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("layer", color=INK)
    ax.set_title(title, fontsize=10, color=INK)
    ax.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)


def lines(
    ax: Axes, x: Sequence[float], curves: Mapping[str, Sequence[float | None]], label: str, title: str, chance: float
) -> None:
    """Shares over x, a line each, the first one darkest, and what chance would give."""
    from matplotlib import colormaps
    from matplotlib.ticker import PercentFormatter

    shades = colormaps["viridis"]
    for number, (name, values) in enumerate(curves.items()):
        known = [float("nan") if value is None else value for value in values]
        colour = shades(0.85 * number / max(1, len(curves) - 1))
        ax.plot(x, known, color=colour, linewidth=1.4, marker="o", markersize=3, label=name)
    ax.axhline(chance, color=INK, linestyle="--", linewidth=1.0, label="chance")
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel(label, color=INK)
    ax.set_title(title, fontsize=10, color=INK)
    ax.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def layer_map(ax: Axes, values: Sequence[Sequence[float]], rows: str, title: str) -> None:
    """A map of values `[layers][rows]`, each shown as a percentage by its colour."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    ax.grid(False)
    columns = [list(column) for column in zip(*values, strict=True)]
    image = ax.imshow(columns, aspect="auto", cmap="viridis", vmin=0)
    bar = ax.figure.colorbar(image, ax=ax, format=PercentFormatter(1.0))
    bar.outline.set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer", color=INK)
    ax.set_ylabel(rows, color=INK)
    ax.set_title(title, fontsize=10, color=INK)
