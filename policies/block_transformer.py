"""Block transformer: half of the layers attend to blocks of tokens, the others to the tokens of one block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.plan.blocks import Blocks, Embedder
from kvcompile.plan.plan import Family, Plan
from kvcompile.plan.policy import Policy


@dataclass(frozen=True)
class BlockTransformer(Policy):
    """Divide layers and text: arXiv 2406.02657. Useless without training, heal the result.

    The block decoder (the layers before `split`) reads one vector for each complete block and caches n // block
    entries; the token decoder (the others) reads the block before, as `expansion` vectors, and the tokens of its own
    block, of which it caches `expansion + block` at most. Policies behind this one act on the block decoder.

    block: tokens of a block.
    split: the first layer of the token decoder (null: half of the layers).
    embedder: a block's vector begins as the `mean` of its tokens' embeddings; or a `lookup` in a table of its own,
    which begins at random.
    expansion: vectors that a block's output becomes in front of the next block's tokens.
    """

    name: ClassVar[str] = "block_transformer"
    family: ClassVar[Family] = "structure"
    summary: ClassVar[str] = "half of the layers read blocks of tokens, the others one block (useless until healed)"
    block: int = 4
    split: int | None = None
    embedder: Embedder = "mean"
    expansion: int = 2

    def __post_init__(self) -> None:
        self.require(self.block >= 2, "block", "2 or more tokens")
        self.require(self.split is None or self.split >= 1, "split", "1 or more")
        self.require(self.embedder in ("mean", "lookup"), "embedder", "mean or lookup")
        self.require(self.expansion >= 1, "expansion", "1 or more")

    def apply(self, plan: Plan) -> Plan:
        """Divide the layers. Raises KvcompileError where another policy has divided them before."""
        if plan.blocks is not None:
            raise KvcompileError("layers are divided into decoders once", f"{self.name!r} twice", "drop one")
        split = len(plan.layers) // 2 if self.split is None else self.split
        blocks = Blocks(self.block, split, self.embedder, self.expansion)
        return replace(plan.record(self.name, self.family), blocks=blocks)
