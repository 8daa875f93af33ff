"""The forward pass of a block transformer over whole sequences: every block of a batch at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompile.heal.blocks.sections import sections
from kvcompile.plan.blocks import Blocks
from kvcompile.runtime.live import LiveGraph
from kvcompile.structure.blocks import BOS, EMBEDDER, EXPANSION, START

States = tuple[Tensor, ...]


class BlockForward:
    """Logits of a `model` with the modules of `add_blocks`, compiled to keep everything, its layers as they were.

    Equal to what the model gives token by token: a block conditions the tokens of later ones alone, so none waits for
    another. The lower layers see n / L vectors, the upper ones a batch of n / L rows of P + L entries.
    """

    def __init__(self, model: Any, blocks: Blocks) -> None:
        self.model, self.blocks = model, blocks
        self.base = getattr(model, model.base_model_prefix)
        self.parts = sections(model.kvcompile.graph, blocks.split)

    def __call__(self, ids: Tensor, padding: Tensor | None = None) -> tuple[Tensor, States]:
        """Logits `[B, Q, vocabulary]` of `ids [B, Q]`, and what enters the attentions of the upper layers.

        Row k of both is of the token decoder where it predicts token k + 1. padding: places `[B]`, 0..L-1, that the
        first block of each sequence leaves empty: left ones for the embedder, whose mean is of the others; the token
        decoder reads what there is from its first place. Such a block is shorter, and later ones begin earlier.
        """
        (batch, count), length, prefix = ids.shape, self.blocks.length, self.blocks.prefix
        shift = ids.new_zeros(batch, 1) if padding is None else padding.unsqueeze(1)
        number = (count if padding is None else count + length - 1) // length + 1
        states = self._run(self.parts.embed, ids)
        slots = torch.arange(number * length, dtype=ids.dtype, device=ids.device)
        short = length - shift  # tokens of the first block
        outputs = self._outputs(ids, states, slots - shift, number, short)
        prefixes = getattr(self.base, EXPANSION)(outputs).view(batch, number, prefix, -1)
        tokens = _at(states, torch.where(slots < length, slots, slots - shift)).view(batch, number, length, -1)
        bos = getattr(self.base, BOS).expand(batch, number, 1, -1)
        inputs = torch.cat((prefixes, bos, tokens[:, :, :-1]), 2).flatten(0, 1)
        last, entries = self._run(self.parts.upper, inputs)
        following = torch.arange(1, count + 1, dtype=ids.dtype, device=ids.device)
        places = following + shift * (following >= short)
        wanted = [_at(x[:, prefix:].reshape(batch, number * length, -1), places) for x in (last, *entries)]
        return self._run(self.parts.head, wanted[0]), tuple(wanted[1:])

    def _outputs(self, ids: Tensor, states: Tensor, tokens: Tensor, number: int, short: Tensor) -> Tensor:
        """What conditions each block, `[B, N, hidden]`: the start, then the outputs of all blocks but the last.

        tokens: which one stands in each place `[B, N L]` of a block; before the first and after the last: none.
        short: tokens of the first block, `[B, 1]`.
        """
        batch, embedder = len(ids), getattr(self.base, EMBEDDER)
        start: Tensor = getattr(self.base, START).expand(batch, 1, -1)
        if number == 1:
            return start
        tokens = tokens[:, : (number - 1) * self.blocks.length]
        there = ((tokens >= 0) & (tokens < ids.shape[1])).unsqueeze(2)
        if self.blocks.embedder == "lookup":
            table = embedder(ids.gather(1, tokens.clamp(0, ids.shape[1] - 1)))
            vectors = (table * there).view(batch, number - 1, -1)
        else:
            vectors = embedder((_at(states, tokens) * there).view(batch, number - 1, -1))
            whole = torch.full_like(short, self.blocks.length).expand(batch, number - 2)
            filled = torch.cat((short, whole), 1).unsqueeze(2).to(vectors.dtype)
            vectors = vectors * self.blocks.length / filled
        return torch.cat((start, self._run(self.parts.lower, vectors)), 1)

    def _run(self, part: LiveGraph, inputs: Tensor) -> Any:
        """One part over all its inputs, with a cache of its own, which goes when the pass is done."""
        cache = self.model.new_cache()
        cache.chunk(prompting=True, last=True)
        cache.headroom = 0  # nothing is appended; behind rows of six entries it would be most of the memory
        positions = torch.arange(inputs.shape[1], device=inputs.device, dtype=torch.int64)
        return part(inputs, None, positions.expand(inputs.shape[:2]), cache, slice(None))


def _at(states: Tensor, places: Tensor) -> Tensor:
    """`[B, n, hidden]` of `states [B, Q, hidden]` at the places `[B, n]`, those outside as the nearest one inside."""
    inside = places.clamp(0, states.shape[1] - 1).unsqueeze(2)
    return states.gather(1, inside.expand(-1, -1, states.shape[2]))
