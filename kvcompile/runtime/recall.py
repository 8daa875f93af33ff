"""What a layer with a recall reads: the groups of its entries, and which of them each of its readers chose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompile.kernels.layout import Queries, View
from kvcompile.kernels.spec import KernelSpec
from kvcompile.plan.plan import LayerPlan
from kvcompile.recall.choice import Recalled, asked
from kvcompile.recall.index import Index
from kvcompile.recall.received import column_sums
from kvcompile.runtime.positions import level, move_up
from kvcompile.stores.base import Chosen, Store

if TYPE_CHECKING:
    from kvcompile.runtime.cache import Step
    from kvcompile.runtime.layer import LayerCache


class LayerRecall:
    """The groups of one layer's entries, and what its readers chose of them.

    index: the groups; None until the first entries are to be put into one, and where the plan recalls nothing.
    choices: by reading layer, while they stand.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self.plan = plan
        self.index: Index | None = None
        self.choices: dict[int, Recalled] = {}

    @property
    def receives(self) -> bool:
        """Whether what stands for a group depends on the attention that its entries have received."""
        return self.plan.recall is not None and self.plan.recall.grouping.receives

    def chooses(self, step: Step) -> bool:
        """Whether a pass reads what it chooses, and not everything."""
        recall, grouped = self.plan.recall, self.index is not None and self.index.table is not None
        return recall is not None and grouped and (recall.prompts or not step.prefill)

    def groups(self, store: Store) -> Index:
        """The groups of the entries held, of which there may be none yet. Raises where the plan has no recall."""
        if self.index is None:
            if self.plan.recall is None:
                raise RuntimeError(f"layer {self.plan.index} recalls nothing")
            self.index = Index(self.plan.recall, self.plan.storage, store.batch * store.heads)
        return self.index

    @torch.no_grad()
    def choose(self, store: Store, queries: Tensor, step: Step, layer: int) -> Chosen | None:
        """The entries that the queries `[B, H_q, Q, D]` of layer `layer` read; None: all of them.

        Queries of a chunk choose together.
        """
        recall, index = self.plan.recall, self.index
        if recall is None or index is None or index.table is None or not self.chooses(step):
            return None
        lengths, past = store.lengths, self.choices.get(layer)
        if past is None or step.prefill or step.tick % recall.reuse == 1 % recall.reuse:
            wanted = index.wanted(step.cache.seen, store.heads)
            if recall.far == "constant" and queries.shape[2] > 1:
                queries = level(queries, step, layer)
            query = asked(queries, step.valid, step.ended)
            rows = query.reshape(len(wanted), -1, query.shape[-1])
            together = store.heads if recall.heads == "shared" else 1
            groups = rows, index.table, wanted, lengths
            places = store.places if store.device == rows.device else None
            entries = step.cache.backend.choose(*groups, recall.agree, together, places)
            past = self.choices[layer] = Recalled(step.tick, entries, lengths)
            if step.cache.reads is not None:
                step.cache.count_read(layer, index.table_bytes())
        return past.extended(lengths)

    @torch.no_grad()
    def receive(
        self, store: Store, queries: Queries, view: View, spec: KernelSpec, ends: list[int], sums: Tensor | None
    ) -> None:
        """Let the groups to come know what entries receive from the new queries: what the kernel has added up, if so.

        ends: entries of each row in the view. sums: `[R, n]` of the kernel; None: it has none.
        """
        received = column_sums(queries, view, spec, ends) if sums is None else sums
        self.groups(store).receive(received, ends, store.lengths)

    @torch.no_grad()
    def group_new(self, kv: LayerCache, step: Step) -> None:
        """Put entries that are no longer among the newest into groups: at the end of a prompt, then now and then."""
        recall, s = self.plan.recall, self.plan.selection
        if recall is None or (s is not None and step.prefill and not step.last) or step.tick % recall.reuse:
            return  # groups change where choices do, at the same steps in any batch
        store, index = kv.held, self.groups(kv.held)
        lengths = store.lengths
        if step.concerned is not None:
            lengths = [n if step.concerned[r // store.heads] else 0 for r, n in enumerate(lengths)]
        due = index.due(lengths, 1 if step.prefill else recall.every)
        if step.prefill or due:  # a choice stands for decoded tokens that follow each other, and for their groups
            self.choices.clear()
        if due:
            if recall.far == "constant":
                move_up(step, kv, index, due)
            index.extend(store, due, step.positions.device)
            kv.rearranged()
            step.cache.grouped()

    def ungroup(self, kv: LayerCache) -> None:
        """Forget the groups, with entries in the order of their positions again: for a selection that looks at it."""
        if self.index is None:
            return
        first, rows = self.index.first, kv.held.rows()
        spans = {r: slice(first, first + n) for r, n in enumerate(self.index.covered) if n}
        if self.index.recall.grouping.reorders:
            kv.held.reorder({r: (first, rows[r][2][span].argsort()) for r, span in spans.items()})
            kv.rearranged()
        self.index.dissolve()
        self.choices.clear()

    def keep(self, indices: list[Tensor]) -> None:
        """Only the entries `indices[r]` of each row stay, in no group."""
        if self.index is not None:
            self.index.keep(indices)

    def select(self, sequences: Tensor, heads: int) -> None:
        """Keep, repeat or reorder sequences."""
        self.choices.clear()
        if self.index is not None:
            self.index.select(sequences, heads)
