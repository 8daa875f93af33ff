"""Which entries of a prompt stay in one layer: the project's own scores over what a layer of vLLM holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompile.runtime.observation import Observation
from kvcompile.runtime.selection import candidates, highest, protect
from kvcompile.serving.vllm.rules import PromptRule


@dataclass(frozen=True)
class Prompt:
    """A layer's prompt of n tokens once it is read.

    keys, values: `[H_kv, n, D]`, those of this rank. queries: `[q, H_q, D]`, its last ones, after rotation.
    scale, softcap: of the attention.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scale: float
    softcap: float | None = None


def stay(rule: PromptRule, prompt: Prompt, kept: int) -> Tensor:
    """Indices of the `kept` entries that each head keeps, ascending, int64 `[H_kv, kept]`."""
    heads, tokens = prompt.keys.shape[:2]
    s, device = rule.selection, prompt.keys.device
    sinks, recent = s.always(tokens)
    seen = _observation(prompt, s.score.needs.queries or 0)
    among = candidates(seen.positions, tokens, None)
    scores = protect(s.score.score(seen).float(), seen.positions, among, tokens, sinks, recent)
    counts = torch.full((heads,), kept, device=device, dtype=torch.int64)
    return torch.stack(highest(scores, counts))


def _observation(prompt: Prompt, wanted: int) -> Observation:
    heads, tokens, _ = prompt.keys.shape
    device = prompt.keys.device
    at = torch.arange(tokens, device=device, dtype=torch.int64)
    count = min(wanted, len(prompt.queries))
    newest = prompt.queries[len(prompt.queries) - count :]
    return Observation(
        queries=torch.unflatten(newest, 1, (heads, -1)).permute(1, 2, 0, 3),
        query_positions=at[tokens - count :],
        keys=prompt.keys,
        values=prompt.values,
        positions=at.expand(heads, tokens),
        lengths=torch.full((heads,), tokens, device=device, dtype=torch.int64),
        tokens=tokens,
        scale=prompt.scale,
        softcap=prompt.softcap,
    )
