"""Which entries of a prompt stay in one layer: the project's own scores over what a layer of vLLM holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvcompile.plan.selection import Score
from kvcompile.runtime.cache import Rotary
from kvcompile.runtime.history import QueryHistory
from kvcompile.runtime.observation import Observation
from kvcompile.runtime.positions import averaged_turn, turn_by
from kvcompile.runtime.selection import candidates, highest, protect
from kvcompile.serving.vllm.rules import PromptRule
from kvcompile.serving.vllm.turning import turned_back


@dataclass(frozen=True)
class Prompt:
    """The n tokens of a prompt that a layer has read.

    keys, values: `[H_kv, n, D]`, those of this rank. queries: `[q, H_q, D]`, its last ones, after rotation.
    scale, softcap: of the attention. history: what is remembered of all its queries, where the score asks for that.
    rotary: how the layer turns queries (None: that is not asked for).
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scale: float
    softcap: float | None = None
    history: QueryHistory | None = None
    rotary: Rotary | None = None


def stay(rule: PromptRule, prompt: Prompt, kept: int) -> Tensor:
    """Indices of the `kept` entries that each head keeps, ascending, int64 `[H_kv, kept]`."""
    heads, tokens = prompt.keys.shape[:2]
    s, device = rule.selection, prompt.keys.device
    sinks, recent = s.always(tokens)
    seen = _observation(prompt, s.score)
    among = candidates(seen.positions, tokens, None)
    scores = protect(s.score.score(seen).float(), seen.positions, among, tokens, sinks, recent)
    counts = torch.full((heads,), kept, device=device, dtype=torch.int64)
    return torch.stack(highest(scores, counts))


def remember(
    rule: PromptRule, history: QueryHistory, queries: Tensor, start: int, rotary: Rotary | None = None
) -> None:
    """Add the queries of a chunk, `[q, H_q, D]` after rotation, the first at position `start`.

    rotary: how the layer turned them, where the score wants them as they were before.
    """
    needs = rule.selection.score.needs
    positions = torch.arange(start, start + len(queries), device=queries.device, dtype=torch.int64)
    by_head = queries.transpose(0, 1).unsqueeze(0)
    if needs.moments and rotary is not None:
        history.add_moments(turned_back(by_head, positions, rotary), positions.unsqueeze(0), None, needs.moments)
    if needs.carries:
        history.remember(by_head.clone(), positions.unsqueeze(0), None, None)  # of the step's own memory


def waiting(rule: PromptRule, history: QueryHistory, tokens: int, ends: bool) -> int | None:
    """How many of the queries that a carrying score has not counted wait for more, of `tokens` read; None: all do.

    As in the compiled model, chunks of the score are counted whole, or at the end of the prompt.
    """
    needs = rule.selection.score.needs
    uncounted = history.uncounted(0) if needs.carries else 0  # of a score that carries nothing, none are kept
    length = needs.together(None)
    left = 0 if ends or length == 1 else min(uncounted, tokens % length if length else tokens)
    return left if uncounted > left else None


def carry(rule: PromptRule, prompt: Prompt, left: int) -> None:
    """Let a score that carries a number per entry count the queries remembered, but for the newest `left`."""
    score, history = rule.selection.score, prompt.history
    if history is not None:
        history.carried = [score.observe(_observation(prompt, score, left))]
        history.counted(0, [left])


def _observation(prompt: Prompt, score: Score, without: int = 0) -> Observation:
    """What a score sees of a prompt; `without` so many of the newest remembered queries."""
    (heads, tokens, dim), device, rotary = prompt.keys.shape, prompt.keys.device, prompt.rotary
    history = prompt.history or QueryHistory()
    at = torch.arange(tokens, device=device, dtype=torch.int64)
    if score.needs.carries:
        queries, positions = _remembered(prompt, history, without)
    else:
        count = min(score.needs.queries or 0, len(prompt.queries))
        newest = prompt.queries[len(prompt.queries) - count :]
        queries, positions = torch.unflatten(newest, 1, (heads, -1)).permute(1, 2, 0, 3), at[tokens - count :]
    return Observation(
        queries=queries,
        query_positions=positions,
        keys=prompt.keys,
        values=prompt.values,
        positions=at.expand(heads, tokens),
        lengths=torch.full((heads,), tokens, device=device, dtype=torch.int64),
        tokens=tokens,
        scale=prompt.scale,
        softcap=prompt.softcap,
        carried=history.carry(0, tokens),
        moments=history.moments(0, heads),
        mean_rotation=None if rotary is None else partial(averaged_turn, rotary, tokens, dim, device),
        rotation=None if rotary is None else partial(turn_by, rotary, dim, device),
    )


def _remembered(prompt: Prompt, history: QueryHistory, without: int) -> tuple[Tensor, Tensor]:
    """The queries that have not been counted, `[H_kv, g, w, D]`, and their positions `[w]`."""
    if history.uncounted(0):
        return history.recall(0, len(prompt.keys), None, without)
    group = prompt.queries.shape[1] // len(prompt.keys)
    none = torch.empty(0, device=prompt.keys.device, dtype=torch.int64)
    return prompt.keys.new_empty(len(prompt.keys), group, 0, prompt.keys.shape[-1]), none
