"""What a policy may ask of the loaded model before the plan is final: how it attends, and what a selection keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import Plan
from kvcompile.plan.selection import Allocation, LayerScores, Needs, Score, Selection
from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class Probe(Score):
    """Records the attention that the last `window` queries pay, and keeps everything."""

    window: int
    attention: dict[int, Tensor] = field(default_factory=dict, compare=False)

    @property
    def needs(self) -> Needs:
        """The observation window."""
        return Needs(queries=self.window)

    def score(self, seen: Observation) -> Tensor:
        """Zeros; the attention `[H_kv, g, w, n]` goes to `found[layer]`."""
        self.attention[seen.layer] = seen.attention()
        return torch.zeros(seen.keys.shape[:2], device=seen.keys.device, dtype=torch.float32)


@dataclass(frozen=True)
class Everything(Allocation):
    """Keeps every entry."""

    def allot(self, layers: Sequence[LayerScores]) -> list[Tensor]:
        """Row lengths."""
        return [layer.lengths for layer in layers]


class ModelCalibrator:
    """The `Calibrator` that policies get: the uncompressed model, observed through its own compiled graph.

    plan: that of a model whose weights have been converted (default: what its config says).
    stored: that of the whole stack, before anything is calibrated: how its layers will store their keys.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        progress: Callable[[str, int, int], None],
        plan: Plan | None = None,
        stored: Plan | None = None,
    ) -> None:
        self.model, self.tokenizer, self.progress, self.plan, self.stored = model, tokenizer, progress, plan, stored
        self.layers: int = model.config.get_text_config().num_hidden_layers
        self.owners = [p.index for p in plan.owners] if plan else list(range(self.layers))
        self._probe: Probe | None = None
        self._probed: Any = None
        self._selecting: dict[Selection, Any] = {}  # the last one

    def attention(self, ids: Tensor, last: int) -> list[Tensor]:
        """Attention of the last `last` tokens of one sequence `ids [1, n]`: per layer `[H_kv, g, last, n]`, float32.

        Layers that share a cache give one entry, the owner's, with all their query heads in its groups.
        """
        if self._probe is None or self._probe.window < last:
            self._build(last)
        probe = self._probe
        if probe is None:
            raise RuntimeError("the probe was not built")
        with torch.no_grad():
            self._probed(ids.to(self.model.device), logits_to_keep=1)
        attention = [probe.attention[i][:, :, -last:] for i in sorted(probe.attention)]
        probe.attention.clear()
        return attention

    def kept(self, ids: Tensor, selection: Selection) -> tuple[list[list[int]], list[int]]:
        """What a selection keeps of one sequence `ids [1, n]`, by layer with a cache of its own.

        Returns tokens by KV head, and those of them that stay in every head whatever the scores.
        """
        if selection not in self._selecting:
            self._selecting = {selection: self._selected(selection)}
        with torch.no_grad():
            out = self._selecting[selection](ids.to(self.model.device), logits_to_keep=1)
        plan: Plan = out.past_key_values.plan
        floors = [selection.resolve(p.span(ids.shape[1]))[1] for p in plan.owners]
        return [out.past_key_values.lengths()[p.index] for p in plan.owners], floors

    def noise(self, ids: Tensor) -> dict[int, float]:
        """What encoding keys as the stack does adds to logits over one sequence `ids [1, n]`, in nats, by layer.

        See `logit_noise`; layers whose keys stay as they are, and those of latents, are left out. Raises KvcompileError
        where no stack is known.
        """
        from kvcompile.calibration.noise import NoiseMeter

        if self.stored is None:
            raise KvcompileError("what codes do to logits is measured for a stack", "no plan of one", "pass stored=")
        meter = NoiseMeter(self.stored)
        with torch.no_grad():
            self._selected(Selection("noise", meter, None, Everything()))(ids.to(self.model.device), logits_to_keep=1)
        encoded = [p.index for p in self.stored.owners if p.storage.key is not None and p.latent is None]
        return {i: meter.found[i] for i in encoded}

    def _build(self, window: int) -> None:
        self._probe = Probe(window)
        self._probed = self._selected(Selection("probe", self._probe, None, Everything()))

    def _selected(self, selection: Selection) -> Any:
        from kvcompile.adapters.architectures import describe
        from kvcompile.build import build

        plan = self.plan or describe(self.model.config, str(self.model.dtype).removeprefix("torch."))
        return build(shared(self.model), plan.map(lambda p: replace(p, selection=selection)))


class Remembering(ModelCalibrator):
    """Reads a sample once, however many policies are calibrated on it."""

    def __init__(
        self, model: Any, tokenizer: Any, progress: Callable[[str, int, int], None], plan: Plan | None = None
    ) -> None:
        super().__init__(model, tokenizer, progress, plan)
        self._attention: dict[tuple[int, ...], list[Tensor]] = {}

    def attention(self, ids: Tensor, last: int) -> list[Tensor]:
        """As the calibrator gives it."""
        key = (*ids[0].tolist(), last)
        if key not in self._attention:
            self._attention[key] = super().attention(ids, last)
        return self._attention[key]
