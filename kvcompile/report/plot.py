"""The picture of a report: tokens kept by layer, needle score by depth, the curve of a healing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.evaluation.needle import NeedleResult
from kvcompile.heal.record import HealRecord
from kvcompile.report.units import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvcompile.report.report import Report

INK, DENSE, KEPT, LOSS = "#333f48", "#b8c2cc", "#2a6fbb", "#c8402f"
HIDDEN, HIDDEN_LOSS = "#8fb8e3", "#e7a69c"  # paler: with the question hidden


def draw(report: Report, path: Path) -> None:
    """The picture: tokens kept by layer (mean of the heads, whiskers from least to most), needle score by depth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[float, Callable[..., None]]] = [(1.7, partial(_draw_layers, report))]
    if report.needle is not None:
        panels.append((1.0, partial(_draw_needle, *report.needle, *(report.needle_hidden or ())[1:])))
    if report.healed is not None:
        panels.append((1.4, partial(_draw_healed, report.healed)))
    widths = [width for width, _ in panels]
    figure = Figure(figsize=(4.2 * sum(widths), 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no window system
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for ax, (_, panel) in zip(axes, panels, strict=True):
        panel(ax=ax)
        look(ax)
    figure.suptitle(report.title.replace("$", r"\$"), x=0.01, ha="left", fontweight="bold", color=INK)
    figure.savefig(path)


def look(ax: Axes) -> None:
    """What every panel looks like: two pale axes, faint lines at the ticks."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(DENSE)
    ax.tick_params(colors=INK, length=0)
    ax.grid(axis="y", color=DENSE, alpha=0.4, linewidth=0.6)
    ax.set_axisbelow(True)


def _draw_layers(report: Report, ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    means = [sum(row.kept) / max(1, len(row.kept)) for row in report.rows]
    places = [row.layer for row in report.rows]
    mean_of = dict(zip(places, means, strict=True))
    ax.bar(places, means, color=KEPT, width=0.78, label="mean of the KV heads")
    read = [(row.layer, mean_of[row.owner]) for row in report.rows if row.owner is not None]
    if read:
        x, height = zip(*read, strict=True)
        ax.bar(x, height, width=0.78, color="none", edgecolor=DENSE, linewidth=0.8, label="read from another layer")
    uneven = [(r.layer, m, min(r.kept), max(r.kept)) for r, m in zip(report.rows, means, strict=True) if r.kept]
    uneven = [row for row in uneven if row[2] != row[3]]
    if uneven:
        x, mean, least, most = zip(*uneven, strict=True)
        spread = [_minus(mean, least), _minus(most, mean)]
        ax.errorbar(x, mean, spread, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2, label="least to most")
    top = max([max(row.kept, default=0) for row in report.rows], default=0)
    if top > report.tokens / 2:
        ax.axhline(report.tokens, color=DENSE, linestyle="--", linewidth=1.2, label="uncompressed")
        top = max(top, report.tokens)
    ax.set_ylim(0, top * 1.08 or 1)
    ax.set_xlim(min(places, default=0) - 0.7, max(places, default=0) + 0.7)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer", color=INK)
    ax.set_ylabel(f"tokens kept of {report.tokens:,}", color=INK)
    share = f", {report.bytes_held / report.dense_bytes:.1%}" if report.dense_bytes else ""
    share += f", read {report.read_bytes / report.dense_read:.1%}" if report.recalls else ""
    ax.set_title(f"Cache: {size(report.bytes_held)} of {size(report.dense_bytes)}{share}", fontsize=10, color=INK)
    ax.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)


def _draw_needle(before: NeedleResult, seen: NeedleResult, *hidden: NeedleResult, ax: Axes) -> None:
    """By depth, side by side: the uncompressed model, and the compiled one with the question seen and hidden."""
    depths, old = list(seen.by_depth), list(before.by_depth.values())
    results = [(before, DENSE, DENSE), (seen, KEPT, LOSS), *((each, HIDDEN, HIDDEN_LOSS) for each in hidden)]
    width = 0.8 / len(results)
    for place, (result, usual, worse) in enumerate(results):
        shares = list(result.by_depth.values())
        colours = [worse if share < first else usual for share, first in zip(shares, old, strict=True)]
        x = [i + (place - (len(results) - 1) / 2) * width for i in range(len(depths))]
        bars = ax.bar(x, [100 * share for share in shares], 0.95 * width, color=colours)
        if result is not before:
            ax.bar_label(bars, [f"{100 * share:.0f}" for share in shares], fontsize=6, color=INK, padding=1)
    ax.set_xticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=8 if len(depths) < 8 else 6)
    ax.set_ylim(0, 108)
    ax.set_xlabel("depth of the needle", color=INK)
    ax.set_ylabel("exact answers, %", color=INK)
    after = ", ".join([f"{seen.mean:.0%} seen", *(f"{each.mean:.0%} hidden" for each in hidden)])
    ax.set_title(f"Needle: {before.mean:.0%} → {after}, {len(seen.records)} prompts", fontsize=10, color=INK)
    _needle_legend(ax, len(hidden) > 0)


def _draw_healed(record: HealRecord, ax: Axes) -> None:
    """Training loss of the two stages, and perplexity of the held-out text on an axis of its own."""
    from matplotlib.ticker import LogFormatter

    for stage, colour, label in (("layers", DENSE, "loss, layers alone"), ("model", KEPT, "loss, end to end")):
        losses = [(p.tokens, p.loss) for p in record.curve if p.stage == stage and p.loss is not None]
        if losses:
            ax.plot(*zip(*losses, strict=True), color=colour, linewidth=1.4, label=label)
    quality = ax.twinx()
    measured = [(p.tokens, p.perplexity) for p in record.curve if p.perplexity is not None]
    style: dict[str, Any] = {"color": LOSS, "marker": "o", "markersize": 3, "linewidth": 1.2}
    quality.plot(*zip(*measured, strict=True), **style, label="held-out perplexity")
    quality.axhline(record.perplexity[0], color=LOSS, linestyle="--", linewidth=1.0, label="the original's")
    for axis in (ax, quality):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:,.7g}")
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))  # over decades they would overlap
    quality.spines[["top", "left", "bottom"]].set_visible(False)
    quality.spines["right"].set_color(DENSE)
    quality.tick_params(colors=LOSS, length=0, which="both", labelsize=7)
    ax.tick_params(length=0, which="both")
    ax.set_xlabel("tokens trained on", color=INK)
    ax.set_ylabel("training loss", color=INK)
    title = f"Healing: {record.perplexity[1]:,.1f} → {record.perplexity[2]:,.1f}, original {record.perplexity[0]:,.1f}"
    ax.set_title(title, fontsize=10, color=INK)
    handles = [handle for axis in (ax, quality) for handle in axis.get_legend_handles_labels()[0]]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 2}
    ax.legend(handles=handles, frameon=False, fontsize=8, labelcolor=INK, **place)


def _needle_legend(ax: Axes, hidden: bool) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    names = {"uncompressed": (DENSE,), "question seen, worse": (KEPT, LOSS)}
    if hidden:
        names["hidden, worse"] = (HIDDEN, HIDDEN_LOSS)
    handles = [tuple(Patch(color=colour) for colour in colours) for colours in names.values()]
    ax.legend(
        handles,
        list(names),
        handler_map={tuple: HandlerTuple(ndivide=None)},
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=3,
    )


def _minus(left: Iterable[float], right: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]
