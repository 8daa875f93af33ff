"""Tokens to score, what each entry must be worth by a loop in float64, and a check of a scorer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompile.kernels.reference.ghost import GhostSpec, Reread, Scorer, spec_of
from kvcompile.plan.ghost import GhostRule

RULE = GhostRule(8, 2, 0.3, None, 4)
SPECS = [
    GhostSpec(RULE, 3, 16, 16, "float32"),
    GhostSpec(replace(RULE, chunk=0, band=0), 3, 16, 16, "float32", sink=True),
    GhostSpec(replace(RULE, chunk=0), 1, 80, 80, "float32"),
    GhostSpec(replace(RULE, chunk=13, band=0), 8, 96, 40, "float32"),
    GhostSpec(replace(RULE, chunk=64, band=5), 2, 64, 64, "bfloat16"),
    GhostSpec(replace(RULE, chunk=40, band=8, scale=0.05, softcap=1.5), 5, 128, 128, "float16", sink=True),
    GhostSpec(replace(RULE, chunk=256, band=8, scale=0.02), 7, 256, 33, "bfloat16"),
    GhostSpec(replace(RULE, own_from=0), 4, 17, 5, "float32"),
]
PLACES = [(2, 0, 4), (1, 5, 4), (21, 0, 4), (30, 3, 4), (37, 238, 4), (16, 8, 0), (9, 100, 1)]  # tokens, start, sinks


@dataclass(frozen=True)
class Case:
    """One call of a scorer."""

    queries: Tensor
    ghosts: Tensor
    keys: Tensor
    values: Tensor
    sinks: tuple[Tensor, Tensor]
    rule: GhostRule
    start: int
    learned: Tensor | None

    def by(self, scorer: Scorer) -> Tensor:
        """What a scorer says."""
        return scorer(self.text, self.rule)

    def passed(self, scorer: Scorer, begin: int, end: int) -> Tensor:
        """What it says of some of the tokens, in a pass of their own."""
        q, ghosts, k, v = self.queries, self.ghosts, self.keys, self.values
        some = slice(begin, end)
        tokens = q[:, :, some], ghosts[:, :, some], k[:, some], v[:, some]
        return scorer(Reread(*tokens, self.sinks, self.start + begin, self.learned), self.rule)

    @property
    def text(self) -> Reread:
        """As a scorer takes it."""
        tokens = self.queries, self.ghosts, self.keys, self.values
        return Reread(*tokens, self.sinks, self.start, self.learned)

    @property
    def spec(self) -> GhostSpec:
        """What kernel it needs."""
        return spec_of(self.text, self.rule)

    def double(self) -> Case:
        """The same in float64."""
        tensors = {name: getattr(self, name).double() for name in ("queries", "ghosts", "keys", "values")}
        keys, values = self.sinks
        return replace(self, sinks=(keys.double(), values.double()), **tensors)


def case(spec: GhostSpec, tokens: int = 21, start: int = 0, sinks: int = 4, heads: int = 2, seed: int = 0) -> Case:
    """Random tokens, at the beginning of a text those of its sinks; memory between the rows and behind is NaN.

    Some entries stand out, so that p comes near 1.
    """
    torch.manual_seed(seed)
    sinks = min(sinks, start + tokens)
    dtype = getattr(torch, spec.dtype)

    def rows(*shape: int) -> Tensor:
        room = torch.full((*shape[:-2], shape[-2] + 3, shape[-1] + 5), torch.nan).to(dtype)
        room[..., : shape[-2], : shape[-1]] = torch.randn(*shape).to(dtype)
        return room[..., : shape[-2], : shape[-1]]

    queries, ghosts = (rows(heads, spec.group, tokens, spec.head_dim) for _ in range(2))
    keys, values = rows(heads, tokens, spec.head_dim), rows(heads, tokens, spec.value_dim)
    ghosts[:, :, 2::5] += 5 / (spec.rule.scale * spec.head_dim) * keys[:, 2::5].unsqueeze(1)
    firsts = [rows(heads, sinks, dim) for dim in (spec.head_dim, spec.value_dim)]
    for first, own in zip(firsts, (keys, values), strict=True):
        first[:, start:] = own[:, : max(0, sinks - start)]
    learned = torch.randn(heads, spec.group) if spec.sink else None
    return Case(queries, ghosts, keys, values, (firsts[0], firsts[1]), spec.rule, start, learned)


def expected(c: Case) -> Tensor:
    """Scores `[H_kv, W]` in float64, entry by entry, by true positions."""
    rule, d = c.rule, c.double()
    heads, tokens, _ = c.keys.shape
    scores = torch.zeros(heads, tokens, dtype=torch.float64)

    def weight(q: Tensor, k: Tensor) -> float:
        x = float(q @ k) * rule.scale
        return math.exp(rule.softcap * math.tanh(x / rule.softcap) if rule.softcap else x)

    for h in range(heads):
        entries = {i: (d.sinks[0][h, i], d.sinks[1][h, i]) for i in range(d.sinks[0].shape[1])}
        entries |= {c.start + j: (d.keys[h, j], d.values[h, j]) for j in range(tokens)}
        for t in range(c.start, c.start + tokens):
            chunk = [
                j for j in range(c.start, c.start + tokens) if not rule.chunk or j // rule.chunk == t // rule.chunk
            ]
            seen = {*range(d.sinks[0].shape[1]), *chunk}
            for g in range(c.queries.shape[1]):
                again = {j: weight(d.ghosts[h, g, t - c.start], entries[j][0]) for j in seen}
                own = {j: weight(d.queries[h, g, t - c.start], entries[j][0]) for j in chunk if rule.own_from <= j <= t}
                total = sum(again.values()) + sum(own.values())
                total += 0.0 if c.learned is None else math.exp(float(c.learned[h, g]))
                out = sum(
                    (w / total * entries[j][1] for part in (again, own) for j, w in part.items()), torch.zeros(())
                )
                for j in chunk:
                    if not rule.band or abs(t - j) <= rule.band:
                        p = again[j] / total
                        change = (p / max(1 - p, 1e-6)) ** 2 * (entries[j][1] - out).square().sum()
                        scores[h, j - c.start] += change
    return scores


def check(scorer: Scorer, c: Case, relative: float = 2e-4) -> None:
    """Every score is what it must be, up to rounding: of 1 - p, where p is near 1, little is left."""
    got, want = c.by(scorer), expected(c)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), want, rtol=relative, atol=1e-9)
