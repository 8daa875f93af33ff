"""LMBO: how many tokens give a layer's attention output, or nearly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvcompile.analysis.layers import LayerBudgets

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation

NUMBERS = 4 << 20  # of weighted values held at a time, float64
EQUAL = 1e-12  # by which a similarity may miss its threshold in float64


@dataclass(frozen=True)
class LMBO(LayerBudgets):
    """How few tokens give a layer's attention output nearly (ZigZagKV, arXiv 2412.09036, figure 3).

    o(B): the output from the B tokens of largest attention, with their weights renormalised, of all heads of the layer
    side by side. LMBO_l = min{ B : similarity(o, o(B)) >= threshold }; a head's own is that of its output alone.
    similarity: `cosine` of o and o(B), or `error`, 1 - |o - o(B)| / |o|.
    threshold: which similarity is enough.
    """

    name: ClassVar[str] = "lmbo"
    summary: ClassVar[str] = "how many tokens give each layer's attention output, or nearly (ZigZagKV's LMBO)"
    similarity: Literal["cosine", "error"] = "cosine"
    threshold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.threshold <= 1, "threshold", "in (0, 1]")

    def budgets(self, attention: Tensor, seen: Observation) -> tuple[Tensor, Tensor]:
        """The least B that is enough, for the outputs of all heads side by side and for each head's alone."""
        import torch

        layers, heads = [], []
        for rows in _few_rows(attention, seen.values.shape[-1]):
            parts = [self._parts(*head, sinks=seen.sinks is not None) for head in zip(rows, seen.values, strict=True)]
            by_head = torch.cat(parts, 1)  # [3, H, w, n]
            heads.append(self._first(by_head))
            layers.append(self._first(by_head.sum(1)))
        return torch.cat(layers, -1), torch.cat(heads, -1)

    def _parts(self, attention: Tensor, values: Tensor, sinks: bool) -> Tensor:
        """`truncations` of one KV head, `[3, g, w, n]`, or of its group as one output, `[3, 1, w, n]`."""
        ranks = attention.mean(0, keepdim=True).expand_as(attention) if self.heads == "kv" else attention
        parts = truncations(attention, values, ranks, sinks)
        return parts.sum(1, keepdim=True) if self.heads == "kv" else parts

    def _first(self, parts: Tensor) -> Tensor:
        """The first B with enough similarity, float64, by `truncations [3, ..., n]`; n always has."""
        product, length, error = parts
        whole = length[..., -1:].sqrt()
        likeness = product / (whole * length.sqrt()) if self.similarity == "cosine" else 1 - error.sqrt() / whole
        enough = likeness >= self.threshold - EQUAL
        enough[..., -1] = True
        first: Tensor = enough.int().argmax(-1).double() + 1
        return first

    def definition(self) -> str:
        """What LMBO is."""
        measure = "the cosine to" if self.similarity == "cosine" else "1 - the relative error of"
        return (
            f"LMBO: the least number B of tokens of largest attention, weights renormalised, from which {measure} the "
            f"whole output is at least {self.threshold:g}; for the outputs of all heads of a layer side by side, each "
            f"with B tokens of its own. A head's own number is for its output alone. Of {self.which()}."
        )


def truncations(attention: Tensor, values: Tensor, ranks: Tensor, sinks: bool = False) -> Tensor:
    """o . o(B), |o(B)|^2 and |o - o(B)|^2 of attention outputs from the first B entries alone, for B = 1..n.

    With entries in the order of their ranks, and s = sum_{i > B} a_i:

        o(B) = sum_{i <= B} a_i v_i / (1 - s)
        o - o(B) = sum_{i > B} a_i v_i - s o(B) = s (mean of the dropped - o(B))

    The error is what is dropped, summed up from its end: no difference of two nearly equal outputs is taken.

    Args:
        attention: `[..., n]`, weights of each row.
        values: `[n, D]`.
        ranks: `[..., n]`, the highest come first; of equals the earlier.
        sinks: whether weights go to a learned sink, which stays (else rows are normalised to 1).

    Returns:
        `[3, ..., n]`, float64.
    """
    import torch

    weights = attention.double()
    weights = weights if sinks else weights / weights.sum(-1, keepdim=True)
    order = ranks.sort(dim=-1, descending=True, stable=True).indices
    weights = weights.gather(-1, order)
    weighted = weights.unsqueeze(-1) * values.double()[order]
    dropped, rest = _after(weights, -1), _after(weighted, -2)
    outputs = weighted.cumsum(-2) / (1 - dropped).clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(-1)
    errors = rest - dropped.unsqueeze(-1) * outputs
    return torch.stack([(outputs * outputs[..., -1:, :]).sum(-1), outputs.square().sum(-1), errors.square().sum(-1)])


def _after(x: Tensor, dim: int) -> Tensor:
    """Of each entry along `dim`, the sum of all after it, added up from the end."""
    return x.flip(dim).cumsum(dim).flip(dim).roll(-1, dim).index_fill(dim, _last(x, dim), 0.0)


def _last(x: Tensor, dim: int) -> Tensor:
    import torch

    return torch.tensor([x.shape[dim] - 1], dtype=torch.int64, device=x.device)


def _few_rows(attention: Tensor, dim: int) -> Iterator[Tensor]:
    """Pieces of `[H_kv, g, w, n]` along w whose weighted values, of one KV head, fit into `NUMBERS`."""
    _, group, rows, entries = attention.shape
    width = max(1, NUMBERS // (group * entries * dim))
    for start in range(0, rows, width):
        yield attention[:, :, start : start + width]
