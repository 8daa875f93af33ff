"""From the weights of a model to those of its converted self: fewer KV heads, fewer layers with keys and values.

New modules stand under the names of the old ones; no tensor is written in place, so that whoever shares the old ones
(the original model, kept for comparison) is not disturbed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from kvcompile.adapters.architecture import Architecture
from kvcompile.adapters.architectures import architecture_of
from kvcompile.adapters.layout import Weights
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import LayerPlan, Plan, converts, reprojects
from kvcompile.structure.absorb import factorise, modules_of
from kvcompile.structure.blocks import add_blocks
from kvcompile.structure.center import hollow_centers
from kvcompile.structure.heads import fold_layers, merge_heads
from kvcompile.structure.latent import Factors

Turns = dict[int, tuple[Tensor | None, Tensor | None]]  # layer -> rotations of its keys and values, `[H_kv, D, D]`


def convert(model: Any, plan: Plan, text: Tensor | None = None) -> None:
    """Give an uncompiled `model` the weights and the config of `plan`, in place: all layers or, if one fails, none.

    text: token ids `[1, n]`, wanted where heads are aligned.
    Raises KvcompileError for weights that are not in memory, tied to others or not plain, and without such a text.
    """
    require_convertible(model, plan)
    if not converts(plan):
        return
    architecture = architecture_of(model.config)
    turns, factors = _turns(architecture, model, plan, text), factorise(architecture, model, plan, text)
    if plan.blocks is not None:
        add_blocks(model, plan.blocks)
    if reprojects(plan):
        _rewrite(architecture, model, plan, turns, factors)


def require_convertible(model: Any, plan: Plan) -> None:
    """Raise KvcompileError for weights that a plan asks to edit and that cannot be: absent, tied, or not plain."""
    from kvcompile.models.loading import require_weights

    edits = reprojects(plan) or any(p.storage.rotated for p in plan.layers)
    if not edits and plan.blocks is None:
        return
    require_weights(model)
    if not edits:
        return
    architecture = architecture_of(model.config)
    if reprojects(plan):
        _require_untied(architecture, model)
    for layout in architecture.layouts(model, plan):
        layout.read()


def reshape(model: Any, plan: Plan) -> None:
    """As `convert`, of a model without weights (on the meta device): modules for converted weights to come."""
    if plan.blocks is not None:
        add_blocks(model, plan.blocks)
    if reprojects(plan):
        _rewrite(architecture_of(model.config), model, plan, {}, {})
    hollow_centers(model, plan)


def _rewrite(architecture: Architecture, model: Any, plan: Plan, turns: Turns, factors: dict[int, Factors]) -> None:
    kv_heads = {p.kv_heads if p.latent is None else p.dense_heads for p in plan.layers}
    if len(kv_heads) > 1:
        raise KvcompileError("all layers must have the same number of KV heads", sorted(kv_heads))
    layouts = architecture.layouts(model, plan)
    weights = [_merged(layout.read(), p, turns) for layout, p in zip(layouts, plan.layers, strict=True)]
    modules: list[dict[str, Any]] = []
    for layout, p in zip(layouts, plan.layers, strict=True):
        own = weights[p.index]
        if p.latent is not None:
            modules.append(modules_of(layout, own, p, factors.get(p.index)))
            continue
        if p.owner != p.index:
            own = Weights(own.query, None, None, own.out, sinks=own.sinks)
        readers = [weights[q.index] for q in plan.layers if q.owner == p.index]
        own = fold_layers(readers, p.fold) if p.owner == p.index else own
        modules.append({**layout.write(own), **layout.learned(own)})
    for layout, new in zip(layouts, modules, strict=True):
        for name, module in new.items():
            setattr(layout.attention, name, module)
    model.config.num_key_value_heads = kv_heads.pop()


def _merged(weights: Weights, p: LayerPlan, turns: Turns) -> Weights:
    return weights if p.heads is None else merge_heads(weights, p.heads, *turns.get(p.index, (None, None)))


def _require_untied(architecture: Architecture, model: Any) -> None:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for index, attention in enumerate(architecture.attentions(model)):
        for name, parameter in attention.named_parameters():
            if uses[id(parameter)] > 1:
                raise KvcompileError(
                    "projections that are converted must have weights of their own",
                    f"layer {index}: {name} is tied to another",
                    "untie it: give one of the two a copy",
                )


@torch.no_grad()
def _turns(architecture: Architecture, model: Any, plan: Plan, text: Tensor | None) -> Turns:
    from kvcompile.calibration.activations import keys_values
    from kvcompile.structure.grouping import alignment

    wanted = {p.index: p.heads for p in plan.layers if p.heads is not None and p.heads.align != "none"}
    if not wanted:
        return {}
    if text is None:
        raise KvcompileError("heads are aligned on text", "no tokenizer to read it", "pass tokenizer=, or align=none")
    turns: Turns = {}
    seen = keys_values(model, text)
    for index, heads in wanted.items():
        if heads.merge == "first":  # nothing is averaged
            continue
        keys = None
        if heads.align == "both":
            cos, _ = architecture.rotary(model, index)(torch.zeros(1, dtype=torch.long, device=model.device))
            turning = cos.shape[-1] if plan.layers[index].rotates else 0
            keys = alignment(seen[index].keys, heads.groups, turning)
        turns[index] = keys, alignment(seen[index].values, heads.groups, 0)
    return turns
