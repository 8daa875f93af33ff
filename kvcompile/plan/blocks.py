"""What a plan says about a model that reads its text in blocks: numbers and names only (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Embedder = Literal["mean", "lookup"]


@dataclass(frozen=True)
class Blocks:
    """Layers before `split` attend to blocks of `length` tokens, the others to the tokens of one block.

    length: tokens of a block. split: the first layer of the token decoder. embedder: what makes one vector of a block:
    a projection of its token embeddings that begins as their `mean`, or a `lookup` in a table of its own, its tokens'
    rows side by side. prefix: vectors that the output of a block becomes in front of the next block's tokens.
    """

    length: int
    split: int
    embedder: Embedder = "mean"
    prefix: int = 2

    @property
    def local(self) -> int:
        """Entries of one row in a layer of the token decoder, at most: prefix, start, all tokens but the last."""
        return self.prefix + self.length
