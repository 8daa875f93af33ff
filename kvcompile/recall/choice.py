"""What was chosen, and by which query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


def asked(queries: Tensor, valid: Tensor | None, ended: list[bool]) -> Tensor:
    """What the new queries `[B, H_q, Q, D]` of each sequence ask for together, `[B, H_q, D]`.

    Their mean; the newest alone where the prompt `ended[b]` with it, as what follows is said by that one.
    valid: which of them are real, `[B, Q]`; None: all.
    """
    if queries.shape[2] == 1:
        return queries[:, :, 0]
    if valid is None:
        mean, newest = queries.mean(2), queries[:, :, -1]
    else:
        real = valid[:, None, :, None].to(queries.dtype)
        mean = (queries * real).sum(2) / real.sum(2).clamp(min=1)
        order = torch.arange(valid.shape[1], dtype=torch.int64, device=valid.device)
        last = (order * valid).amax(1)
        newest = queries.take_along_dim(last[:, None, None, None], 2)[:, :, 0]
    alone = torch.tensor(ended, dtype=torch.bool, device=queries.device)
    return newest.where(alone[:, None, None], mean)
