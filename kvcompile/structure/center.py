"""The mean keys of the layers that store theirs centred."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcompile.adapters.architectures import architecture_of
from kvcompile.adapters.center import Center
from kvcompile.plan.plan import Plan, centred
from kvcompile.plan.storage import PLAIN, SINKS


@torch.no_grad()
def center_keys(model: Any, plan: Plan, tokenizer: Any) -> None:
    """Give the layers of an uncompiled `model` that are to be centred their mean key, in place.

    m[h] = mean over j >= 4 of k[h, j], keys after position embedding over the first tokens of the offline text.
    Raises KvcompileError without a tokenizer to read it.
    """
    from kvcompile.calibration.activations import calibration_ids, keys_values
    from kvcompile.models.loading import require_weights

    if not centred(plan):
        return
    require_weights(model)
    ids = calibration_ids(tokenizer, centred(plan), "center")
    plain = plan.map(lambda p: replace(p, selection=None, recall=None, storage=PLAIN))
    seen = keys_values(model, ids, replace(plain, prefill_chunk=0))
    means = [layer.keys[:, SINKS:].float().mean(1).to(layer.keys.dtype) for layer in seen]
    _put(model, plan, dict(zip((p.index for p in plan.owners), means, strict=True)))


def hollow_centers(model: Any, plan: Plan) -> None:
    """As `center_keys`, of a model without weights (on the meta device): modules for means to come."""
    sizes = {p.index: (p.kv_heads, p.head_dim) for p in plan.owners}
    _put(model, plan, {i: torch.empty(size, dtype=model.dtype, device="meta") for i, size in sizes.items()})


def _put(model: Any, plan: Plan, means: dict[int, Tensor]) -> None:
    attentions = architecture_of(model.config).attentions(model)
    for attention, p in zip(attentions, plan.layers, strict=True):
        if p.storage.centred:
            attention.center = Center(means[p.index])
