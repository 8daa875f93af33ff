"""Hit rate: which window of a prompt foresees what generation attends to."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvcompile.analysis.base import Analysis, Subject
from kvcompile.errors import KvcompileError
from kvcompile.plan.selection import Budget

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from kvcompile.runtime.observation import Observation

Rate = float | None  # None: no head attends to anything of the prefix


@dataclass(frozen=True)
class HitRate(Analysis):
    """Whether windows of a prompt vote for what generated tokens attend to (SnapKV, arXiv 2404.14469, section 3).

    The prefix is the prompt before its last `windows` windows. By head: a prompt window votes for the k prefix tokens
    of largest mean attention, I; to a window of generated tokens those are important whose mean attention is above
    `threshold`. H = |important and in I| / |important|, mean over the heads that have important ones. By chance,
    H = k / |prefix|.
    windows: of the prompt, its last. width: tokens of each window. generated: windows of generated tokens.
    budget: k, a share of the prefix or a number of tokens.
    threshold: of attention (None: 1 / n, what each of the n tokens of the prompt would get alike).
    heads: `query` or `kv`, where a KV head has the mean attention of its query heads.
    """

    name: ClassVar[str] = "hit_rate"
    summary: ClassVar[str] = "which window of a prompt foresees what generation attends to (SnapKV's hit rate)"
    windows: int = 20
    width: int = 128
    generated: int = 4
    budget: float = 0.1
    threshold: float | None = None
    heads: Literal["query", "kv"] = "query"

    def __post_init__(self) -> None:
        for field in ("windows", "width", "generated"):
            self.require(getattr(self, field) >= 1, field, "1 or more")
        share = 0 < self.budget <= 1
        self.require(share or (self.budget > 1 and self.budget % 1 == 0), "budget", "in (0, 1] or a number of tokens")
        self.require(self.threshold is None or 0 <= self.threshold < 1, "threshold", "in [0, 1)")

    def refuse(self, subject: Subject) -> None:
        """Raise KvcompileError for prompts too short for their windows, or too long to generate after."""
        from kvcompile.evaluation.heldout import longest

        least, new, most = (self.windows + 1) * self.width, self.generated * self.width, longest(subject.model)
        for prompt in subject.prompts:
            if len(prompt.ids) < least:
                raise KvcompileError(
                    f"hit_rate needs prompts of {least} tokens: {self.windows} windows and one more before them",
                    f"{prompt.name} of {len(prompt.ids)}",
                    f"prompts.tokens={least}, or fewer analysis.hit_rate.windows",
                )
            if len(prompt.ids) + new > most:
                raise KvcompileError(
                    f"hit_rate generates {new} tokens, and the model knows {most} positions",
                    f"{prompt.name} of {len(prompt.ids)} tokens",
                    f"prompts.tokens={most - new}, or fewer analysis.hit_rate.generated",
                )

    def measure(self, subject: Subject) -> dict[str, Any]:
        """By prompt: its length, prefix, k, threshold; hit rates `[windows][generated][layers]`, important shares."""
        from kvcompile.analysis.attention import Observer

        observer = functools.cache(lambda: Observer(subject.model, (self.windows + self.generated) * self.width))

        def of(ids: tuple[int, ...], what: str) -> dict[str, Any]:
            subject.progress(what, 0, 0)
            new = observer().generate(ids, self.generated * self.width)
            return self._of(subject, observer(), ids, new, what)

        prompts = []
        for prompt in subject.prompts:
            compute = functools.partial(of, prompt.ids, f"{self.name}, {prompt.name}")
            prompts.append({"name": prompt.name, **subject.part(prompt.digest, compute)})
        hits = _mean_prompts([p["hits"] for p in prompts])
        return {"prompts": prompts, "hits": hits, "chance": statistics.fmean(p["k"] / p["prefix"] for p in prompts)}

    def _of(self, subject: Subject, observer: Any, ids: Sequence[int], new: list[int], what: str) -> dict[str, Any]:
        prefix = len(ids) - self.windows * self.width
        k, threshold = Budget(self.budget).of(prefix), self.threshold
        threshold = 1 / len(ids) if threshold is None else threshold
        hits: list[list[list[Rate]]] = []  # [layers][windows][generated]
        shares: list[list[float]] = []  # [layers][generated]
        total = subject.model.config.get_text_config().num_hidden_layers

        def visit(seen: Observation) -> None:
            attention = self._windows(seen)[..., :prefix]
            voted, important = attention[:, : self.windows], attention[:, self.windows :] > threshold
            hits.append(hit_rates(voted, important, k))
            shares.append(important.double().mean((0, 2)).tolist())
            subject.progress(what, len(hits), total)

        subject.progress(what, 0, total)
        observer.look([*ids, *new], visit)
        numbers = {"tokens": len(ids), "prefix": prefix, "k": k, "threshold": threshold}
        return {**numbers, "hits": _layers_last(hits), "important": [list(row) for row in zip(*shares, strict=True)]}

    def _windows(self, seen: Observation) -> Tensor:
        """Mean attention of each window, first those of the prompt, `[H, windows + generated, n]`."""
        import torch

        from kvcompile.analysis.attention import mean_attention

        starts = range(0, (self.windows + self.generated) * self.width, self.width)
        means = torch.stack([mean_attention(seen, start, start + self.width) for start in starts], 2)
        return means.mean(1) if self.heads == "kv" else means.flatten(0, 1)

    def section(self, result: dict[str, Any]) -> str:
        """What is measured, a table by prompt window and one by layer."""
        from tabulate import tabulate

        style: dict[str, Any] = {"tablefmt": "github", "disable_numparse": True}
        by_window = [
            [f"{(number - self.windows) * self.width} to {(number + 1 - self.windows) * self.width}"]
            + [_shown(mean(rates)) for rates in window]
            + [_shown(mean(rate for rates in window for rate in rates))]
            for number, window in enumerate(result["hits"])
        ]
        header = ["tokens of the prompt, from its end", *(f"generated {i + 1}" for i in range(self.generated)), "all"]
        important = [
            statistics.fmean(share for p in result["prompts"] for share in (row[i] for row in p["important"]))
            for i in range(len(result["hits"][0][0]))
        ]
        by_layer = [
            [str(i), _shown(by_window[0]), _shown(by_window[-1]), f"{share:.1%}"]
            for i, (by_window, share) in enumerate(zip(self._by_layer(result), important, strict=True))
        ]
        layers = ("layer", "first window", "last window", "important of the prefix")
        return "\n\n".join(
            [self.definition(result), tabulate(by_window, header, **style), tabulate(by_layer, layers, **style)]
        )

    def definition(self, result: dict[str, Any]) -> str:
        """What the rates are, with every parameter."""
        first = result["prompts"][0]
        above = f"{self.threshold:g}" if self.threshold is not None else "1 / n"
        return (
            f"Hit rate: of the prefix tokens to which {self.width} generated tokens pay, on average, attention above "
            f"{above}, the share among the {first['k']} to which {self.width} tokens of the prompt pay most; by "
            f"{'query' if self.heads == 'query' else 'KV'} head, mean over the heads. The prefix is the prompt without "
            f"its last {self.windows * self.width} tokens ({first['prefix']} of the first prompt). Greedy generation, "
            f"its end held back. By chance: {result['chance']:.1%}."
        )

    def _by_layer(self, result: dict[str, Any]) -> list[list[Rate]]:
        """Mean over the generated windows, `[layers][windows]`."""
        by_window = [[mean(rates) for rates in zip(*window, strict=True)] for window in result["hits"]]
        return [list(layer) for layer in zip(*by_window, strict=True)]

    def draw(self, result: dict[str, Any], figure: Figure) -> None:
        """The rate by prompt window, for each generated window; by layer, of the first and the last; the whole map."""
        from kvcompile.analysis.pictures import layer_map, lines, panels

        first, second, third = panels(figure, 1.4, 1.4, 1.2)
        places = [(number - self.windows) * self.width for number in range(self.windows)]
        by_window = {
            f"generated {g * self.width} to {(g + 1) * self.width}": [mean(window[g]) for window in result["hits"]]
            for g in range(self.generated)
        }
        lines(first, places, by_window, "start of the prompt window, from the end", "hit rate", result["chance"])
        layers = self._by_layer(result)
        ends = {"last window": [row[-1] for row in layers], "first window": [row[0] for row in layers]}
        lines(second, range(len(layers)), ends, "layer", "hit rate by layer", result["chance"])
        values = [[float("nan") if rate is None else rate for rate in row] for row in layers]
        layer_map(third, values, "prompt window, the last one below", "hit rate")

    def numbers(self, result: dict[str, Any]) -> dict[str, float | int | str | None]:
        """The rate of the first and of the last prompt window, and chance."""
        rates = [mean(rate for rates in window for rate in rates) for window in result["hits"]]
        return {"hit_rate_first": rates[0], "hit_rate_last": rates[-1], "hit_rate_chance": result["chance"]}


def hit_rates(voted: Tensor, important: Tensor, k: int) -> list[list[Rate]]:
    """|important and voted| / |important|, mean over the heads where something is important, `[windows][generated]`.

    Args:
        voted: attention `[H, windows, n]`, of which the k largest are voted for.
        important: bool `[H, generated, n]`.
        k: how many.
    """
    import torch

    votes = torch.zeros_like(voted, dtype=torch.float64)
    votes.scatter_(-1, voted.topk(min(k, voted.shape[-1]), dim=-1).indices, 1.0)
    wanted = important.double()
    counts = wanted.sum(-1).unsqueeze(1)  # [H, 1, generated]
    rates = votes @ wanted.mT / counts  # nan where nothing is important
    present = (counts > 0).expand_as(rates)
    sums, heads = rates.nan_to_num(0.0).sum(0), present.sum(0)
    return [[float(s / h) if h else None for s, h in zip(*rows, strict=True)] for rows in zip(sums, heads, strict=True)]


def mean(rates: Iterable[Rate]) -> Rate:
    """Mean of the rates that there are; None of none."""
    there = [rate for rate in rates if rate is not None]
    return statistics.fmean(there) if there else None


def _layers_last(hits: Sequence[Sequence[Sequence[Rate]]]) -> list[list[list[Rate]]]:
    """`[layers][windows][generated]` as `[windows][generated][layers]`."""
    by_window = zip(*hits, strict=True)
    return [[list(rates) for rates in zip(*layers, strict=True)] for layers in by_window]


def _mean_prompts(hits: Sequence[Any]) -> list[list[list[Rate]]]:
    """Mean over the prompts of `[windows][generated][layers]`."""
    return [
        [[mean(rates) for rates in zip(*of_prompts, strict=True)] for of_prompts in zip(*windows, strict=True)]
        for windows in zip(*hits, strict=True)
    ]


def _shown(rate: Rate) -> str:
    return "" if rate is None else f"{rate:.1%}"
