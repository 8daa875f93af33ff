"""Keys and values of a layer as one latent (MLA): which RoPE components stay, and how the rest is factorised.

Notation of one layer, everything per token: h its input, k_g = W_K h and v_g = W_V h of KV head g, q of a query head.
RoPE turns frequency f of every head by the same angle, so that complex mixtures of the heads' channels at one
frequency may be taken before it: y_f = V^H D k_f, with D the size of the queries that meet each head, and V the
eigenvectors of D E[k_f k_f^H] D. The components of largest energy keep their position (k_R); TransMLA's RoRoPE
(arXiv 2502.07864) is the real case of this with D = 1, MHA2MLA's choice per head (arXiv 2502.14837) that of V = 1.

The others lose their position: exp(-i theta distance) is replaced by its mean over what the layer attends to (`damp`).
They and the values, x = [k_N; v], share the latent c = U^T M x, the first d_c left singular vectors U of M x over
calibration text, and come back as M^-1 U c. M measures what an error does: sqrt of the second moment of the queries for
k_N, of W_O^T W_O for v, both as errors of the layer's output (a change of a logit moves it by about the spread of v).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompile.adapters.layout import Projection, Weights
from kvcompile.plan.plan import LayerPlan
from kvcompile.plan.structure import Latent
from kvcompile.structure.moments import Moments
from kvcompile.structure.precision import precise

FLOOR = 1e-6  # of a mean eigenvalue: directions that the text never shows keep this much weight


@dataclass(frozen=True)
class Factors:
    """The projections of one latent layer (see `kvcompile.adapters.latent.Latent`), float64.

    down `[d_R + d_c, hidden]`, its bias, absorb `[H_kv, d_R + d_c, D]`, up `[H_kv, D, d_c]`, and what is
    constant in the values, `[H_kv, D]` or None.
    """

    down: Tensor
    bias: Tensor | None
    absorb: Tensor
    up: Tensor
    constant: Tensor | None


@dataclass(frozen=True)
class Components:
    """Keys of all heads `[H_kv D]` in other coordinates: `y = into k`, `k = back y`, both `[N, N]`.

    pairs: rows (real, imaginary) of each RoPE component, `energy` and frequency of each; rest: rows without position.
    """

    into: Tensor
    back: Tensor
    pairs: list[tuple[int, int]]
    frequency: list[int]
    energy: list[float]
    rest: list[int]

    def best(self, pairs: int, turn: Tensor | None = None) -> tuple[int, ...]:
        """Frequencies, ascending, of the `pairs` components of most energy, the expected square of a logit.

        turn (of `Moments`): of those that lose most of it without position, energy (1 - |turn|^2).
        """
        lost = [1.0] * len(self.energy)
        if turn is not None:
            kept = (1 - turn.abs().square()).clamp(min=0).tolist()
            lost = [kept[f] for f in self.frequency]
        ranked = sorted(range(len(self.pairs)), key=lambda i: -self.energy[i] * lost[i])
        return tuple(sorted(self.frequency[i] for i in ranked[:pairs]))


def components(weights: Weights, p: LayerPlan, asking: Tensor, answering: Tensor, mix: bool) -> Components:
    """The RoPE components of a layer's keys, given the `Moments` of its inputs.

    mix: mixtures of heads (see above), or each head's own.
    """
    key, _ = weights.own
    heads, dim, half = key.weight.shape[0], p.head_dim, p.rotary // 2
    queries, keys = _queries(weights, asking), _extended(key)
    into, back = (torch.eye(heads * dim, dtype=torch.float64, device=keys.device) for _ in range(2))
    pairs, frequency, energy = [], [], []
    for f in range(half):
        at = [
            torch.arange(heads, dtype=torch.int64, device=keys.device) * dim + f + o for o in (0, half)
        ]  # rows of real and imaginary parts
        size = queries[:, f, f] + queries[:, f + half, f + half]
        size = (size + FLOOR * size.mean() + torch.finfo(torch.float64).tiny).sqrt()
        real, imaginary = keys.flatten(0, 1)[at[0]], keys.flatten(0, 1)[at[1]]
        rows = torch.complex(real, imaginary)
        scaled = size.unsqueeze(1) * (rows @ answering.to(rows.dtype) @ rows.mH) * size
        if mix:
            values, vectors = torch.linalg.eigh(scaled)
            values, vectors = values.flip(0), vectors.flip(1)
        else:
            values, order = scaled.diagonal().real.sort(descending=True)
            vectors = torch.eye(heads, dtype=rows.dtype, device=rows.device)[:, order]
        _place(into, vectors.mH * size, at)
        _place(back, vectors / size.unsqueeze(1), at)
        pairs += [(int(a), int(b)) for a, b in zip(*at, strict=True)]
        frequency += [f] * heads
        energy += values.clamp(min=0).tolist()
    turned = {i for pair in pairs for i in pair}
    return Components(into, back, pairs, frequency, energy, [i for i in range(heads * dim) if i not in turned])


def _place(matrix: Tensor, block: Tensor, at: Sequence[Tensor]) -> None:
    """Write the complex `block` as a real map of (real, imaginary) rows `at` to themselves."""
    real, imaginary = at
    matrix[real.unsqueeze(1), real] = matrix[imaginary.unsqueeze(1), imaginary] = block.real
    matrix[real.unsqueeze(1), imaginary] = -block.imag
    matrix[imaginary.unsqueeze(1), real] = block.imag


def chosen(parts: Components, frequencies: Sequence[int]) -> list[int]:
    """The components that a plan's frequencies name: of each frequency the first ones, as many as it comes."""
    wanted, taken = Counter(frequencies), []
    for i, f in enumerate(parts.frequency):
        if wanted[f] > 0:
            wanted[f] -= 1
            taken.append(i)
    return taken


@dataclass(frozen=True)
class Decomposition:
    """Singular vectors `[N, R]` and values `[R]` of M x, and what is needed to make `Factors` of them."""

    vectors: Tensor
    singular: Tensor
    metric: Tensor  # M [N, N]
    inverse: Tensor
    rows: Tensor  # x = rows h' [N, hidden + 1]
    mean: Tensor | None  # of x, [N]
    positioned: Tensor  # k_R = positioned h' [d_R, hidden + 1]
    back_positioned: Tensor  # of k_R to keys [H_kv, D, d_R]
    back_rest: Tensor  # of k_N to keys

    def rank(self, energy: float) -> int:
        """The fewest numbers that hold this share of the energy."""
        energies = self.singular.square().cumsum(0)
        return min(int((energies < energy * energies[-1]).sum()) + 1, len(energies))

    def factors(self, rank: int, biased: bool) -> Factors:
        """The projections of a latent of `rank` numbers. biased: keys or values have a bias."""
        heads, dim = self.back_rest.shape[:2]
        first = self.vectors[:, :rank]
        code, decode = first.T @ self.metric, self.inverse @ first
        down = torch.cat((self.positioned, code @ self.rows))
        rest = self.back_rest.shape[2]
        absorb = torch.cat((self.back_positioned, self.back_rest @ decode[:rest]), 2).mT
        up = torch.unflatten(decode[rest:], 0, (heads, dim))
        constant = None
        if self.mean is not None:
            lost = self.mean - decode @ (code @ self.mean)
            constant = lost[rest:].view(heads, dim)
        return Factors(down[:, :-1], down[:, -1] if biased else None, absorb, up, constant)


def decompose(
    weights: Weights, p: LayerPlan, how: Latent, seen: Moments | None, amplitude: float = 1.0
) -> Decomposition:
    """Factorise the keys without position and the values of one layer. seen: None where `how.factor` is `weights`.

    amplitude: by how much RoPE stretches what it turns (queries and keys each).
    """
    plain = how.factor == "weights"
    heads, dim, hidden = weights.own[0].weight.shape
    plainly = torch.eye(hidden + 1, dtype=torch.float64, device="cpu")
    asking, answering = (seen.asking, seen.answering) if seen is not None else (plainly, plainly)
    parts = components(weights, p, asking, answering, how.mix)
    taken = chosen(parts, how.frequencies)
    at = [parts.pairs[i][part] for part in (0, 1) for i in taken]
    left = [i for i in range(len(parts.pairs)) if i not in set(taken)]
    free = [parts.pairs[i][part] for part in (0, 1) for i in left]
    into = parts.into.clone()
    if free:
        turn = torch.ones(len(left), 1, dtype=torch.complex128, device=parts.into.device) * amplitude**2
        if how.damp and seen is not None:
            turn = turn * seen.turn[[parts.frequency[i] for i in left]].unsqueeze(1)
        real, imaginary = into[free[: len(left)]], into[free[len(left) :]]
        into[free[: len(left)]] = turn.real * real - turn.imag * imaginary
        into[free[len(left) :]] = turn.imag * real + turn.real * imaginary
    free = free + parts.rest
    keys, values = (_extended(part).flatten(0, 1) for part in weights.own)
    rows = torch.cat((into[free] @ keys, values))
    back = torch.unflatten(parts.back, 0, (heads, dim))
    spread = answering if seen is None or not how.centred else seen.covariance
    metric = torch.eye(len(rows), dtype=torch.float64, device=rows.device)
    if not plain:
        metric = _metric(weights, p, asking, spread, back[:, :, free])
    scaled = metric @ rows @ _root(spread)[0]
    u, s, _ = torch.linalg.svd(scaled, full_matrices=False)
    return Decomposition(
        u,
        s,
        metric,
        torch.linalg.inv(metric) if not plain else metric,
        rows,
        rows @ answering[-1] if how.centred and not plain else None,
        into[at] @ keys,
        back[:, :, at],
        back[:, :, free],
    )


def _metric(weights: Weights, p: LayerPlan, asking: Tensor, spread: Tensor, back: Tensor) -> Tensor:
    """M `[N, N]`: |M e|^2 is the expected square of the change of the layer's output by errors e of [k_N; v].

    A logit that is off by d moves a head's output by d (v - o), of the size of the values' spread.
    """
    heads, dim, rest = back.shape
    group = weights.query.weight.shape[0] // heads
    out = torch.unflatten(precise(weights.out).cpu().movedim(1, 0), 0, (heads, group))  # [H_kv, g, hidden, D]
    felt = (out.mT @ out).sum(1)  # [H_kv, D, D]
    values = _extended(weights.own[1])
    size = (felt * (values @ spread @ values.mT)).sum((1, 2)) / group  # [H_kv]: E |W_O (v - mean)|^2 per query head
    query_moments = _queries(weights, asking) * size.view(-1, 1, 1) * p.scale**2
    metric = torch.zeros(rest + heads * dim, rest + heads * dim, dtype=torch.float64, device=felt.device)
    metric[:rest, :rest] = _root((back.mT @ query_moments @ back).sum(0))[0]
    for h in range(heads):
        at = slice(rest + h * dim, rest + (h + 1) * dim)
        metric[at, at] = _root(felt[h])[0]
    return metric


def _root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and its inverse, eigenvalues at or above `FLOOR` times their mean."""
    values, vectors = torch.linalg.eigh((x + x.T) / 2)
    root = values.clamp(min=FLOOR * float(values.mean().clamp(min=torch.finfo(torch.float64).tiny))).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _queries(weights: Weights, asking: Tensor) -> Tensor:
    """Second moment of the queries before rotation, summed over the group of each KV head, `[H_kv, D, D]`."""
    rows = _extended(weights.query)
    per_head = rows @ asking @ rows.mT
    return torch.unflatten(per_head, 0, (len(weights.own[0].weight), -1)).sum(1)


def _extended(part: Projection) -> Tensor:
    """`[H, D, hidden + 1]`: rows with their bias as the last column."""
    weight = precise(part.weight).cpu()
    bias = weight.new_zeros(weight.shape[:2]) if part.bias is None else precise(part.bias).cpu()
    return torch.cat((weight, bias.unsqueeze(-1)), -1)
