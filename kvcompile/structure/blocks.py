"""A block transformer out of a dense checkpoint: four new modules beside the layers, which stay as they are.

The lower layers (block decoder) attend to one vector a block, e_i = W_e [x_{4i}; ...; x_{4i+3}], x the embeddings of
its tokens. The upper ones (token decoder) read `[W_p o_{i-1}; bos; x_{4i}; ...; x_{4i+2}]`, o_{i-1} the output of the
block before, and predict the tokens of block i. Source: Block Transformer, arXiv 2406.02657, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.errors import KvcompileError
from kvcompile.models.sharing import shared
from kvcompile.plan.blocks import Blocks

EMBEDDER, EXPANSION, START, BOS = NAMES = ("block_embedder", "block_expansion", "block_start", "block_bos")


@torch.no_grad()
def add_blocks(model: Any, blocks: Blocks) -> None:
    """Give the base model of an uncompiled, dense `model` what `blocks` needs, in place; no weight of it changes.

    Of D channels and blocks of L tokens, in the dtype of the embeddings:
    `block_embedder`: Linear L D -> D, at first the mean of its L inputs; of a lookup an Embedding V x D / L, random.
    `block_expansion`: Linear D -> P D, at first P identities. `block_bos [D]`: what enters the first layer for BOS.
    `block_start [D]`: stands for the output of a block before the first, what the block decoder gives for a block of
    BOS alone (arXiv 2406.02657 pads the first block instead). EOS is taken where there is no BOS, zeros without either.
    On a meta model: modules for weights to come.

    Raises KvcompileError where a lookup cannot divide the channels, or a model has blocks already.
    """
    base, table = getattr(model, model.base_model_prefix), model.get_input_embeddings().weight
    if hasattr(base, EMBEDDER):
        raise KvcompileError("a model is divided into blocks once", "one that has a block embedder", "load it afresh")
    width = model.config.hidden_size
    start, bos = _outputs_of_bos(model, base, blocks.split) if not table.is_meta else (None, None)
    eye = torch.eye(width, dtype=table.dtype, device=table.device)
    if blocks.embedder == "mean":
        base.add_module(EMBEDDER, _linear(eye.repeat(1, blocks.length) / blocks.length))
    else:
        base.add_module(EMBEDDER, _lookup(table, blocks.length, getattr(model.config, "initializer_range", 0.02)))
    base.add_module(EXPANSION, _linear(eye.repeat(blocks.prefix, 1)))
    for name, value in ((START, start), (BOS, bos)):
        value = table.new_zeros(width) if value is None else value.to(table).clone()
        base.register_parameter(name, nn.Parameter(value))


def _outputs_of_bos(model: Any, base: Any, split: int) -> tuple[Tensor | None, Tensor | None]:
    """For a BOS token alone: what enters layer `split`, and what enters the first one; None where there is none."""
    begins, ends = model.config.bos_token_id, model.config.eos_token_id  # the latter may be several
    tokens = [t for t in (begins, *(ends if isinstance(ends, (list, tuple)) else [ends])) if t is not None]
    if not tokens:
        return None, None
    ids = torch.tensor([tokens[:1]], device=model.device, dtype=torch.int64)
    twin = shared(base)  # transformers leaves hooks on the layers that it has looked into
    states = twin(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    return states[split][0, 0], states[0][0, 0]


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight)
    return linear


def _lookup(table: Tensor, length: int, spread: float) -> nn.Embedding:
    tokens, width = table.shape
    if width % length:
        raise KvcompileError(
            "embedder=lookup puts the rows of a block's tokens side by side, so their number must divide the channels",
            f"blocks of {length} tokens, {width} channels",
            "embedder=mean, or another block",
        )
    rows = torch.empty(tokens, width // length, dtype=table.dtype, device=table.device)
    if not table.is_meta:
        seeded = torch.Generator().manual_seed(0)
        rows.copy_(spread * torch.randn(rows.shape, generator=seeded, dtype=torch.float32, device="cpu"))
    embedding = nn.Embedding(tokens, width // length, device="meta", dtype=table.dtype)
    embedding.weight = nn.Parameter(rows)
    return embedding
