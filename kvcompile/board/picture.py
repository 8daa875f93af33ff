"""A board as one picture: quality over the bytes of a cache, a row for each model and task, hidden beside seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.board.standings import KINDS, OTHER, Board, Panel, Standing
from kvcompile.board.tables import together
from kvcompile.tasks.scores import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#333f48", "#d5dce2"
LOOKS = dict(  # of each kind: colour and marker
    zip(
        (*KINDS.values(), OTHER),
        (("#8795a1", "o"), ("#2a6fbb", "s"), ("#e08a1e", "^"), ("#12876f", "D"), ("#8a4fc0", "P")),
        strict=True,
    )
)
WIDTH, HEIGHT = 4.9, 3.1  # inches of a panel
LONGEST = 32  # characters of a name
FEW = 16  # stacks of a panel that are all named
SIDES = (  # where a name may stand: its alignment, points right and up
    ("left", 6, -12), ("right", -6, 6), ("left", 6, 6), ("right", -6, -12), ("left", 8, -3), ("right", -8, -3),
    ("center", 0, 8), ("center", 0, -15),
)  # fmt: skip


def draw(board: Board, path: Path) -> None:
    """Write the picture, the same file for the same numbers."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = together(board)
    columns = max(map(len, rows))
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * len(rows) + 0.4), facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    drawn = []
    for row, axes in zip(rows, grid, strict=True):
        for ax in axes[len(row) :]:
            ax.set_axis_off()
        drawn += [(ax, _panel(ax, panel, _by_ratio(row))) for ax, panel in zip(axes, row, strict=False)]
        _one_scale(row, axes[: len(row)])
    _legend(figure, [panel for row in rows for panel in row])
    canvas.draw()  # sizes are known now, and names can look for room
    figure.set_layout_engine("none")
    for ax, points in drawn:
        _names(ax, points)
    with rc_context({"svg.hashsalt": "kvcompile", "svg.fonttype": "path"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _by_ratio(row: Sequence[Panel]) -> bool:
    """Whether perplexities are drawn as ratios: where all panels of a row have a dense model's."""
    return row[0].perplexity and all(any(s.dense for s in panel.standings) for panel in row)


def _panel(ax: Axes, panel: Panel, ratio: bool) -> list[tuple[Standing, float]]:
    """One panel; returns what it shows, (standing, quality)."""
    shown = list(_drawable(panel, ratio))
    factor = 1 if panel.perplexity else 100
    for standing, estimate in shown:
        colour, marker = LOOKS[standing.kind]
        ax.plot(
            [standing.share] * 2,
            [factor * estimate.low, factor * estimate.high],
            color=colour,
            alpha=0.45,
            lw=1,
            zorder=2,
        )
        face = "white" if standing.partial else colour
        edge = colour if standing.partial else "white"
        ax.scatter(
            [standing.share],
            [factor * estimate.value],
            s=38,
            marker=marker,
            color=face,
            edgecolor=edge,
            zorder=4,
            linewidth=0.8,
        )
    front = sorted((s.share, factor * e.value) for s, e in shown if s.front)
    if front:
        most = max(1.0, *(s.share for s, _ in shown)) * 1.12
        x, y = zip(*front, (most, front[-1][1]), strict=True)
        ax.step(x, y, where="post", color=INK, alpha=0.55, linewidth=1, zorder=3)
    for standing, estimate in shown:
        if standing.kind == KINDS[frozenset()]:
            ax.axhline(
                factor * estimate.value, color=LOOKS[standing.kind][0], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1
            )
    measured = f"question {panel.question}: {panel.metric}, %"
    if panel.perplexity:
        measured = f"text read: {panel.metric}{', over that of dense' if ratio else ''}"
    ax.set_title(f"{panel.model}\n{panel.task}, {measured}", loc="left", fontsize=9, color=INK)
    _style(ax)
    return [(standing, factor * estimate.value) for standing, estimate in shown]


def _drawable(panel: Panel, ratio: bool) -> Iterator[tuple[Standing, Estimate]]:
    for standing in panel.standings:
        estimate = standing.dense if ratio else standing.score
        if standing.share > 0 and estimate is not None and math.isfinite(estimate.value):
            yield standing, estimate


def _one_scale(row: Sequence[Panel], axes: Sequence[Axes]) -> None:
    """The same limits for all panels of a row; up is better; shares of bytes by halves."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lows, highs = zip(*(ax.get_ylim() for ax in axes), strict=True)
    shares = [s.share for panel in row for s in panel.standings if s.share > 0]
    least, most = min(shares, default=1.0) / 1.25, max(1.0, *shares) * 1.12
    halves = max(1, math.ceil(math.log2(1 / least)))
    step = math.ceil(halves / 8)
    for ax, panel in zip(axes, row, strict=True):
        ends = (min(lows), max(highs)) if panel.perplexity else (max(min(lows), -4), min(max(highs), 104))
        ax.set_ylim(*(reversed(ends) if panel.perplexity else ends))
        ax.set_xscale("log")
        ax.set_xlim(least, most)
        ax.xaxis.set_major_locator(FixedLocator([2.0**-n for n in range(0, halves + 1, step)]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "all" if x == 1 else f"1/{round(1 / x)}"))
        ax.set_xlabel("bytes held, of the bfloat16 cache (log scale)", fontsize=8.5, color=INK)


def _style(ax: Axes) -> None:
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    ax.tick_params(colors=INK, length=0, labelsize=8)
    ax.grid(color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)


def _names(ax: Axes, points: Sequence[tuple[Standing, float]]) -> None:
    """Names where there is room for them: of the stacks on the front, then, where they are few, of the others."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    pixels = {s.stack: ax.transData.transform((s.share, y)) for s, y in points}
    taken = [(Bbox.from_extents(x - 8, y - 8, x + 8, y + 8), stack) for stack, (x, y) in pixels.items()]
    others = [] if len(points) > FEW else [point for point in points if not point[0].front]
    for standing, y in [*(point for point in points if point[0].front), *others]:
        name = standing.stack if len(standing.stack) <= LONGEST else f"{standing.stack[: LONGEST - 1]}…"
        for side, right, up in SIDES:
            options: dict[str, Any] = {
                "textcoords": "offset points",
                "ha": side,
                "fontsize": 7.5,
                "color": INK,
                "zorder": 5,
            }
            halo = [withStroke(linewidth=2.5, foreground="white")]
            text = ax.annotate(name.replace("$", r"\$"), (standing.share, y), (right, up), path_effects=halo, **options)
            box = text.get_window_extent()
            inside = (
                ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 + 8 and ax.bbox.y0 <= box.y0 and box.y1 <= ax.bbox.y1 + 4
            )
            if inside and not any(box.overlaps(area) for area, owner in taken if owner != standing.stack):
                taken.append((box, ""))
                break
            text.remove()


def _legend(figure: Figure, panels: Sequence[Panel]) -> None:
    from matplotlib.lines import Line2D

    there = {standing.kind for panel in panels for standing in panel.standings}
    handles = [
        Line2D([], [], color=c, marker=m, linestyle="", label=kind) for kind, (c, m) in LOOKS.items() if kind in there
    ]
    handles.append(Line2D([], [], color=INK, alpha=0.55, linewidth=1, label="Pareto front"))
    if any(standing.partial for panel in panels for standing in panel.standings):
        hollow: dict[str, Any] = {"color": INK, "markerfacecolor": "white", "marker": "o", "linestyle": ""}
        handles.append(Line2D([], [], label="shards are missing", **hollow))
    columns = 2 if figure.get_figwidth() <= WIDTH else 4
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8, labelcolor=INK)
