"""A block transformer by its definition: token by token, one sequence, everything anew for each. The oracle.

Of a transformers model of the llama kind with the modules of `kvcompile.structure.blocks`, best in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompile.plan.blocks import Blocks


def logits_of(model: Any, blocks: Blocks, ids: Tensor) -> Tensor:
    """Logits `[n, vocabulary]` of `ids [n]`, any n >= 1: row k is for token k + 1, after tokens 0..k."""
    return torch.stack([next_logits(model, blocks, ids[: k + 1]) for k in range(len(ids))])


def next_logits(model: Any, blocks: Blocks, ids: Tensor) -> Tensor:
    """Logits `[vocabulary]` of the token after `ids [n]`, n >= 0 (0: of the first token of all)."""
    base = model.model
    complete = len(ids) // blocks.length
    output = base.block_start
    if complete:
        vectors = [block_vector(model, blocks, ids[i * blocks.length :][: blocks.length]) for i in range(complete)]
        output = run(model, range(blocks.split), torch.stack(vectors))[-1]
    inputs = [*base.block_expansion(output).view(blocks.prefix, -1), base.block_bos]
    inputs += embedded(model, ids[complete * blocks.length :])
    states = run(model, range(blocks.split, len(base.layers)), torch.stack(inputs))
    return model.lm_head(base.norm(states[-1])) / getattr(model.config, "logits_scaling", 1.0)


def block_vector(model: Any, blocks: Blocks, ids: Tensor) -> Tensor:
    """`[D]` of the tokens of one block."""
    if blocks.embedder == "lookup":
        return model.model.block_embedder(ids).flatten()
    return model.model.block_embedder(embedded(model, ids).flatten())


def embedded(model: Any, ids: Tensor) -> Tensor:
    """What enters the first layer for `ids [n]`, `[n, D]`; granite multiplies it."""
    return model.model.embed_tokens(ids) * getattr(model.config, "embedding_multiplier", 1.0)


def run(model: Any, layers: range, states: Tensor) -> Tensor:
    """These layers over `states [n, D]` at positions 0..n-1, each seeing itself and those before: `[n, D]`."""
    count = len(states)
    positions = torch.arange(count, dtype=torch.int64, device=states.device)[None]
    later = torch.ones(count, count, dtype=torch.bool, device=states.device).triu(1)
    mask = torch.zeros(1, 1, count, count, dtype=states.dtype, device=states.device).masked_fill(later, -torch.inf)
    states, angles = states[None], model.model.rotary_emb(states[None], positions)
    for index in layers:
        states = model.model.layers[index](
            states, attention_mask=mask, position_ids=positions, position_embeddings=angles
        )
    return states[0]
