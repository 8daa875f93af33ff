"""The cache of a compiled model: a transformers `Cache` that knows the plan, true positions and bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvcompile.errors import KvcompileError
from kvcompile.kernels.backend import Backend
from kvcompile.kernels.dispatch import SDPA
from kvcompile.plan.plan import Plan
from kvcompile.runtime.layer import LayerCache
from kvcompile.runtime.prompt import Sight
from kvcompile.runtime.replay.transcript import Transcript
from kvcompile.stores.plan_kernels import PlanKernels

Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]
HEADROOM = 64  # tokens of room behind a row; a full row moves once per so many tokens
TRIM_EVERY = 64  # decoded tokens between two trims of sliding layers


@dataclass(frozen=True)
class Step:
    """One forward pass: true positions `[B, Q]` of the new tokens, which are real, where in the prompt it stands."""

    cache: KVCache
    positions: Tensor
    valid: Tensor | None
    prefill: bool
    last: bool  # the last chunk of the prompt, or a decoded token
    tick: int = 0  # tokens decoded since the last prefill, this one included
    shift: Tensor | None = None  # of the cache when the pass began: layers compressed earlier in it have moved on
    coming: list[int] | None = None  # real tokens of each sequence's prompt after this pass (None: nowhere any)
    shared: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # what layers need not redo
    concerned: list[bool] | None = None  # sequences to which this pass, or its prompt, has brought tokens (None: all)
    withheld: bool = False  # whether the selection that is due waits for a replay of the text
    until: Tensor | None = None  # the last position that each new token sees, `[B, Q]` (None: its own)
    until_slides: bool = False  # that of layers with a sliding window alone

    def sees(self, window: int | None) -> Tensor | None:
        """The last position that each new token sees in a layer with this sliding window; None: its own."""
        return self.until if window or not self.until_slides else None

    @property
    def ended(self) -> list[bool]:
        """Whether no token of a sequence's prompt is to come."""
        return [self.last] * len(self.cache.seen) if self.coming is None else [n == 0 for n in self.coming]

    def due(self, decode_every: int, between_chunks: bool = True) -> bool:
        """Whether a schedule asks for a selection at the end of this pass, and nothing has to be read again before."""
        if self.withheld:
            return False
        if self.prefill:
            return self.last or between_chunks
        return decode_every > 0 and self.tick % decode_every == 0


@dataclass
class Evictions:
    """Proof that a selection ran: how often, and how many entries it dropped, per layer."""

    events: int = 0
    dropped: dict[int, int] = field(default_factory=dict)


class KVCache(Cache):  # type: ignore[misc]
    """Keys and values of a compiled model: what its forward returns and takes as `past_key_values`.

    `seen[b]` are the true tokens of a sequence so far (padding left out), which is not the number of entries kept.
    `states` is transformers' own cache of layers that keep a state in place of keys and values (None: there are none).
    `shift [B]` is how far rotary positions lie behind true ones (compact positions, and recall at a constant distance).
    Bytes: `nbytes()` counts keys and values held, `allocated()` everything including positions and room; where the plan
    offloads, `resident()` what is on the compute device of that, and `in_host_memory()` what lies beside it.

    Examples:
        >>> model = kvcompile.compile(model, recipe="snapkv", overrides=["budget=0.5"])
        >>> cache = model(ids).past_key_values  # ids [1, 100]
        >>> cache.seen, cache.lengths()[0]  # read, and held by each KV head of the first layer
        ([100], [50, 50])
        >>> cache = model(ids[:, :1], past_key_values=cache).past_key_values  # one more token
        >>> cache.seen, cache.lengths()[0]
        ([101], [51, 51])
    """

    def __init__(
        self,
        plan: Plan,
        rotaries: list[Rotary] | None = None,
        backend: Backend = SDPA,
        states: Callable[[], Cache] | None = None,
    ) -> None:
        super().__init__(layers=[LayerCache(p, backend.encode, backend.compact) for p in plan.layers])
        self.plan, self.rotaries = plan, rotaries or []
        self.replayed = plan.replayed
        self.kernels = PlanKernels(plan, backend)
        self.headroom = HEADROOM
        self.new_states = states
        self._start()

    @property
    def backend(self) -> Backend:
        """What attends, chooses and demotes."""
        return self.kernels.backend

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self.kernels = PlanKernels(self.plan, backend)

    def _start(self) -> None:
        self.evictions = Evictions()
        self.seen: list[int] = []
        self.shift: Tensor | None = None
        self.states: Cache | None = None if self.new_states is None else self.new_states()
        self.reads: dict[int, int] | None = None  # bytes that attention reads, by layer; None: they are not counted
        self.tick = 0
        self.croppable = 0
        self.read_again = 0  # tokens that replays have read, their prompts included
        self.withheld: Step | None = None  # the pass after which a replay is due
        self.sight: Sight | None = None  # which later tokens the new ones of the next pass see (None: none)
        replay = None if self.replayed is None else self.replayed.replay
        self.transcript = None if replay is None else Transcript(replay.overlap)
        self.chunk(prompting=False, last=True)

    def chunk(self, prompting: bool, last: bool, coming: list[int] | None = None) -> None:
        """Say what the next pass is.

        Args:
            prompting: whether it is one part of a prompt in several.
            last: whether nothing of the prompt comes after it: selections after the prefill are due then.
            coming: real tokens of each sequence that are still to be read (None: none).
        """
        self.prompting, self.last_chunk, self.coming = prompting, last, coming

    def begin(self, tokens: Tensor, attention_mask: Tensor | None) -> Step:
        """Open a forward pass over new `tokens [B, Q]` or embeddings of them; the mask `[B, seen + Q]` marks padding.

        Raises KvcompileError for masks that are no padding masks or batches of another size.
        """
        batch, count = tokens.shape[:2]
        if len(self.seen or tokens) != batch:
            raise KvcompileError(
                "a cache belongs to one batch", f"{batch} sequences after {len(self.seen)}", "use a new cache"
            )
        valid = self._valid(attention_mask, batch, count)
        self.seen = self.seen or [0] * batch
        prefill = self.prompting or count > 1 or not any(self.seen)
        start = torch.tensor(self.seen, device=tokens.device, dtype=torch.int64).unsqueeze(1)
        if valid is None:
            positions = start + torch.arange(count, device=tokens.device, dtype=torch.int64)
            self.seen = [n + count for n in self.seen]
        else:
            positions = start + valid.long().cumsum(1) - 1
            self.seen = [n + int(m) for n, m in zip(self.seen, valid.sum(1), strict=True)]
        self.tick = 0 if prefill else self.tick + 1
        self.croppable = self.croppable + count if valid is None and self.states is None else 0
        step = Step(self, positions, valid, prefill, self.last_chunk, self.tick, self.shift, self.coming)
        if self.sight is not None and not self.last_chunk:
            raise KvcompileError(
                "tokens of one image see each other both ways, so a prompt with images is read in one pass",
                f"prefill_chunk={self.plan.prefill_chunk}",
                "compile with prefill_chunk=0, or longer chunks",
            )
        if self.sight is not None:
            step = replace(step, until=self.sight.until(positions), until_slides=self.sight.sliding)
        if self.transcript is None or self.replayed is None:
            return step
        self.transcript.add(tokens, valid)
        if not step.due(self.replayed.decode_every, self.replayed.between_chunks):
            return step
        self.withheld = replace(step, withheld=True)
        return self.withheld

    def stays_inside(self, tokens: Tensor, attention_mask: Tensor | None) -> bool:
        """Whether a pass over these new tokens completes no block of any sequence; only block transformers have any."""
        return False

    def _valid(self, mask: Tensor | None, batch: int, count: int) -> Tensor | None:
        if mask is None:
            return None
        expected = (batch, self.get_seq_length() + count)
        if tuple(mask.shape) != expected:
            raise KvcompileError(
                f"the attention mask must be a padding mask over past and new tokens, {expected}", tuple(mask.shape)
            )
        new = mask[:, -count:] != 0
        return None if bool(new.all()) else new

    def count_read(self, index: int, nbytes: int) -> None:
        """Count what layer `index` reads, where somebody asks (`reads`)."""
        if self.reads is not None:
            self.reads[index] = self.reads.get(index, 0) + nbytes

    def grouped(self) -> None:
        """Record that entries were put into groups: they may lie elsewhere, so none of them can be taken back."""
        self.croppable = 0

    def evicted(self, index: int, dropped: int) -> None:
        """Record that layer `index` dropped entries: what was before can no longer be cropped exactly."""
        self.evictions.dropped[index] = self.evictions.dropped.get(index, 0) + dropped
        self.croppable = 0

    def summed(self) -> None:
        """Record that a score has summed over the tokens so far: their part in it can no longer be taken back."""
        self.croppable = 0

    def encoded(self) -> None:
        """Record that tokens were encoded: their exact numbers, and when it was done, can no longer be taken back."""
        self.croppable = 0

    def lengths(self) -> list[list[int]]:
        """Returns how many tokens each layer holds, by row: sequence by sequence, in each its KV heads.

        The list of a layer that reads another layer's cache is empty.

        Examples:
            >>> model = kvcompile.compile(model, recipe="snapkv", overrides=["budget=0.5"])
            >>> model(ids).past_key_values.lengths()  # 4 layers, 2 KV heads
            [[50, 50], [50, 50], [50, 50], [50, 50]]
        """
        return [layer.store.lengths if layer.store is not None else [] for layer in self.layers]

    def nbytes(self) -> int:
        """Returns the bytes of all keys and values held, scales of codes included: what the plan predicts.

        Examples:
            >>> model = kvcompile.compile(model, recipe="snapkv", overrides=["budget=0.5"])
            >>> model(ids).past_key_values.nbytes()  # 4 layers x 2 heads x 50 tokens x (16 + 16) floats
            51200
        """
        return sum(layer.store.nbytes() for layer in self.layers if layer.store is not None)

    def state_bytes(self) -> int:
        """Bytes of what layers without keys and values keep in their place: for each sequence `Plan.state_bytes`."""
        if self.states is None:
            return 0
        kept = [layer for layer in self.states.layers if hasattr(layer, "conv_states")]
        tensors = [x for layer in kept for of in (layer.conv_states, layer.recurrent_states) for x in of.values()]
        return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))

    def allocated(self) -> int:
        """Bytes of everything allocated for the cache: keys, values, positions, indices, room for the next tokens."""
        parts = [part for layer in self.layers for part in (layer.store, layer.index) if part is not None]
        total: int = sum(part.allocated() for part in parts) + self.state_bytes()
        return total

    def index_bytes(self) -> int:
        """Bytes of what stands for groups of tokens, beside keys and values."""
        return sum(layer.index.nbytes() for layer in self.layers if layer.index is not None)

    def resident(self) -> int:
        """Bytes allocated on the compute device: all but what lies in host memory, and copies on their way."""
        return sum(layer.resident() for layer in self.layers)

    def in_host_memory(self) -> int:
        """Bytes allocated in host memory: offloaded stores, and what copies on the device were made of."""
        return sum(layer.in_host_memory() for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included (what transformers slices by); entries held are `lengths()`."""
        return max((layer.columns for layer in self.layers), default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes of the mask transformers would build; the compiled graph builds none."""
        return self.get_seq_length() + query_length, 0

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first forward."""
        return len(self.seen) or -1

    @property
    def is_croppable(self) -> bool:
        """Whether every token could be taken back: only where nothing can be evicted or encoded."""
        return (
            self.states is None
            and not self.plan.selected
            and not any(p.sliding_window or p.storage.quantized or p.recall for p in self.plan.layers)
        )

    def _select(self, sequences: Tensor) -> None:
        for layer in self.layers:
            layer.select(sequences)
        if self.states is not None:
            self.states.reorder_cache(sequences)
        self.seen = [self.seen[int(b)] for b in sequences] if self.seen else []
        if self.shift is not None:
            self.shift = self.shift[sequences]
        if self.transcript is not None:
            self.transcript.select(sequences)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search picks sequences."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self._select(torch.arange(len(self.seen), dtype=torch.int64, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the given sequences."""
        self._select(indices)

    def fork(self) -> KVCache:
        """Returns a second cache with the same tokens, for another continuation; each goes its own way from here.

        Where the plan stores in pages (`policy=paged`), both share all pages until one of them writes there; any other
        layout is copied. `copy.deepcopy(cache)` does the same.

        Examples:
            >>> model = kvcompile.compile(model, recipe="paged")
            >>> cache = model(ids).past_key_values
            >>> other = cache.fork()
            >>> other = model(ids[:, :1], past_key_values=other).past_key_values
            >>> cache.seen, other.seen
            ([100], [101])
        """
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        """`fork()`: what transformers' prompt caching does, `copy.deepcopy(past_key_values)`, is meant like this."""
        clone = object.__new__(type(self))
        same = (self.plan, *self.plan.layers, self.rotaries, self.new_states)
        memo.update({id(self): clone, **{id(x): x for x in same}})
        clone.__dict__.update({name: copy.deepcopy(x, memo) for name, x in vars(self).items()})
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: it shares pages, kernels and host memory with its process. Raises KvcompileError."""
        raise KvcompileError(
            "a cache stays in its process: it is not pickled",
            "a KVCache",
            "copy.deepcopy(cache) here; elsewhere read the prompt again",
        )

    def reset(self) -> None:
        """Forget everything; the plan stays, and the next pass begins a new prompt.

        Examples:
            >>> cache = kvcompile.compile(model, recipe="kivi")(ids).past_key_values
            >>> cache.reset()
            >>> cache.seen, cache.nbytes()
            ([], 0)
        """
        for layer in self.layers:
            layer.reset()
        self._start()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, exactly: the cache is then as it was before them.

        Args:
            tokens_to_remove: how many, as a negative number (which is how transformers says it); 0 does nothing.

        Raises:
            KvcompileError: if one of them was seen by an eviction, encoded or grouped: what was lost cannot come back.

        Examples:
            >>> model = kvcompile.compile(model, recipe="snapkv", overrides=["budget=0.5"])
            >>> cache = model(ids).past_key_values  # 100 tokens, of which 50 stay
            >>> cache = model(ids[:, :1], past_key_values=cache).past_key_values
            >>> cache.crop(-1)  # what was read after the eviction
            >>> cache.seen, cache.lengths()[0]
            ([100], [50, 50])
        """
        count = abs(tokens_to_remove)
        if count == 0:
            return
        croppable = 0 if any(p.recall and p.recall.reuse > 1 for p in self.plan.layers) else self.croppable
        if tokens_to_remove > 0 or count > croppable:
            raise KvcompileError(
                "only tokens after the last eviction, encoding or grouping can be cropped, given as a negative number",
                f"{tokens_to_remove} with {croppable} such tokens",
                "crop fewer, or start a new cache",
            )
        for layer in self.layers:
            if layer.store is not None:
                layer.store.drop_last(count)
                layer.reading.choices.clear()
                layer.columns -= count
                layer.history.forget()
        if self.transcript is not None:
            self.transcript.drop_last(count)
        self.seen = [n - count for n in self.seen]
        self.croppable -= count
        self.tick = max(0, self.tick - count)
