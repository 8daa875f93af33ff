"""What was chosen, and by which query."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcompile.kernels.choose import ChooseSpec, EntryTable
from kvcompile.plan.plan import Plan


@dataclass
class Recalled:
    """A choice: the step that it was made at, the entries of each row, and how many entries the rows had then."""

    tick: int
    entries: EntryTable
    lengths: list[int]

    def extended(self, lengths: list[int]) -> EntryTable:
        """The same entries, and all that have come since."""
        if lengths != self.lengths:
            self.entries = self.entries.extended(self.lengths, lengths)
            self.lengths = lengths
        return self.entries


def chooser(plan: Plan, layer: int) -> ChooseSpec | None:
    """What layer `layer` will choose by; None: it reads everything."""
    reader, owner = plan.layers[layer], plan.layers[plan.layers[layer].owner]
    recall = owner.recall
    if recall is None:
        return None
    together = owner.kv_heads if recall.heads == "shared" else 1
    return ChooseSpec(recall.grouping.form, recall.agree, reader.group, reader.key_dim, plan.dtype, together)


def mean_query(queries: Tensor, valid: Tensor | None) -> Tensor:
    """The mean of the real queries of `[B, H_q, Q, D]`, `[B, H_q, D]`."""
    if queries.shape[2] == 1:
        return queries[:, :, 0]
    if valid is None:
        return queries.mean(2)
    real = valid[:, None, :, None].to(queries.dtype)
    return (queries * real).sum(2) / real.sum(2).clamp(min=1)
