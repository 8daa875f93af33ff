"""What a plan says about converted weights: names and numbers only (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Merge = Literal["mean", "first"]
Align = Literal["none", "values", "both"]
Fold = Literal["owner", "mean", "successive"]
Factor = Literal["activations", "weights"]
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Heads:
    """How one layer's KV heads were merged.

    groups: for each KV head of the converted model, the original KV heads that it stands for; query heads follow their
    KV head, in this order. merge: their mean, or the first of each group. align: what is rotated towards the others
    before the mean, by `tokens` tokens of calibration text (keys only by rotations that commute with RoPE).
    """

    groups: Groups
    merge: Merge = "mean"
    align: Align = "none"
    tokens: int = 0

    @property
    def original(self) -> int:
        """KV heads before the merge."""
        return sum(len(group) for group in self.groups)

    @property
    def permutes(self) -> bool:
        """Whether query heads change places."""
        return [h for group in self.groups for h in group] != list(range(self.original))


@dataclass(frozen=True)
class Latent:
    """What one layer caches in place of keys and values: a row [k_R; c] per token, shared by all heads.

    rank: numbers of c, from which the up-projections make every head's values and its keys without position.
    frequencies: the RoPE frequency of each pair of k_R, ascending; a frequency comes once for each of its components.
    kv_heads: KV heads that the row stands for. factor, mix, damp, tokens: how its projections are found (see
    `kvcompile.structure.latent`). centred: what is constant in the values goes into the bias of the output. native: the
    model caches this row itself, so that nothing is converted.
    """

    rank: int
    frequencies: tuple[int, ...]
    kv_heads: int
    factor: Factor = "activations"
    mix: bool = True
    damp: bool = True
    tokens: int = 0
    centred: bool = True
    native: bool = False

    @property
    def rope(self) -> int:
        """Numbers of k_R."""
        return 2 * len(self.frequencies)

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.rope + self.rank

    @property
    def before(self) -> str:
        """Where it comes from, for messages of policies."""
        return "in a model that caches latents itself" if self.native else "after 'mla'"


def contiguous(heads: int, kept: int) -> Groups:
    """`kept` groups of neighbouring heads, all of one size."""
    size = heads // kept
    return tuple(tuple(range(i * size, (i + 1) * size)) for i in range(kept))
