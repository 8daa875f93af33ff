"""Rotary positions of entries that moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompile.stores.encoded.hadamard import turn_basis

if TYPE_CHECKING:
    from kvcompile.plan.plan import LayerPlan
    from kvcompile.recall.index import Index
    from kvcompile.runtime.cache import Rotary, Step
    from kvcompile.runtime.layer import LayerCache


def _rotation(cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    """The matrix `[D, D]` that turns row vectors by `cos, sin [D_rot]` (half-split); channels past `D_rot` stay."""
    half = cos.shape[0] // 2
    out = torch.eye(dim, device=cos.device, dtype=torch.float32)
    out[: 2 * half, : 2 * half] = torch.diag(cos)
    out[half : 2 * half, :half] -= torch.diag(sin[:half])
    out[:half, half : 2 * half] += torch.diag(sin[half:])
    return out


def averaged_turn(rotary: Rotary, start: int, dim: int, device: torch.device, horizon: int) -> Tensor:
    """The rotation of row vectors averaged over the `horizon` positions from `start` on, `[D, D]`, float32."""
    at = torch.arange(start, start + horizon, device=device, dtype=torch.int64)
    cos, sin = (x.float().mean(0) for x in rotary(at))
    return _rotation(cos, sin, dim)


def turn_by(rotary: Rotary, dim: int, device: torch.device, shift: int) -> Tensor:
    """The rotation of row vectors by `shift` positions, `[D, D]`, float32; an amplitude in the rotary table cancels."""
    origin, there = (torch.tensor([at], device=device, dtype=torch.int64) for at in (0, shift))
    cos, sin = angle(origin, there, rotary)
    return _rotation(cos[0], sin[0], dim)


def mean_rotation(step: Step, plan: LayerPlan, sequence: int, horizon: int) -> Tensor:
    """The rotation of row vectors averaged over the next `horizon` positions of a sequence, `[D, D]`, float32.

    q R = q cos + rotate_half(q) sin; in the Hadamard basis R H.
    """
    next_position = step.cache.seen[sequence] - (int(step.shift[sequence]) if step.shift is not None else 0)
    rotary, device = _rotary(step, plan), step.positions.device
    if rotary is None:
        turn = torch.eye(plan.key_dim, device=device, dtype=torch.float32)
    else:
        key = (rotary, next_position, horizon, plan.key_dim)
        if key not in step.shared:
            step.shared[key] = averaged_turn(rotary, next_position, plan.key_dim, device, horizon)
        turn = step.shared[key]
    return turn_basis(turn) if plan.storage.rotated else turn


def rotation(step: Step, plan: LayerPlan, shift: int) -> Tensor:
    """The rotation of row vectors by `shift` positions, `[D, D]`, float32; an amplitude in the rotary table cancels.

    In the Hadamard basis H R H.
    """
    rotary, device = _rotary(step, plan), step.positions.device
    if rotary is None:
        return torch.eye(plan.key_dim, device=device, dtype=torch.float32)
    key = ("rotation", rotary, shift, plan.key_dim, plan.storage.rotated)
    if key not in step.shared:
        turn = turn_by(rotary, plan.key_dim, device, shift)
        step.shared[key] = turn_basis(turn_basis(turn.mT).mT) if plan.storage.rotated else turn
    turned: Tensor = step.shared[key]
    return turned


def _rotary(step: Step, plan: LayerPlan) -> Rotary | None:
    return step.cache.rotaries[plan.index] if step.cache.rotaries else None


def _close_ranks(step: Step, index: int, kv: LayerCache, indices: list[Tensor]) -> None:
    """Rotate kept keys to positions 0..n-1 (StreamingLLM: position inside the cache); new tokens follow on.

    Between two evictions entry j of a row sits at rotary position j, so entry `indices[i]` turns by `i - indices[i]`.
    """
    cache = step.cache
    turned_keys = [
        turn(
            keys,
            index_row,
            torch.arange(index_row.numel(), device=keys.device, dtype=torch.int64),
            cache.rotaries[index],
        )
        for (keys, _, _), index_row in zip(kv.held.rows(), indices, strict=True)
    ]
    kv.rewrite({row: (0, keys) for row, keys in enumerate(turned_keys)})
    per_sequence = kv.held.lengths[:: kv.held.heads]
    shift = [seen - n for seen, n in zip(cache.seen, per_sequence, strict=True)]
    cache.shift = torch.tensor(shift, device=indices[0].device, dtype=torch.int64)


def move_up(step: Step, kv: LayerCache, index: Index, due: dict[int, list[int]]) -> None:
    """Turn the keys of entries that go into groups to rotary position 0, and those behind them up to the sinks.

    Every entry of a group then lies at one distance from a query, however far away it is, and rotary positions lie as
    far behind true ones as a sequence has entries in groups. InfLLM, arXiv 2402.04617, section 3.2: "all tokens beyond
    the window at the same distance".

    index: the groups so far. due: rows of which the next entries go into groups, by how many these are; all rows of a
    sequence are alike.
    """
    store, rotary = kv.held, step.cache.rotaries[kv.plan.index]
    device, heads, lengths, covered = step.positions.device, store.heads, store.lengths, list(index.covered)
    stretches: dict[int, tuple[int, Tensor]] = {}
    for count, rows in due.items():
        for row in rows:
            begin, end = index.first + index.covered[row], lengths[row]
            # the heads of a sequence and the layers of a model turn alike
            key = ("move up", rotary, row // heads)
            if key not in step.shared:
                old = torch.arange(index.first, index.first + end - begin, dtype=torch.int64, device=device)
                new = torch.cat((torch.zeros_like(old[:count]), old[count:] - count))
                step.shared[key] = torch.stack(angle(old, new, rotary))
            keys = store.stretch(row, begin, end).to(device)
            stretches[row] = begin, turned(keys, *step.shared[key]).to(store.device)
            covered[row] += count
    kv.rewrite(stretches)
    step.cache.shift = torch.tensor(covered[::heads], dtype=torch.int64, device=device)


def level(queries: Tensor, step: Step, layer: int) -> Tensor:
    """Queries `[B, H_q, Q, D]` turned to the rotary position of the newest one of their sequence.

    Their mean is then one of what they look for, not of the angles at which they stand.
    """
    rotary, key = step.cache.rotaries[layer], ("level", step.cache.rotaries[layer])
    if key not in step.shared:
        old = step.positions if step.shift is None else step.positions - step.shift.unsqueeze(1)
        new = old.amax(1, keepdim=True).expand_as(old)
        step.shared[key] = torch.stack([torch.stack(angle(*of, rotary)) for of in zip(old, new, strict=True)], 1)
    cos, sin = step.shared[key]
    return turned(queries, cos.unsqueeze(1), sin.unsqueeze(1))


def turn(keys: Tensor, old: Tensor, new: Tensor, rotary: Rotary) -> Tensor:
    """Rotated keys `[..., n, D]` moved from positions `old [n]` to `new [n]`, angles in float32.

    k' = k cos(d) + rotate_half(k) sin(d), d = (new - old) theta.
    """
    return turned(keys, *angle(old, new, rotary))


def angle(old: Tensor, new: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """cos and sin `[n, D_rot]` of (new - old) theta, float32; an amplitude in the rotary table cancels."""
    (cos_o, sin_o), (cos_n, sin_n) = ((x.float() for x in rotary(p)) for p in (old, new))
    amplitude = cos_o.square() + sin_o.square()
    return (cos_n * cos_o + sin_n * sin_o) / amplitude, (sin_n * cos_o - cos_n * sin_o) / amplitude


def turned(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated keys `[..., n, D]`, turned by `cos, sin [..., n, D_rot]`."""
    width = cos.shape[-1]
    first, second = keys[..., :width].float().chunk(2, -1)
    moved = keys[..., :width].float() * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((moved.to(keys.dtype), keys[..., width:]), -1)
