"""InfLLM: a sliding window, and the blocks of the past whose strongest keys the queries look for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.plan.recall import Choosing, Entries, Far, Grouping, Groups, Recall
from kvcompile.policies.recall import RecallPolicy


@dataclass(frozen=True)
class Blocks(Grouping):
    """Blocks of `size` consecutive tokens; what stands for one is the mean of its `strongest` keys.

    Those received most attention while their token was in the local window. sim(q, block) = sum_j q . k_j over them,
    which is q . mean_j k_j but for a factor that all blocks share. The paper takes the mean dot product for what was
    received, its code the sum of softmax probabilities, as here. Section 3.2 of arXiv 2402.04617.
    """

    receives: ClassVar[bool] = True
    size: int
    strongest: int

    @property
    def block(self) -> int:
        """Only whole blocks."""
        return self.size

    def count(self, entries: int, unit: int) -> int:
        """As many as there are blocks; where tokens share scales, these are whole units."""
        return entries // math.lcm(self.size, unit)

    def divide(self, entries: Entries) -> Groups:
        """Means of each block's strongest keys, `[R, G, D]`. Raises KvcompileError where nothing was received."""
        import torch

        if entries.received is None:
            raise KvcompileError("infllm: blocks are made of what entries received", "no attention", "attend first")
        size = math.lcm(self.size, entries.unit)
        keys, received = (torch.unflatten(x, 1, (-1, size)) for x in (entries.keys, entries.received))
        # of equally strong ones the older, everywhere
        strongest = received.sort(dim=2, descending=True, stable=True).indices[:, :, : self.strongest]
        chosen = keys.take_along_dim(strongest.unsqueeze(-1), 2)
        sizes = torch.full(keys.shape[:2], size, dtype=torch.int64, device=keys.device)
        return Groups(chosen.float().mean(2).to(keys.dtype), sizes)


@dataclass(frozen=True)
class InfLLM(RecallPolicy):
    """Keep everything, read a local window and the blocks of the past that the queries look for, prompts included.

    With `far=constant` a model reads beyond its trained length. Xiao et al., arXiv 2402.04617. A block is read whole:
    `budget` / `block` blocks, 16 in the paper's code.

    block: tokens a block. strongest: keys of a block that stand for it. heads: `shared`, one choice for all KV heads of
    a layer, as in the paper, or `own`, one for each. far: `constant`, as in the paper: all that has left the window is
    met at one distance, so that no position passes sinks, window, chunk and a block; `original`: where it stands.
    Prompts are to be read in chunks (`prefill_chunk=512` in the paper): each looks up blocks by the mean of its
    queries, the last one by that of the last token, which the paper's code reads alone.
    """

    name: ClassVar[str] = "infllm"
    summary: ClassVar[str] = (
        "keeps all; reads a window and the blocks whose strongest keys match; exceeds trained lengths"
    )
    budget: float = 2048
    sinks: int = 128
    recent: int = 4096
    every: int = 128
    skip_layers: list[int] = field(default_factory=list)
    block: int = 128
    strongest: int = 4
    heads: Choosing = "shared"
    far: Far = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.block >= 1, "block", "1 or more")
        self.require(1 <= self.strongest <= self.block, "strongest", f"1 to {self.block}, the tokens of a block")

    def grouping(self) -> Blocks:
        """Blocks with their strongest keys."""
        return Blocks(self.block, self.strongest)

    def recall(self) -> Recall:
        """The whole recall as data; chunks of a prompt choose too."""
        return replace(super().recall(), heads=self.heads, prompts=True, far=self.far)
