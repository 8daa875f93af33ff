"""Which layers share a cache, by what they compute on text: both the most and the least similar ones are tried."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from kvcompile.calibration.activations import attention_inputs, keys_values
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan
from kvcompile.plan.structure import Fold
from kvcompile.structure.precision import precise

By = Literal["kv", "activations"]


def best_pattern(model: Any, ids: Tensor, factor: int, by: By, fold: Fold) -> list[int]:
    """Owner of each layer: of the two patterns (similar and dissimilar layers first) the one that hurts less.

    Hurt is the mean KL divergence of the next token from the original model's over `ids [1, n]`.
    Raises KvcompileError for a model in which no two layers may share.
    """
    from kvcompile.adapters.architectures import describe

    plan = describe(model.config, str(model.dtype).removeprefix("torch."))
    alike = layer_similarity(model, ids, by)
    patterns = [matched(plan, table, factor) for table in (alike, -alike)]
    if all(owner == i for i, owner in enumerate(patterns[0])):
        raise KvcompileError(
            "stack.cla: two layers must be alike in window and positions to share", plan.architecture, "use gqa or mqa"
        )
    return min(patterns, key=lambda owners: divergence(model, ids, with_owners(plan, owners, fold)))


def layer_similarity(model: Any, ids: Tensor, by: By) -> Tensor:
    """Mean cosine, over tokens, of two layers' keys and values, or of what their attention reads; `[L, L]`."""
    seen = [kv.flat for kv in keys_values(model, ids)] if by == "kv" else attention_inputs(model, ids)
    units = torch.stack([torch.nn.functional.normalize(precise(x), dim=-1).flatten() for x in seen])
    return units @ units.T / seen[0].shape[0]


def matched(plan: Plan, table: Tensor, factor: int) -> list[int]:
    """Owners by greedy choice: the groups of the layers with the highest `table[i, j]` join; the earliest layer owns.

    As many layers lose their cache as in neighbouring groups of `factor`; groups grow beyond `factor` layers only if
    that number is not reached otherwise. Only layers of one kind (window, positions) join.
    """
    number = len(plan.layers)
    kinds = [(p.sliding_window, p.rotates) for p in plan.layers]
    owners, readers = list(range(number)), number - -(-number // factor)
    pairs = [(float(table[i, j]), i, j) for i in range(number) for j in range(i + 1, number) if kinds[i] == kinds[j]]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    for largest in (factor, number):
        for _, i, j in pairs:
            one, other = sorted((owners[i], owners[j]))
            if readers and one != other and owners.count(one) + owners.count(other) <= largest:
                owners, readers = [one if o == other else o for o in owners], readers - 1
    return owners


def with_owners(plan: Plan, owners: list[int], fold: Fold) -> Plan:
    """The plan with these owners."""
    read = {o for i, o in enumerate(owners) if o != i}
    return plan.map(lambda p: replace(p, owner=owners[p.index], fold=fold if p.index in read else "owner"))


@torch.no_grad()
def divergence(model: Any, ids: Tensor, plan: Plan) -> float:
    """KL(original || converted) of the next token, mean over `ids [1, n]`, in nats."""
    from kvcompile.build import build
    from kvcompile.models.sharing import shared
    from kvcompile.structure.convert import convert

    ids, copy = ids.to(model.device), shared(model)
    convert(copy, plan)
    before = model(ids, use_cache=False).logits.float().log_softmax(-1)
    after = build(copy, plan)(ids).logits.float().log_softmax(-1)
    return float(torch.nn.functional.kl_div(after, before, log_target=True, reduction="none").sum(-1).mean())
