"""The nodes of a block transformer: how tokens become blocks, and blocks condition the tokens of the next one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from kvcompile.errors import KvcompileError
from kvcompile.graph.ops import at_the_cache, leaf
from kvcompile.runtime.blocks.cache import BlockCache, BlockStep, DividedStep, TokenStep
from kvcompile.runtime.blocks.layer import LocalLayer


def _cache(step: DividedStep | TokenStep) -> BlockCache:
    if not isinstance(step.cache, BlockCache):
        raise KvcompileError("a block transformer needs a cache of its own", type(step.cache).__name__)
    return step.cache


@at_the_cache
def block_step(step: DividedStep) -> BlockStep:
    """The pass as the block decoder sees it: the blocks that it completes, at their positions 0, 1, 2, ..."""
    return _cache(step).block_step(step)


@at_the_cache
def block_tokens(features: Tensor, step: DividedStep, blocks: BlockStep) -> Tensor:
    """What the embedder reads of the tokens of each completed block, side by side: `[B, M, L F]` of `[B, Q, F]`."""
    return _cache(step).gather(features, blocks.read).flatten(2)


@at_the_cache
def wait(features: Tensor, step: DividedStep) -> None:
    """Let the tokens of blocks that are not complete wait for the others."""
    _cache(step).wait(features, step)


@at_the_cache
def token_step(step: DividedStep, wanted: Tensor | slice) -> TokenStep:
    """The pass as the token decoder sees it: the blocks of the `wanted` columns' logits and the current ones, a row
    each.
    """
    columns = torch.arange(step.division.count, dtype=torch.int64, device="cpu")
    return _cache(step).token_step(step, columns[wanted.cpu() if isinstance(wanted, Tensor) else wanted])


@leaf
def positions(step: BlockStep | TokenStep) -> Tensor:
    """Where the rotary embedding puts what is new: of blocks `[B, M]`, of places in a block `[N, W]`."""
    return step.positions if step.shift is None else step.positions - step.shift.unsqueeze(1)


@leaf
def contexts(start: Tensor, outputs: Tensor | None, step: TokenStep) -> Tensor:
    """For each block that the token decoder begins, the output of the one before, `[O, hidden]`.

    outputs: of the blocks completed in this pass, `[B, M, hidden]` (None: none). start `[hidden]`: before the first.
    """
    rows = start.unsqueeze(0) if outputs is None else torch.cat((start.unsqueeze(0), outputs.flatten(0, 1)))
    return rows[step.windows.contexts]


@leaf
def token_inputs(prefixes: Tensor, bos: Tensor, embeddings: Tensor, step: TokenStep) -> Tensor:
    """What enters the token decoder, `[N, W, hidden]`: `P` prefixes `[O, P hidden]` of each block that begins, `bos`,
    tokens' `embeddings [B, Q, hidden]`.
    """
    width = embeddings.shape[-1]
    return torch.cat((bos.unsqueeze(0), prefixes.reshape(-1, width), embeddings.flatten(0, 1)))[step.windows.inputs]


@leaf
def wanted_outputs(outputs: Tensor, step: TokenStep) -> Tensor:
    """Of the token decoder's `outputs [N, W, hidden]` those that predict what follows wanted columns, `[B, K, .]`."""
    return outputs.flatten(0, 1)[step.windows.outputs]


@at_the_cache
def close(kv: LocalLayer, step: TokenStep, layer: int) -> None:
    """Keep the current block of each sequence alone."""
    _cache(step).close(kv, step.windows)


for op in (block_step, wait, token_step, close):
    has_side_effect(op)
