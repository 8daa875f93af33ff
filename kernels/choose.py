"""Which groups of entries a step recalls: scored by what stands for them, the best taken until a budget is met.

Plain torch: the oracle of generated choosers, and what backends without one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChooseSpec:
    """One specialised chooser.

    form: what stands for a group, a `vector` r (wanted by q . r) or `bounds` (by sum_d max(q_d low_d, q_d high_d)).
    agree: how the queries of a KV head agree, by their `mean` or `max`. group: how many they are. dtype: of both.
    together: so many consecutive rows (the KV heads of a sequence) take the same groups, by the sum of their scores.
    """

    form: Literal["vector", "bounds"]
    agree: Literal["mean", "max"]
    group: int
    head_dim: int
    dtype: str
    together: int = 1

    @property
    def name(self) -> str:
        """Readable and unique: `choose-vector-mean-float32-g3-d64`, `...-t2` where two rows choose together."""
        end = f"-t{self.together}" if self.together > 1 else ""
        return f"choose-{self.form}-{self.agree}-{self.dtype}-g{self.group}-d{self.head_dim}{end}"


@dataclass(frozen=True)
class GroupTable:
    """The groups of each row, oldest first: `representatives [R, G, D]` or `[R, G, 2, D]`.

    `starts`, `sizes [R, G]` int32: the entries of a group are `starts : starts + sizes` of its row; a size of 0 is no
    group. Groups of a row lie back to back, from entry `first` on; `ends [R]` (int32) is where the last one ends.
    """

    representatives: Tensor
    starts: Tensor
    sizes: Tensor
    ends: Tensor
    first: int


class Chooser(Protocol):
    """A way to choose: the contract of `choose`."""

    def __call__(self, queries: Tensor, table: GroupTable, wanted: list[int], lengths: list[int]) -> list[Tensor]:
        """The entries that each row reads, ascending, int64."""
        ...


def scores(queries: Tensor, table: GroupTable, agree: str, together: int = 1) -> Tensor:
    """How much the queries `[R, g, D]` of each row want its groups, `[R, G]`, float32; -inf where there is none.

    together: so many consecutive rows want what they want in sum; their groups are alike.
    """
    representatives, q = table.representatives.float(), queries.float()
    if representatives.dim() == 3:
        by_query = q @ representatives.mT
    else:  # max(q low, q high) = q+ high - q- low, by the sign of each channel
        by_query = q.clamp(min=0) @ representatives[:, :, 1].mT + q.clamp(max=0) @ representatives[:, :, 0].mT
    agreed = by_query.mean(1) if agree == "mean" else by_query.amax(1)
    if together > 1:
        agreed = torch.unflatten(agreed, 0, (-1, together)).sum(1).repeat_interleave(together, 0)
    return agreed.masked_fill(table.sizes == 0, float("-inf"))


def taken(scored: Tensor, sizes: Tensor, wanted: Tensor) -> Tensor:
    """Entries taken of each group, `[R, G]` int64: all of the best groups until `wanted [R]`; the last one is cut.

    Of groups that score alike the older is taken first.
    """
    order = scored.sort(dim=1, descending=True, stable=True).indices
    ranked = sizes.long().gather(1, order)
    left = wanted.unsqueeze(1) - (ranked.cumsum(1) - ranked)
    return torch.zeros_like(ranked).scatter_(1, order, left.clamp(min=0).minimum(ranked))


def choose(
    queries: Tensor, table: GroupTable, wanted: list[int], lengths: list[int], agree: str, together: int = 1
) -> list[Tensor]:
    """The entries that each row reads, ascending: those before its groups, the best `wanted[r]` of them, those after.

    Args:
        queries: `[R, g, D]`.
        table: the groups of each row.
        wanted: entries of groups to take, at most as many as the row's groups have.
        lengths: entries of each row.
        agree: how the queries of a row agree on a group, by the `mean` or the `max` of what they score.
        together: so many consecutive rows choose alike, by the sum of their scores; `starts`, `sizes` and `wanted` of
            these rows must be alike too.
    """
    device = queries.device
    count = torch.tensor(wanted, dtype=torch.int64, device=device)
    took = taken(scores(queries, table, agree, together), table.sizes, count)
    ends = table.ends.long().unsqueeze(1)
    length = torch.tensor(lengths, dtype=torch.int64, device=device).unsqueeze(1)
    first = length.clamp(max=table.first)
    begins = torch.cat((torch.zeros_like(first), table.starts.long(), ends), 1).flatten()
    counts = torch.cat((first, took, length - ends), 1)
    per_row = counts.sum(1).tolist()
    counts = counts.flatten()
    before = counts.cumsum(0) - counts
    within = torch.arange(int(counts.sum()), dtype=torch.int64, device=device) - before.repeat_interleave(counts)
    return list(torch.split(begins.repeat_interleave(counts) + within, per_row))
