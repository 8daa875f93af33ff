"""Curves by layer: how many tokens each layer and head needs, over prompts, in tokens and as a share of the prompt."""

from __future__ import annotations

import functools
import statistics
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kvcompile.analysis.base import Analysis, Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class LayerBudgets(Analysis):
    """A number of tokens for each layer and each of its heads, on each prompt.

    queries: whose attention, the newest so many of a prompt (0: all).
    per: `mean`, one budget for their mean attention, or `each`, the mean of the budgets of every query.
    heads: `query` or `kv`, where a KV head has the mean attention of its query heads.
    """

    queries: int = 64
    per: Literal["mean", "each"] = "mean"
    heads: Literal["query", "kv"] = "query"

    def __post_init__(self) -> None:
        self.require(self.queries >= 0, "queries", "0 (all) or more")

    @abstractmethod
    def budgets(self, attention: Tensor, seen: Observation) -> tuple[Tensor, Tensor]:
        """Budgets of `attention [H_kv, g, w, n]`, row by row: by layer `[w]`, and by head `[H, w]`.

        H is H_kv g, or H_kv where `heads` is `kv`.
        """

    @abstractmethod
    def definition(self) -> str:
        """What the numbers are, in words and with every parameter."""

    def measure(self, subject: Subject) -> dict[str, Any]:
        """By prompt: its length n, entries visible to its newest query, budgets by layer and by head."""
        from kvcompile.analysis.attention import Observer

        observer: list[Observer] = []  # made for the first prompt that is not measured yet

        def of(ids: Sequence[int], what: str) -> dict[str, Any]:
            if not observer:
                observer.append(Observer(subject.model, self.queries or None))
            return self._of(subject, observer[0], ids, what)

        measured = []
        for prompt in subject.prompts:
            compute = functools.partial(of, prompt.ids, f"{self.name}, {prompt.name}")
            part = subject.part(prompt.digest, compute)
            measured.append({"name": prompt.name, **part})
        return {"prompts": measured, "layers": _by_layer(measured)}

    def _of(self, subject: Subject, observer: Any, ids: Sequence[int], what: str) -> dict[str, Any]:
        import torch

        from kvcompile.analysis.attention import blocks, mean_attention, visible

        layers: list[float] = []
        heads: list[list[float]] = []
        seen_by_newest: list[int] = []
        total = subject.model.config.get_text_config().num_hidden_layers

        def visit(seen: Observation) -> None:
            rows = [mean_attention(seen).unsqueeze(2)] if self.per == "mean" else blocks(seen)
            by_layer, by_head = zip(*(self.budgets(attention, seen) for attention in rows), strict=True)
            layers.append(float(torch.cat(by_layer).mean()))
            heads.append(torch.cat(by_head, 1).mean(1).tolist())
            seen_by_newest.append(visible(seen))
            subject.progress(what, len(layers), total)

        subject.progress(what, 0, total)
        observer.look(ids, visit)
        return {"tokens": len(ids), "visible": seen_by_newest, "layers": layers, "heads": heads}

    def section(self, result: dict[str, Any]) -> str:
        """What is measured, and a table by layer."""
        from tabulate import tabulate

        rows = [
            [row["layer"], f"{row['mean']:,.1f}", f"{row['least']:,.0f} to {row['most']:,.0f}", f"{row['share']:.1%}"]
            + [f"{head[0]:,.0f} (head {head[1]})" for head in (row["least_head"], row["most_head"])]
            for row in result["layers"]
        ]
        header = ("layer", "tokens", "over the prompts", "of what it sees", "least head", "most")
        table = tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=("right",) * len(header))
        return f"{self.definition()}\n\n{table}"

    def which(self) -> str:
        """Whose attention, in words."""
        last = f"the last {self.queries} queries" if self.queries else "all queries"
        rows = (
            f"the mean attention of {last}" if self.per == "mean" else f"the attention of each of {last} (their mean)"
        )
        if self.heads == "query":
            return f"{rows} of a prompt, by query head"
        return f"{rows} of a prompt, by KV head (mean over its query heads)"

    def draw(self, result: dict[str, Any], figure: Figure) -> None:
        """The curve in tokens and as a share, with its spread over prompts and its heads; all heads as a map."""
        from kvcompile.analysis.pictures import layer_curve, layer_map, panels

        first, second, third = panels(figure, 1.4, 1.4, 1.0)
        prompts = result["prompts"]
        layer_curve(
            first, [p["layers"] for p in prompts], [p["heads"] for p in prompts], f"{self.name.upper()}, tokens"
        )
        shares = [[b / v for b, v in zip(p["layers"], p["visible"], strict=True)] for p in prompts]
        heads = [[[b / v for b in h] for h, v in zip(p["heads"], p["visible"], strict=True)] for p in prompts]
        layer_curve(second, shares, heads, f"{self.name.upper()}, share of what a layer sees", percent=True)
        mean = [[statistics.fmean(values) for values in zip(*rows, strict=True)] for rows in zip(*heads, strict=True)]
        layer_map(third, mean, f"{'query' if self.heads == 'query' else 'KV'} head", "share, by head")

    def numbers(self, result: dict[str, Any]) -> dict[str, float | int | str | None]:
        """The mean over layers, in tokens and as a share."""
        rows = result["layers"]
        return {
            f"{self.name}_tokens": statistics.fmean(row["mean"] for row in rows),
            f"{self.name}_share": statistics.fmean(row["share"] for row in rows),
        }


def _by_layer(prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every layer, over the prompts: mean, least and most tokens, mean share of what is visible, extreme heads."""
    rows = []
    for layer in range(len(prompts[0]["layers"])):
        tokens = [p["layers"][layer] for p in prompts]
        heads = [statistics.fmean(each) for each in zip(*(p["heads"][layer] for p in prompts), strict=True)]
        rows.append(
            {
                "layer": layer,
                "mean": statistics.fmean(tokens),
                "least": min(tokens),
                "most": max(tokens),
                "share": statistics.fmean(p["layers"][layer] / p["visible"][layer] for p in prompts),
                "least_head": [min(heads), heads.index(min(heads))],
                "most_head": [max(heads), heads.index(max(heads))],
            }
        )
    return rows
