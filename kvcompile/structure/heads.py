"""Fewer KV heads: query heads regrouped, keys and values of a group merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.adapters.layout import Projection, Weights
from kvcompile.plan.structure import Fold, Heads, Merge
from kvcompile.structure.precision import precise


def merge_heads(
    old: Weights, how: Heads, turn_keys: Tensor | None = None, turn_values: Tensor | None = None
) -> Weights:
    """One layer with `len(how.groups)` KV heads in place of `how.original`.

    W'_K[n] = mean_{h in groups[n]} R_h W_K[h] (or the group's first head), values and biases alike; the query heads of
    h become R_h W_Q, the columns of W_O for them W_O R_h^T. Without rotations R = 1. Rotations `[H_kv, D, D]`.
    Means are taken in float64, so that equal heads merge to the bit. Source: GQA, arXiv 2305.13245, section 2.1.
    """
    heads, per_head = old.query.weight.shape[0], old.query.weight.shape[0] // how.original
    (key, value), query, out, sinks = old.own, old.query, old.out, old.sinks
    if turn_keys is not None:
        key, query = key.turn(turn_keys), query.turn(turn_keys.repeat_interleave(per_head, 0))
    if turn_values is not None:
        value = value.turn(turn_values)
        columns = out.movedim(1, 0).to(turn_values) @ turn_values.repeat_interleave(per_head, 0).transpose(1, 2)
        out = columns.movedim(0, 1).to(out)
    if how.permutes:
        order = (
            torch.arange(heads, dtype=torch.int64, device="cpu")
            .view(how.original, per_head)[[h for group in how.groups for h in group]]
            .flatten()
        )
        query, out = query.map(lambda x: x[order.to(x.device)]), out[:, order.to(out.device)]
        sinks = None if sinks is None else sinks[order.to(sinks.device)]
    key, value = (part.map(lambda x: _merged(x, how.groups, how.merge)) for part in (key, value))
    return Weights(query, key, value, out, old.head_norm, sinks)


def _merged(rows: Tensor, groups: Sequence[Sequence[int]], how: Merge) -> Tensor:
    if how == "first":
        return rows[[group[0] for group in groups]]
    order = [h for group in groups for h in group]
    return torch.unflatten(precise(rows[order]), 0, (len(groups), -1)).mean(1).to(rows)


def fold_layers(layers: Sequence[Weights], how: Fold) -> Weights:
    """The owner (first of `layers`) with what its readers' keys and values were folded in.

    owner: nothing; mean: W = mean_l W_l; successive: W <- (W + W_l) / 2 for each reader in turn, so that the last one
    weighs most (the reference code of MLKV, arXiv 2406.09297). Queries and the output stay the owner's.
    """
    owner = layers[0]
    if how == "owner" or len(layers) == 1:
        return owner

    def folded(tensors: Sequence[Tensor]) -> Tensor:
        wide = [precise(x) for x in tensors]
        total = wide[0]
        for x in wide[1:]:
            total = (total + x) / 2 if how == "successive" else total + x
        return (total if how == "successive" else total / len(wide)).to(tensors[0])

    def fold(parts: Sequence[Projection | None]) -> Projection:
        rows = [part for part in parts if part is not None]

        def over(tensors: Sequence[Tensor | None]) -> Tensor | None:
            there = [x for x in tensors if x is not None]
            return folded(there) if there else None

        weight = folded([part.weight for part in rows])
        return Projection(weight, over([part.bias for part in rows]), over([part.norm for part in rows]))

    norms = [w.head_norm for w in layers if w.head_norm is not None]
    keys, values = fold([w.key for w in layers]), fold([w.value for w in layers])
    return Weights(owner.query, keys, values, owner.out, folded(norms) if norms else None, owner.sinks)
