"""One layer's cache: a store in whatever layout its rows need, behind the interface that transformers expects."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvcompile.errors import KvcompileError
from kvcompile.kernels.codecs import Encoder, encode
from kvcompile.kernels.compact import Compactor, compact
from kvcompile.kernels.layout import Queries, View, view_bytes
from kvcompile.kernels.spec import Part
from kvcompile.plan.plan import LayerPlan
from kvcompile.recall.index import Index
from kvcompile.runtime.history import QueryHistory
from kvcompile.runtime.recall import LayerRecall
from kvcompile.stores import factory
from kvcompile.stores.base import Chosen, Store, Stretches, tabled
from kvcompile.stores.host import HostTransfer, shown

if TYPE_CHECKING:
    from kvcompile.runtime.cache import Step


class LayerCache(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one owner layer, and what its selection remembers.

    `store` is None until the first tokens arrive; it is dense while all rows have one length, ragged otherwise, paged
    where the plan says so, and quantized where it stores older tokens in another format. Where the plan offloads, it
    lies in host memory between `to_host` and `fetch`.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, plan: LayerPlan, encoder: Encoder = encode, compactor: Compactor = compact) -> None:
        self.is_initialized = False
        self.plan, self.encoder, self.compactor = plan, encoder, compactor
        self.store: Store | None = None
        self.history = QueryHistory()
        self.reading = LayerRecall(plan)
        self.columns = 0
        self.transfer = HostTransfer() if plan.storage.offload else None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCache:
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update({name: copy.deepcopy(x, memo) for name, x in vars(self).items()})
        clone._rehome()
        return clone

    @property
    def held(self) -> Store:
        """The store, once there is one."""
        if self.store is None:
            raise RuntimeError(f"layer {self.plan.index} holds no tokens yet")
        return self.store

    @property
    def keys(self) -> Tensor | None:
        """Keys `[B, H_kv, n, D]` of the tokens held, decoded where they are encoded; None before the first token.

        Of a layer with a latent: its rows. Raises KvcompileError where rows have several lengths.
        """
        return self._rows(0)

    @property
    def values(self) -> Tensor | None:
        """Values `[B, H_kv, n, D_v]`, as `keys`."""
        return self._rows(1)

    def _rows(self, which: int) -> Tensor | None:
        if self.store is None:
            return None
        if len(set(self.store.lengths)) > 1:
            raise KvcompileError(
                f"layer {self.plan.index} holds rows of several lengths, which are no one tensor",
                f"{min(self.store.lengths)} to {max(self.store.lengths)} tokens",
                "read layer.held.rows(): keys, values and positions of each row",
            )
        rows, shape = [row[which] for row in self.store.rows()], (self.store.batch, self.store.heads)
        return torch.unflatten(torch.stack(rows), 0, shape)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, valid: Tensor | None, headroom: int) -> None:
        """Add new tokens: keys `[B, H_kv, Q, D]`, values, true positions `[B, Q]`; padding is not stored.

        Where the plan has a latent, keys are its rows and hold the values too.
        """
        self.columns += keys.shape[2]
        latent = self.plan.latent.rope if self.plan.latent else None
        values = values if latent is None else keys[..., latent:]
        if self.store is None:
            how = self.plan.storage, latent, self.encoder, self.plan.index
            self.store = factory.opened(keys, values, valid, headroom, *how)
            self.is_initialized = True
        if self.transfer is not None and self.transfer.home is not None:
            self.transfer.appended.append(((keys, values, positions), valid, headroom))
        if self.transfer is not None and self.transfer.on_host:
            keys, values, positions = (x.to(self.held.device) for x in (keys, values, positions))
            valid = None if valid is None else valid.to(self.held.device)
        self.store = self.store.append(keys, values, positions, headroom, valid, self.compactor)

    def attend(
        self, queries: Tensor, step: Step, layer: int, chosen: Chosen | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """Attention of the new queries to what is held: the one way to attend to a layer.

        Args:
            queries: `[B, H_q, Q, D]`, of the new tokens, whose keys and values are already held.
            step: the forward pass that they belong to.
            layer: who asks: this layer, or one that reads its cache.
            chosen: the only entries of each row that are seen, those of the new tokens among them (see `Store.view`).
            sinks: learned logits of the query heads `[H_q]`, float32, of an attention that has them.

        Returns `[B, H_q, Q, D_v]`. Raises KvcompileError for a choice where a score adds up attention to all entries.
        """
        if chosen is not None and self.sums_wanted(queries, step):
            raise KvcompileError(
                f"layer {self.plan.index}: its score adds up attention to every entry",
                "attention to chosen entries",
                "use a score that looks at keys or queries itself, or attend to all entries",
            )
        store, cache = self.held, step.cache
        parts = store.parts if chosen is None else store.chosen_parts
        ends = store.lengths if chosen is None else tabled(chosen, store.device).lengths
        sums = self._sums(queries, step, parts, ends)
        spec = cache.kernels.spec(layer, parts, sums is not None)
        until = step.sees(self.plan.sliding_window)
        attend = cache.kernels.attention(spec, queries.dtype, self._learns(queries), until is not None)
        slopes = cache.kernels.slopes(layer, queries.device)
        new, view = Queries(queries, step.positions, step.valid, sinks, slopes, until), self._view(chosen)
        if cache.reads is not None:
            cache.count_read(layer, view_bytes(view, spec.latent))
        out = attend(new, view, spec, sums)
        if self.reading.receives:
            self.reading.receive(store, new, view, spec, ends, sums)
            if sums is not None and self.sums_wanted(queries, step):
                self._selection_sums(step).add_(sums)
            cache.summed()
            if cache.reads is not None:
                groups = self.reading.groups(store)
                cache.count_read(layer, groups.nbytes() - groups.table_bytes())
        return out

    @property
    def index(self) -> Index | None:
        """The groups of the entries held; None where there are none yet, or the plan recalls nothing."""
        return self.reading.index

    def recall(self, queries: Tensor, step: Step, layer: int) -> Chosen | None:
        """The entries that the queries `[B, H_q, Q, D]` of layer `layer` read; None: all of them."""
        return self.reading.choose(self.held, queries, step, layer)

    def group_new(self, step: Step) -> None:
        """Put entries that are no longer among the newest into groups, where it is time to."""
        self.reading.group_new(self, step)

    def ungroup(self) -> None:
        """Forget the groups, with entries in the order of their positions again."""
        self.reading.ungroup(self)

    def sums_wanted(self, queries: Tensor, step: Step) -> bool:
        """Whether the kernel of this pass adds up the attention that entries receive, so that no query need be kept."""
        s = self.plan.selection
        if s is not None and s.demotes and not step.prefill:
            return True
        if s is None or not (step.prefill or s.schedule.decode_every) or not factory.in_order(self.held):
            return False
        needs, single = s.score.needs, queries.shape[2] == 1 and step.valid is None and not step.prefill
        if needs.reduce != "sum" or self._learns(queries) or step.sees(self.plan.sliding_window) is not None:
            return False
        if not needs.carries and not (single and step.due(s.schedule.decode_every)):  # sums of one query alone
            return False
        return step.cache.kernels.scores(self.plan.index, self.held.parts, queries.dtype)

    def _sums(self, queries: Tensor, step: Step, parts: tuple[Part, ...], ends: list[int]) -> Tensor | None:
        """Where the kernel adds up what entries receive from the queries, `[R, n]`; None where that is not wanted.

        ends: entries of each row that it sees, lying in these `parts`.
        """
        if self.reading.receives:
            if self._learns(queries) or not step.cache.kernels.scores(self.plan.index, parts, queries.dtype):
                return None
            return torch.zeros(len(ends), max(ends), dtype=torch.float32, device=queries.device)
        return self._selection_sums(step) if self.sums_wanted(queries, step) else None

    def _selection_sums(self, step: Step) -> Tensor:
        """What the selection has seen entries receive, `[R, n]`, to be added to."""
        if self.plan.selection is not None and self.plan.selection.score.needs.carries:
            step.cache.summed()
        store = self.held
        return self.history.receive(store.batch, store.heads, max(store.lengths), step.cache.headroom, store.device)

    def _learns(self, queries: Tensor) -> bool:
        """Whether gradients of attention are wanted, with respect to these queries or to what is held."""
        return torch.is_grad_enabled() and (queries.requires_grad or any(x.requires_grad for x in self.held.tensors()))

    def keep(self, indices: list[Tensor], headroom: int) -> None:
        """Keep only the entries `indices[row]` (ascending) of each row; the rest is freed."""
        with self.at_hand() as store:
            if self.transfer is not None:  # some may have been found where the store was parked
                indices = [index.to(store.device) for index in indices]
            self.changed()
            self.reading.keep(indices)
            self.store = store.keep(indices, headroom, self.compactor)

    def rewrite(self, keys: Stretches) -> None:
        """Replace the keys of a stretch of some rows; they must not be encoded."""
        self.changed()
        self.held.rewrite(keys)

    def flush(self, headroom: int, release: bool, concerned: list[bool] | None = None) -> bool:
        """Encode what is older than the residual (see `QuantizedStore.flush`); whether anything was."""
        with self.at_hand() as store:
            flushed = store.flush(headroom, release, self.compactor, concerned)
            if flushed:
                self.changed()
        return flushed

    def prefetch(self, step: Step) -> None:
        """Begin to bring a parked store to the device, where the pass reads all of it."""
        if self.transfer is not None and self.store is not None and not self.reading.chooses(step):
            self.transfer.prefetch(self.store)

    def fetch(self, step: Step | None = None) -> None:
        """Bring a parked store to the device; not for a `step` that reads what it chooses: that comes alone."""
        if self.transfer is not None and self.store is not None and not (step and self.reading.chooses(step)):
            self.store = self.transfer.fetch(self.store)

    def _view(self, chosen: Chosen | None) -> View:
        """What a kernel on the device reads: of what is chosen in host memory, a copy."""
        view = self.held.view(chosen)
        if chosen is None or self.transfer is None or self.transfer.host is None or not self.transfer.on_host:
            return view
        return shown(view, self.transfer.host.near)

    def to_host(self) -> None:
        """Put the store into host memory."""
        if self.transfer is not None and self.store is not None:
            self.store = self.transfer.to_host(self.store)

    def resident(self) -> int:
        """Bytes allocated on the compute device, measured tensor by tensor."""
        return sum(x.numel() * x.element_size() for x in self._alive() if not self._at_home(x))

    def in_host_memory(self) -> int:
        """Bytes allocated for it in the memory beside the device, measured tensor by tensor."""
        return sum(x.numel() * x.element_size() for x in self._alive() if self._at_home(x))

    def host_bytes_held(self) -> int:
        """Bytes of keys and values held, where all of them lie in host memory; else 0."""
        if self.store is None or not all(map(self._at_home, self.store.buffers())):
            return 0
        return self.store.nbytes()

    def _at_home(self, x: Tensor) -> bool:
        return self.transfer is not None and self.transfer.host is not None and self.transfer.host.holds(x)

    def _alive(self) -> list[Tensor]:
        """Every tensor of store and index, once: also a copy under way, and what one on the device was made of."""
        tensors = [x for part in (self.store, self.index) if part is not None for x in part.tensors()]
        if self.transfer is not None and self.store is not None:
            tensors += self.transfer.spare(self.store)
        return list({id(x): x for x in tensors}.values())

    def _rehome(self) -> None:
        if self.transfer is not None and self.store is not None:
            self.store = self.transfer.rehome(self.store)

    @contextmanager
    def at_hand(self) -> Iterator[Store]:
        """The store on the device, and back where it was afterwards."""
        on_host = self.transfer is not None and self.transfer.on_host
        self.fetch()
        yield self.held
        if on_host:
            self.to_host()

    def rearranged(self) -> None:
        """Entries of the store have moved within their rows."""
        self.changed()
        self._rehome()

    def changed(self) -> None:
        """The store is about to be changed in other ways than by new tokens."""
        if self.transfer is not None:
            self.transfer.changed = True

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences."""
        if self.store is not None:
            self.store.select(sequences.to(self.store.device))
            self._rehome()
            self.history.select(sequences)
            self.reading.select(sequences, self.store.heads)

    def reset(self) -> None:
        """Forget everything."""
        self.store, self.history, self.columns, self.is_initialized = None, QueryHistory(), 0, False
        self.reading, self.transfer = LayerRecall(self.plan), None if self.transfer is None else HostTransfer()

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: what transformers slices new inputs by."""
        return self.columns

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes of the mask transformers would build; the compiled graph builds none."""
        return self.columns + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: `append` makes the store."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: the compiled graph calls `append`. Raises KvcompileError."""
        raise KvcompileError(
            "a kvcompile cache is written by a compiled model only", "an ordinary model", "give it a DynamicCache()"
        )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search picks sequences."""
        self.select(beam_idx)
