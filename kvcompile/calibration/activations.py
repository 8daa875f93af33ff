"""What a model's layers compute on a piece of text: keys and values as cached, and the inputs of their attention."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvcompile.calibration.text import sentences
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan
from kvcompile.plan.selection import Score, Selection
from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class LayerKV:
    """Keys (after rotation) and values of one layer over one text, `[H_kv, n, D]`."""

    keys: Tensor
    values: Tensor

    @property
    def flat(self) -> Tensor:
        """All of it by token, `[n, 2 H_kv D]`."""
        return torch.cat([x.transpose(0, 1).flatten(1) for x in (self.keys, self.values)], 1)


def calibration_ids(tokenizer: Any, tokens: int, who: str) -> Tensor:
    """The first `tokens` tokens of the offline text, `[1, n]`. Raises KvcompileError without a tokenizer."""
    if tokenizer is None:
        raise KvcompileError(f"{who} needs a tokenizer to calibrate", "none", "pass tokenizer=")
    ids = tokenizer(" ".join(sentences()), return_tensors="pt", truncation=True, max_length=tokens)["input_ids"]
    return torch.as_tensor(ids, dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class Recorder(Score):
    """Records what is in the cache when a prompt ends, before a sliding layer lets go of it; keeps everything."""

    layers: dict[int, LayerKV] = field(default_factory=dict, compare=False)

    def score(self, seen: Observation) -> Tensor:
        """Zeros; keys and values go to `found[layer]`."""
        self.layers[seen.layer] = LayerKV(seen.keys.clone(), seen.values.clone())
        return torch.zeros(seen.keys.shape[:2], device=seen.keys.device, dtype=torch.float32)


@torch.no_grad()
def keys_values(model: Any, ids: Tensor, plan: Plan | None = None) -> list[LayerKV]:
    """Keys and values of every layer that caches some, of an uncompiled model over `ids [1, n]`, as its graph does.

    plan: that of its weights, where they were converted (None: as they are).
    """
    from kvcompile.adapters.architectures import describe
    from kvcompile.build import build
    from kvcompile.calibration.probe import Everything
    from kvcompile.models.sharing import shared

    recorder = Recorder()
    selection = Selection("recorder", recorder, None, Everything())
    plan = plan or describe(model.config, str(model.dtype).removeprefix("torch."))
    plan = plan.map(lambda p: replace(p, selection=selection), [p.index for p in plan.owners])
    build(shared(model), plan)(ids.to(model.device), logits_to_keep=1)
    return [recorder.layers[p.index] for p in plan.owners]


@torch.no_grad()
def attention_inputs(model: Any, ids: Tensor) -> list[Tensor]:
    """What every attention of an uncompiled model reads over `ids [1, n]`: normed hidden states, `[n, hidden]`."""
    from kvcompile.adapters.architectures import architecture_of

    inputs: list[Tensor] = []

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"])[0])

    attentions = architecture_of(model.config).attentions(model)
    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in attentions]
    try:
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs
