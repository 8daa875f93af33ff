"""What a replay must count, from a plain transformers model: one pass over text and replay, in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from tiny import attentions
from torch import Tensor

FIRST, LATER, CLOSING = [5, 6], [7, 8, 9], [10]
CHUNK, OVERLAP, SINKS = 16, 3, 2
OPTIONS = {"sinks": SINKS, "recent": 4, "chunk": CHUNK, "overlap": OVERLAP, "ids": [FIRST, LATER, CLOSING]}


@torch.no_grad()
def prefilled(model: Any, ids: Tensor, mask: Tensor | None = None, cache: Any = None) -> Any:
    """The cache of a compiled model after more tokens."""
    return model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).past_key_values


@dataclass(frozen=True)
class Read:
    """One pass: attention `[H_q, n, n]` by layer, states that enter each layer `[n, hidden]`, values `[n, H_kv D]`."""

    attention: list[Tensor]
    states: list[Tensor]
    values: list[Tensor]


def doubled(model: Any) -> Any:
    """The model in float64, with attention whose weights can be seen."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    return model


def read(model: Any, ids: list[int]) -> Read:
    """A model without a cache reads all of it."""
    values: list[Tensor] = []
    projections = [getattr(a, "v_proj", None) for a in attentions(model)]
    hooks = [
        p.register_forward_hook(lambda module, args, out: values.append(out[0])) for p in projections if p is not None
    ]
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    return Read([a[0].double() for a in out.attentions], [h[0] for h in out.hidden_states[:-1]], values)


def replays(text: list[int], start: int = 0, before: list[int] | None = None) -> list[tuple[int, int, list[int]]]:
    """(first, stop, what is read) of each piece of a text that begins at position `start`."""
    known, done = [*(before or []), *text], []
    for first in range(0, len(text), CHUNK):
        stop, at = min(first + CHUNK, len(text)), len(before or []) + first
        asked = FIRST if start + first == 0 else [*LATER, *known[max(0, at - OVERLAP) : at]]
        done.append((start + first, start + stop, [*asked, *CLOSING, *text[first:stop]]))
    return done


def expected_scores(model: Any, text: list[int], heads: int, normalise: bool) -> list[Tensor]:
    """`[H_kv, n]` for each layer, straight from the definition."""
    model, n = doubled(model), len(text)
    scores = [torch.zeros(heads, n, dtype=torch.float64) for _ in attentions(model)]
    for first, stop, repeated in replays(text):
        seen = read(model, [*text, *repeated])
        there = sorted({*range(min(SINKS, n)), *range(first, stop), *range(n, n + len(repeated))})
        for layer, attention in enumerate(seen.attention):
            shown = attention[:, n:, there]
            share = shown / shown.sum(-1, keepdim=True).clamp(min=1e-300)
            if normalise:
                share = share * moved(model, layer, seen)[:, None, there] / seen.states[layer][n:].norm(dim=-1)[:, None]
            best = share.view(heads, -1, *share.shape[1:]).amax((1, 2))
            for column, at in enumerate(there):
                if first <= at < stop:
                    scores[layer][:, at] = best[:, column]
    return scores


def moved(model: Any, layer: int, seen: Read) -> Tensor:
    """||W_O v|| of every token by query head, `[H_q, n]`: one head's value at a time through the output projection."""
    attention = attentions(model)[layer]
    dim, group = attention.head_dim, attention.num_key_value_groups
    values = torch.unflatten(seen.values[layer], -1, (-1, dim)).repeat_interleave(group, 1)  # [n, H_q, D]
    rows = []
    for h in range(values.shape[1]):
        alone = torch.zeros_like(values)
        alone[:, h] = values[:, h]
        rows.append((alone.flatten(1) @ attention.o_proj.weight.T).norm(dim=-1))
    return torch.stack(rows)
