"""Groups to choose among, what must be chosen by a loop over them in float64, and a check of a chooser."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.choose import Chooser, ChooseSpec, EntryTable, GroupTable, Places, spec_of

SPECS = [
    ChooseSpec(form, agree, group, dim, dtype, together)
    for form in ("vector", "bounds")
    for agree, group, dim, dtype, together in (
        ("mean", 1, 64, "float32", 1),
        ("mean", 3, 20, "float32", 2),
        ("max", 3, 64, "float32", 2),
        ("mean", 4, 128, "bfloat16", 1),
        ("max", 8, 80, "bfloat16", 1),
        ("max", 4, 16, "float16", 4),
    )
]


@dataclass(frozen=True)
class Case:
    """One call of a chooser."""

    queries: Tensor
    table: GroupTable
    wanted: list[int]
    lengths: list[int]
    spec: ChooseSpec
    places: Places | None

    def by(self, choose: Chooser) -> EntryTable:
        """What a chooser says."""
        spec = self.spec
        groups = self.queries, self.table, self.wanted, self.lengths
        return choose(*groups, spec.agree, spec.together, self.places)

    def slot(self, row: int, entry: int) -> int:
        """Where an entry lies."""
        assert self.places is not None
        rows, page = self.places.rows.tolist(), self.places.page
        return rows[row][entry // page] * page + entry % page if page else rows[row] + entry

    def scores(self, row: int) -> list[float]:
        """What the queries of a row (and of those it chooses with) want of each group, in float64."""
        first = row // self.spec.together * self.spec.together
        total = torch.zeros(self.table.sizes.shape[1], dtype=torch.float64)
        for r in range(first, first + self.spec.together):
            x, q = self.table.representatives[r].double(), self.queries[r].double().unsqueeze(1)
            by_query = (q * x).sum(-1) if x.dim() == 2 else torch.maximum(q * x[:, 0], q * x[:, 1]).sum(-1)
            total += by_query.sum(0) if self.spec.agree == "mean" else by_query.amax(0)
        return total.tolist()

    def expected(self, row: int) -> list[int]:
        """The entries of a row, by sorting its groups."""
        sizes, starts = self.table.sizes[row].tolist(), self.table.starts[row].tolist()
        scored, left = self.scores(row), self.wanted[row]
        found = list(range(min(self.table.first, self.lengths[row])))
        for g in sorted((g for g, size in enumerate(sizes) if size), key=lambda g: (-scored[g], g)):
            taken = min(left, sizes[g])
            found += range(starts[g], starts[g] + taken)
            left -= taken
        return sorted([*found, *range(self.table.ends[row], self.lengths[row])])


def case(spec: ChooseSpec, seed: int, most: int = 40, whole: bool = True) -> Case:
    """Rows with different numbers of groups, some with none and shorter than the sinks, and NaN in all other room.

    whole: small whole numbers, whose products are exact: many groups score alike. Else normal ones.
    """
    rng, made = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, room, first = 4 * spec.together, most + rng.randrange(5), rng.randrange(6)
    shape = (rows, room, *((2,) if spec.form == "bounds" else ()), spec.head_dim)
    dtype: Any = getattr(torch, spec.dtype)

    def numbers(*size: int) -> Tensor:
        if whole:
            return torch.randint(-2, 3, size, generator=made).to(dtype)
        return torch.randn(size, generator=made).to(dtype)

    representatives, sizes = numbers(*shape), torch.zeros(rows, room, dtype=torch.int32)
    if spec.form == "bounds":
        representatives = representatives.sort(2).values
    wanted, lengths, ends = [], [], []
    for r in range(rows):
        if r % spec.together == 0:
            count = rng.choice([0, 1, most // 2, most])
            one = torch.tensor([rng.randrange(1, 9) for _ in range(count)], dtype=torch.int32)
            budget = rng.choice([int(one.sum()), rng.randint(0, int(one.sum()))])
        sizes[r, :count] = one
        representatives[r, count:] = float("nan")
        wanted.append(budget)
        ends.append(first + int(one.sum()))
        lengths.append(ends[-1] + rng.randrange(7) if count else rng.randint(1, first + 3))
    starts = first + sizes.cumsum(1, dtype=torch.int32) - sizes
    starts[sizes == 0] = -(2**30)
    table = GroupTable(representatives, starts, sizes, ends, first)
    queries = numbers(rows, spec.group, spec.head_dim)
    found = Case(queries, table, wanted, lengths, spec, places(seed, lengths))
    assert spec_of(found.queries, table, spec.agree, spec.together) == spec
    return found


def places(seed: int, lengths: list[int]) -> Places | None:
    """Nowhere known, rows that begin somewhere, or pages of three in no order."""
    made = torch.Generator().manual_seed(seed)
    if seed % 3 == 0:
        return None
    if seed % 3 == 1:
        return Places(torch.randint(0, 10**6, (len(lengths),), generator=made))
    pages = -(-max(lengths) // 3)
    table = torch.randperm(len(lengths) * (pages + 1), generator=made).view(len(lengths), -1)
    return Places(table.int()[:, :pages], 3)


def check(choose: Chooser, one: Case) -> None:
    """The chooser says what sorting says, in a table as it is described."""
    found = one.by(choose)
    expected = [one.expected(r) for r in range(len(one.lengths))]
    assert [row.tolist() for row in found] == expected
    assert found.lengths == found.counts.tolist() == list(map(len, expected))
    assert found.entries.dtype == torch.int32
    assert found.entries.shape == (len(expected), max(found.lengths))
    past = torch.arange(found.entries.shape[1]) >= found.counts.unsqueeze(1)
    assert not found.entries[past].any()
    assert (found.slots is None) == (one.places is None)
    if found.slots is not None:
        slots = [row[:n] for row, n in zip(found.slots.tolist(), found.lengths, strict=True)]
        assert slots == [[one.slot(r, e) for e in row] for r, row in enumerate(expected)]
        assert found.slots.dtype == torch.int32


def check_near(choose: Chooser, one: Case, within: float) -> None:
    """Nothing is chosen that scores less than what is not, but for rounding."""
    for r, row in enumerate(one.by(choose)):
        scored, chosen = one.scores(r), set(row.tolist())
        assert len(chosen) == len(one.expected(r))
        begins, sizes = one.table.starts[r].tolist(), one.table.sizes[r].tolist()
        groups = [g for g, size in enumerate(sizes) if size]
        taken = {g: sum(e in chosen for e in range(begins[g], begins[g] + sizes[g])) for g in groups}
        worst = min((scored[g] for g in groups if taken[g]), default=float("inf"))
        best = max((scored[g] for g in groups if taken[g] < sizes[g]), default=float("-inf"))
        assert worst >= best - within
        assert sum(0 < n < sizes[g] for g, n in taken.items()) <= 1
