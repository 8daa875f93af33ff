"""The picture of the README: answers and perplexity of every stack over the bytes of its cache, from committed results.

    python benchmarks/plot_quality.py

Reads benchmarks/results/quality_per_byte.json, and from quality_per_byte-held_out.json the rows that are not there.
Answers are the mean of the three forms of question, 20 prompts each. Writes docs/images/quality_over_bytes.svg.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = [ROOT / f"benchmarks/results/quality_per_byte{part}.json" for part in ("", "-held_out")]
FORMS = ("magic", "two_keys", "passcode")
SCORES = ("snapkv", "adakv", "zigzag", "retrieval_heads")
INK, FAINT = "#333f48", "#d5dce2"
KINDS = {  # of a stack: its colour
    "uncompressed": "#8795a1",
    "all tokens, fewer bits": "#2a6fbb",
    "fewer tokens": "#e08a1e",
    "fewer tokens in fewer bits": "#12876f",
}
TITLES = (
    "Needles found, % of 60 prompts of 1k tokens (SmolLM2-135M; higher is better)",
    "Perplexity of text read over the cache (axis reversed: higher is better)",
)
UP, DOWN, RIGHT = ("center", 0, 8), ("center", 0, -15), ("left", 8, -3)  # side of the text, points right and up
PLACES = {  # row: its name, where that stands over the answers, and over the perplexity (None: nowhere)
    "dense": ("uncompressed", DOWN, UP),
    "zigzag 35 %": ("zigzag", ("left", 0, 9), RIGHT),
    "adakv 25 %": ("adakv", RIGHT, RIGHT),
    "kivi int4": ("kivi", ("center", -4, 9), DOWN),
    "retrieval heads": ("retrieval_heads", UP, DOWN),
    "adakv 50 % + int4": ("adakv + kivi", DOWN, UP),
    "retrieval heads + int4": ("retrieval_heads + kivi", ("left", 4, -15), ("right", 0, 9)),
    "adakv 30 % + K4V2 per token, groups of 64": ("adakv + kivi with 2-bit values", RIGHT, RIGHT),
    "snapkv 10 %, pool 31, + rotated K8V4": ("snapkv_kivi", UP, ("left", 0, -15)),
    "snapkv 8 %, pool 21, + rotated int4": ("8 % of the tokens, in int4", None, ("left", -4, -16)),
}


def rows() -> dict[str, dict[str, Any]]:
    """label -> numbers; of a row in several files the first counts."""
    merged: dict[str, dict[str, Any]] = {}
    for path in RESULTS:
        for label, row in json.loads(path.read_text("utf-8")).items():
            merged.setdefault(label, row)
    return merged


def kind(stack: str) -> str:
    """Which of KINDS a stack is, by the policies it names."""
    if not stack:
        return "uncompressed"
    if not any(name in stack for name in SCORES):
        return "all tokens, fewer bits"
    return "fewer tokens in fewer bits" if "kivi" in stack else "fewer tokens"


def panel(ax: Any, values: dict[str, tuple[float, float, str]], which: int) -> None:
    """One quality over bytes. values: label -> (share of the cache in %, quality, kind)."""
    for name, colour in KINDS.items():
        points = [(x, y) for x, y, what in values.values() if what == name]
        ax.scatter(*zip(*points, strict=True), s=46, color=colour, edgecolor="white", label=name, zorder=3)
    for label, (name, *places) in PLACES.items():
        if place := places[which]:
            x, y, _ = values[label]
            ax.annotate(name, (x, y), place[1:], textcoords="offset points", ha=place[0], fontsize=8.5, color=INK)
    ax.axhline(values["dense"][1], color=KINDS["uncompressed"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    ax.tick_params(colors=INK, length=0, labelsize=8.5)
    ax.grid(color=FAINT, linewidth=0.6, zorder=0)
    ax.set_axisbelow(True)


def draw() -> Figure:
    """Answers above, perplexity below, over one axis of bytes."""
    found = rows()
    share = {label: row["kept % 1024"] for label, row in found.items()}
    answers = {label: sum(row[f"{form} 1024"] for form in FORMS) / len(FORMS) for label, row in found.items()}
    kinds = {label: kind(row.get("stack", "")) for label, row in found.items()}
    figure = Figure(figsize=(7.6, 5.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.15, 1])
    panel(above, {label: (share[label], answers[label], kinds[label]) for label in found}, 0)
    panel(below, {label: (share[label], row["perplexity"], kinds[label]) for label, row in found.items()}, 1)
    above.set_ylim(64, 104)
    below.set_ylim(18.2, 13)
    for ax, title in zip((above, below), TITLES, strict=True):
        ax.set_title(title, loc="left", fontsize=9.5, color=INK)
    below.set_xscale("log")
    below.set_xlim(0.8, 130)
    below.xaxis.set_major_locator(FixedLocator([100 / 2**n for n in range(7)]))
    below.xaxis.set_minor_locator(NullLocator())
    below.set_xticklabels(["all", *(f"1/{2**n}" for n in range(1, 7))])
    below.set_xlabel("bytes of the cache, as a share of the float32 cache (log scale)", fontsize=9, color=INK)
    handles = above.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5, labelcolor=INK)
    return figure


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/quality_over_bytes.svg")
    args = parser.parse_args()
    rcParams["svg.hashsalt"] = "kvcompile"  # the same file from the same numbers
    draw().savefig(args.out, metadata={"Date": None} if args.out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
