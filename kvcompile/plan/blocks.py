"""What a plan says about a model that reads its text in blocks: numbers and names only (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvcompile.errors import KvcompileError
from kvcompile.plan.storage import PLAIN

if TYPE_CHECKING:
    from kvcompile.plan.plan import LayerPlan, Plan

Embedder = Literal["mean", "lookup"]
LLAMA_LIKE = ("granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")


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

    def held(self, local: int) -> int:
        """Entries of one row in a layer of the token decoder once `local` tokens of the current block were read."""
        return self.prefix + 1 + local


def check_blocks(plan: Plan, blocks: Blocks) -> None:
    """Raise KvcompileError, naming the layer, where a plan cannot run in blocks."""
    layers = len(plan.layers)
    if not 0 < blocks.split < layers:
        raise KvcompileError(
            "block_transformer: both decoders need at least one layer",
            f"split={blocks.split} of {layers} layers",
            f"stack.block_transformer.split={layers // 2}" if layers > 1 else "a model of more layers",
        )
    if plan.architecture not in LLAMA_LIKE:
        raise KvcompileError(
            "block_transformer divides models that are built like llama", plan.architecture, f"one of {LLAMA_LIKE}"
        )
    for p in plan.layers:
        _check_divided(p, blocks)
        if p.index < blocks.split:
            _check_block_layer(p)


def _check_divided(p: LayerPlan, blocks: Blocks) -> None:
    where = f"block_transformer: layer {p.index}"
    if p.sliding_window:
        raise KvcompileError(
            f"{where} attends to a sliding window, which blocks do not have",
            f"a window of {p.sliding_window} tokens",
            "a checkpoint whose layers attend to all tokens",
        )
    if p.latent is not None:
        raise KvcompileError(f"{where} caches keys and values, no latents", "'mla' in the stack", "drop mla")
    if (p.owner < blocks.split) != (p.index < blocks.split):
        raise KvcompileError(
            f"{where} holds the tokens of one block, layer {p.owner} holds blocks: they cannot share a cache",
            f"layer {p.index} reading layer {p.owner}",
            f"layers that share on the same side of stack.block_transformer.split={blocks.split}",
        )
    if p.index >= blocks.split and (p.selection or p.recall or p.storage != PLAIN):
        policy = next(x.policy for x in (p.selection, p.recall, p.storage) if x is not None and x != PLAIN)
        raise KvcompileError(
            f"{where} is part of the token decoder and holds at most {blocks.local} entries a row, as they are",
            f"{policy!r} on it",
            f"the layers of the block decoder, 0 to {blocks.split - 1}",
        )


def _check_block_layer(p: LayerPlan) -> None:
    """Sequences of a batch complete their blocks at different steps: what acts on all of them at once is refused."""
    different = f"layer {p.index} holds blocks, which the sequences of a batch complete at different steps"
    if p.selection is not None and p.selection.tiers is not None:
        raise KvcompileError(
            f"{p.selection.policy}: {different}, while tiers are divided in all of them at once",
            f"{p.selection.policy!r} after 'block_transformer'",
            "policy=[block_transformer,snapkv,kivi]",
        )
    if p.selection is not None and p.selection.schedule.replay is not None:
        raise KvcompileError(
            f"{p.selection.replayer}: a replay repeats a text token by token, and layer {p.index} holds blocks",
            f"{p.selection.replayer!r} after 'block_transformer'",
            "another score, as in policy=[block_transformer,snapkv]",
        )
    if p.recall is not None and p.selection is not None:
        raise KvcompileError(
            f"{p.recall.policy}: {different}, while a selection has all of them grouped anew",
            f"{p.selection.policy!r} and {p.recall.policy!r} after 'block_transformer'",
            "drop one",
        )
    if p.recall is not None and p.recall.reuse > 1:
        raise KvcompileError(
            f"{p.recall.policy}: {different}, while a choice would stand for several of all of them",
            f"stack.{p.recall.policy}.reuse={p.recall.reuse}",
            f"stack.{p.recall.policy}.reuse=1",
        )
