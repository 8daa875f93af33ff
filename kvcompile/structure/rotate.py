"""Values in the Hadamard basis for free: the rotation goes into the weights before and after the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvcompile.adapters.architectures import architecture_of
from kvcompile.adapters.layout import Layout, linear_like, plain
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.stores.encoded.hadamard import matrix


@torch.no_grad()
def fold_rotation(model: Any, plan: Plan) -> None:
    """Let rotated layers of an uncompiled `model` write v H and read it back, in place: all or, if one fails, none.

    (a V) W_o = (a V H) (H W_o): H goes into the rows of each value head and, transposed, into the columns of each
    query head of the output, in float64 and rounded once. New modules; no tensor is written in place.
    Raises KvcompileError for projections that are no plain Linear, or not in memory.
    """
    from kvcompile.models.loading import require_weights

    if not any(p.storage.rotated for p in plan.layers):
        return
    require_weights(model)
    folded: list[tuple[nn.Module, dict[str, nn.Module]]] = []
    layouts = architecture_of(model.config).layouts(model, plan, converted=True)
    for layout, p in zip(layouts, plan.layers, strict=True):
        if plan.layers[p.owner].storage.rotated:
            folded.append((layout.attention, _folded(layout, p)))
    for attention, modules in folded:
        for name, module in modules.items():
            setattr(attention, name, module)


def _folded(layout: Layout, p: LayerPlan) -> dict[str, nn.Module]:
    turn = matrix(p.head_dim)
    out = plain(layout.attention, layout.out)
    columns = torch.unflatten(out.weight.detach(), 1, (-1, p.head_dim))
    turned = (columns.to(turn) @ turn).to(columns).flatten(1)
    modules: dict[str, nn.Module] = {layout.out: linear_like(out, turned, out.bias)}
    if p.owner != p.index:
        return modules
    weights = layout.read()
    if weights.value is not None:
        weights.value = weights.value.turn(turn)
    return {**layout.write(weights), **modules}
