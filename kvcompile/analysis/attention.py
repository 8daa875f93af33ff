"""The original model's attention, layer by layer at the end of a prompt, never all queries x entries at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kvcompile.calibration.probe import Everything
from kvcompile.models.sharing import shared
from kvcompile.plan.selection import Needs, Score, Selection
from kvcompile.plan.window import oldest
from kvcompile.runtime.observation import Observation

BLOCK = 8 << 20  # numbers of attention held at a time: 32 MiB in float32
Heads = Literal["query", "kv"]
Visit = Callable[[Observation], None]


@dataclass(frozen=True)
class Visited(Score):
    """Shows each layer to whoever visits, and keeps everything."""

    queries: int | None
    visits: list[Visit] = field(default_factory=list, compare=False)

    @property
    def needs(self) -> Needs:
        """The newest queries, or all of them."""
        return Needs(queries=self.queries)

    def score(self, seen: Observation) -> Tensor:
        """Zeros; the visit comes before."""
        for visit in self.visits:
            visit(seen)
        return torch.zeros(seen.keys.shape[:2], device=seen.keys.device, dtype=torch.float32)


class Observer:
    """An uncompiled model, observed through its own compiled graph, which drops nothing: its weights are shared.

    queries: how many of the newest are seen of each layer; None: all.
    """

    def __init__(self, model: Any, queries: int | None) -> None:
        from kvcompile.adapters.architectures import describe
        from kvcompile.build import build

        self.device = model.device
        self._score = Visited(queries)
        selection = Selection("observer", self._score, None, Everything())
        plan = describe(model.config, str(model.dtype).removeprefix("torch."))
        self._model = build(shared(model), plan.map(lambda p: replace(p, selection=selection)))

    @torch.no_grad()
    def look(self, ids: Sequence[int], visit: Visit) -> None:
        """Read one prompt; `visit` gets each layer in order, once the prompt is in its cache."""
        self._score.visits[:] = [visit]
        try:
            tensor = torch.tensor([list(ids)], dtype=torch.int64, device=self.device)
            self._model(tensor, logits_to_keep=1)
        finally:
            self._score.visits.clear()

    @torch.inference_mode()
    def generate(self, ids: Sequence[int], tokens: int) -> list[int]:
        """How the model goes on after a prompt: `tokens` tokens, greedily; the end of the text is held back."""
        prompt = torch.tensor([list(ids)], dtype=torch.int64, device=self.device)
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        mask = torch.ones_like(prompt)
        out = self._model.generate(prompt, attention_mask=mask, do_sample=False, num_beams=1, pad_token_id=0, **lengths)
        return [int(i) for i in out[0, len(ids) :]]


def blocks(seen: Observation, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
    """Attention `[H_kv, g, w, n]` of the observed queries `start:stop`, in blocks of as many as memory allows."""
    stop = seen.queries.shape[2] if stop is None else stop
    heads, group = seen.queries.shape[:2]
    width = max(1, BLOCK // (heads * group * seen.keys.shape[1]))
    for first in range(start, stop, width):
        yield seen.attention(first, min(first + width, stop))


def mean_attention(seen: Observation, start: int = 0, stop: int | None = None) -> Tensor:
    """Attention `[H_kv, g, n]` to every entry, mean over the observed queries `start:stop`, float64."""
    total, count = torch.zeros((), dtype=torch.float64, device=seen.keys.device), 0
    for attention in blocks(seen, start, stop):
        total, count = total + attention.sum(2, dtype=torch.float64), count + attention.shape[2]
    return total / count


def visible(seen: Observation) -> int:
    """How many entries the newest query sees: all, a sliding layer's window, or its chunk."""
    if not seen.sliding_window:
        return seen.tokens
    return seen.tokens - max(0, oldest(seen.tokens - 1, seen.sliding_window, seen.chunked))
