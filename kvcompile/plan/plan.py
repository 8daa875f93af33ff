"""The plan: everything static about each layer's KV cache, frozen; policies fold over it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvcompile.errors import KvcompileError
from kvcompile.plan import checks
from kvcompile.plan.blocks import Blocks
from kvcompile.plan.recall import GROUP_BYTES, RECEIVED_BYTES, Recall
from kvcompile.plan.selection import Schedule, Selection
from kvcompile.plan.storage import PLAIN, Storage
from kvcompile.plan.structure import Fold, Heads, Latent
from kvcompile.plan.window import oldest

Family = Literal["structure", "selection", "recall", "storage"]
ORDER: tuple[Family, ...] = ("structure", "selection", "recall", "storage")
LATER = ("turnable", "alibi", "alibi_rounded", "shared", "native", "chunked", "value_head")  # older plans lack these
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class LayerPlan:
    """One attention layer: heads, head size, whose KV it reads, what of it is kept, and in which numbers."""

    index: int
    query_heads: int
    kv_heads: int
    head_dim: int
    owner: int
    scale: float
    sliding_window: int | None = None
    chunked: bool = False  # whether it begins at multiples of its length, and does not slide
    softcap: float | None = None
    selection: Selection | None = None
    recall: Recall | None = None
    storage: Storage = PLAIN
    rotates: bool = True  # whether queries and keys get rotary positions
    rotary: int = 0  # channels of a head that they turn, where `rotates`
    turnable: bool = True  # whether stored keys, and queries, can be turned on to other positions
    key_norm: bool = False  # whether keys are normed after their projection
    heads: Heads | None = None  # how its KV heads were merged
    fold: Fold = "owner"  # what an owner's projections take from those of its readers
    sink: bool = False  # whether each query head has a learned logit in the denominator of its softmax
    alibi: tuple[float, ...] = ()  # what each query head takes off a logit for every token of distance (ALiBi)
    alibi_rounded: bool = False  # by positions times slope in bfloat16
    latent: Latent | None = None  # what is cached in place of keys and values, for all heads as one KV head
    value_head: int | None = None  # channels of a value, where a key has others
    shared: bool = False  # whether the model itself has the layer read its owner's cache, without keys of its own

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads

    @property
    def dense_heads(self) -> int:
        """KV heads of the uncompressed model."""
        if self.latent:
            return self.latent.kv_heads
        return self.heads.original if self.heads else self.kv_heads

    @property
    def dense_width(self) -> int:
        """Numbers that the uncompressed layer reads of one token."""
        if self.latent and self.latent.native:
            return self.latent.width
        return self.dense_heads * (self.head_dim + (self.value_head or self.head_dim))

    @property
    def key_dim(self) -> int:
        """Numbers that a query meets in one entry: a key, or a latent row."""
        return self.latent.width if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """Numbers that attention sums: a value, or the latent without its positions."""
        return self.latent.rank if self.latent else self.value_head or self.head_dim

    @property
    def reprojects(self) -> bool:
        """Whether it has other projections than the model's own layer."""
        reads, latent = self.owner != self.index and not self.shared, self.latent and not self.latent.native
        return bool(self.heads or reads or latent)

    def nbytes(self, tokens: int, dtype: str, low: int = 0) -> int:
        """Bytes of `tokens` tokens of one KV head after a flushed pass, `low` of them in the low tier."""
        if self.latent:
            return self.storage.latent_nbytes(tokens, self.latent.width, dtype)
        return self.storage.nbytes(tokens, self.head_dim, dtype, low, self.value_dim)

    def low(self, kept: int, tokens: int) -> int | None:
        """How many of the `kept` tokens of a head are in the low tier after `tokens`; None: it depends on the input."""
        if self.selection is None or self.selection.tiers is None:
            return 0
        high = self.selection.tiers.high(kept, self.selection.resolve(self.span(tokens))[1])
        return None if high is None else kept - high

    def encoded_bytes(self, tokens: int, dtype: str) -> int:
        """Bytes of `tokens` tokens of one KV head that are older than the residual."""
        if self.latent:
            return self.storage.codecs(dtype)[0].nbytes(tokens, self.latent.width)
        codecs, dims = self.storage.codecs(dtype), (self.head_dim, self.value_dim)
        return sum(codec.nbytes(tokens, dim) for codec, dim in zip(codecs, dims, strict=True))

    def span(self, tokens: int) -> int:
        """Entries that the last of `tokens` sees in the uncompressed layer: all, its sliding window or its chunk."""
        return tokens - max(0, oldest(tokens - 1, self.sliding_window, self.chunked)) if self.sliding_window else tokens


@dataclass(frozen=True)
class LayerBytes:
    """What one layer will hold for one sequence: tokens per KV head (None: only the total is known ahead) and bytes.

    Where only the total is known and tokens are stored in blocks, `bytes` is that of heads which share it evenly. Where
    the input says how many are in the low tier, it is the most: that of none.
    """

    index: int
    kept: tuple[int, ...] | None
    kept_total: int  # summed over the layer's KV heads (mean share, where the split depends on the input)
    bytes: int
    dense_bytes: int
    host: int = 0  # of `bytes`, what lies in host memory between passes
    index_bytes: int = 0  # of what stands for groups of tokens, beside `bytes`; always on the device
    read: int = 0  # bytes that the next decode step reads here, those of the index included
    dense_read: int = 0  # bytes that it reads in the uncompressed layer
    low: tuple[int, ...] | None = None  # of `kept`, those in the low tier; None: known of the input alone


@dataclass(frozen=True)
class Applied:
    """A policy as it stands in the plan's history."""

    name: str
    family: Family


@dataclass(frozen=True)
class Plan:
    """What each layer of a model keeps, where and in which numbers, and the policies that said so. Frozen.

    A compiled model carries it as `model.kvcompile.plan`. `kept` and `bytes` predict the cache; a job compares its live
    cache with them.

    Attributes:
        architecture: transformers' name of the model type.
        dtype: in which keys and values are held where nothing says otherwise.
        layers: one `LayerPlan` a layer.
        prefill_chunk: tokens of a prompt that are read at once; 0: all.
        applied: the policies, in order.
        blocks: how the text is divided between a block decoder and a token decoder; None: it is not.
        state_bytes: of one sequence, what layers without keys and values keep in their place (a state); those have no
            `LayerPlan`, and `bytes` leaves them out.

    Examples:
        >>> plan = kvcompile.compile(model, recipe="snapkv", overrides=["budget=0.1"]).kvcompile.plan
        >>> plan.kept(index=0, tokens=1000)  # by KV head, after a prompt of 1,000 tokens
        (100, 100)
        >>> layer = plan.bytes(batch=1, tokens=1000)[0]
        >>> layer.bytes, layer.dense_bytes
        (25600, 256000)
    """

    architecture: str
    dtype: str
    layers: tuple[LayerPlan, ...]
    prefill_chunk: int = 0
    applied: tuple[Applied, ...] = field(default=())
    blocks: Blocks | None = None
    state_bytes: int = 0

    @property
    def decoder(self) -> Plan:
        """What selection, recall and storage act on: the plan itself; of a block transformer its block decoder.

        The entries of a block decoder are blocks: so are the `tokens` that its methods ask for.
        """
        return self if self.blocks is None else replace(self, layers=self.layers[: self.blocks.split], blocks=None)

    @property
    def steps(self) -> int:
        """Decode steps over which what is read is averaged: those of one block, where there are blocks."""
        return 1 if self.blocks is None else self.blocks.length

    def over(self, decoder: Plan) -> Plan:
        """The plan with its `decoder` changed to this one."""
        if self.blocks is None:
            return decoder
        return replace(decoder, layers=decoder.layers + self.layers[self.blocks.split :], blocks=self.blocks)

    def map(self, change: Callable[[LayerPlan], LayerPlan], layers: Iterable[int] | None = None) -> Plan:
        """The plan with `change` applied to the given layers (default: all)."""
        chosen = set(range(len(self.layers)) if layers is None else layers)
        return replace(self, layers=tuple(change(p) if p.index in chosen else p for p in self.layers))

    def record(self, name: str, family: Family) -> Plan:
        """The plan with a policy added to its history.

        Raises KvcompileError where the family comes after a later one (legal: structure, selection, recall, storage).
        """
        for before in self.applied:
            if ORDER.index(before.family) > ORDER.index(family):
                raise KvcompileError(
                    f"{family} policies come before {before.family} policies",
                    f"{name!r} ({family}) after {before.name!r} ({before.family})",
                    "order the stack " + " -> ".join(ORDER),
                )
        return replace(self, applied=(*self.applied, Applied(name, family)))

    @property
    def owners(self) -> tuple[LayerPlan, ...]:
        """Layers with a cache of their own."""
        return tuple(p for p in self.layers if p.owner == p.index)

    @property
    def selected(self) -> tuple[LayerPlan, ...]:
        """Those of them that drop tokens."""
        return tuple(p for p in self.owners if p.selection is not None)

    @property
    def replayed(self) -> Schedule | None:
        """The schedule of the layers that drop tokens, where it has them read again before; None: it has not."""
        schedules = [p.selection.schedule for p in self.selected if p.selection is not None]
        return next((s for s in schedules if s.replay is not None), None)

    @property
    def budgets(self) -> list[tuple[int, ...]]:
        """The selected layers that share a budget, together; each of the others alone."""
        groups: dict[int, tuple[int, ...]] = {}
        for p in self.selected:
            shares = p.selection is not None and p.selection.allocation.traits.cross_layer
            peers = [q.index for q in self.selected if q.selection == p.selection] if shares else [p.index]
            groups[peers[0]] = tuple(peers)
        return list(groups.values())

    def rank(self, index: int) -> tuple[int, int]:
        """(place of layer `index` among the layers that share its selection and its span, how many those are)."""
        layer = self.layers[index]
        alike = [p for p in self.selected if p.sliding_window == layer.sliding_window]
        peers = [p.index for p in alike if p.selection == layer.selection]
        return peers.index(index), len(peers)

    def check(self) -> None:
        """Raise KvcompileError, naming policy and layer, if the plan cannot run."""
        checks.check(self)

    def kept(self, index: int, tokens: int, coming: int = 0) -> tuple[int, ...] | None:
        """Tokens per KV head that layer `index` holds after a prefill of `tokens`; None: it depends on the input.

        Between chunks, where `coming` tokens of the prompt are still to be read, a layer also keeps what it needs to
        hold its share of the whole prompt at the end.
        """
        p = self.layers[index]
        if self.blocks is not None:
            complete, local = divmod(tokens, self.blocks.length)
            if index >= self.blocks.split:
                return (self.blocks.held(local),) * p.kv_heads
            return self.decoder.kept(index, complete, (tokens + coming) // self.blocks.length - complete)
        full = p.span(tokens)
        if p.selection is None or not full:
            return (full,) * p.kv_heads
        if p.selection.budget is None:
            return None
        budget, floor = p.selection.resolve(full)
        place, count = self.rank(index)
        now = p.selection.allocation.static(place, count, p.kv_heads, budget, full, floor)
        later = self.kept(index, tokens + coming) if now is not None and coming else None
        if now is None or later is None:
            return now
        return tuple(max(a, min(full, b - coming)) for a, b in zip(now, later, strict=True))

    def bytes(self, batch: int, tokens: int) -> list[LayerBytes]:
        """What each layer's cache will hold after a prefill of `tokens` by `batch` sequences (keys and values)."""
        if self.blocks is not None:
            return self._block_bytes(self.blocks, batch, tokens)
        rows: list[LayerBytes] = []
        for p in self.layers:
            full = p.span(tokens)
            entry = p.dense_width * DTYPE_BYTES[self.dtype] * batch
            dense, dense_read = full * entry, (full + 1) * entry
            if p.owner != p.index:
                read, dense = rows[p.owner].read, 0 if p.shared else dense
                rows.append(LayerBytes(p.index, (0,) * p.kv_heads, 0, 0, dense, read=read, dense_read=dense_read))
                continue
            kept = self.kept(p.index, tokens)
            if kept is not None:
                total = sum(kept)
            elif p.selection is not None and p.selection.budget is not None:
                total = p.selection.resolve(full)[0] * p.kv_heads
            else:
                total = full * p.kv_heads
            shares = kept or split_evenly(total, p.kv_heads)
            lows = [p.low(n, tokens) for n in shares]
            by_row = list(zip(shares, (low or 0 for low in lows), strict=True))
            nbytes = batch * sum(p.nbytes(n, self.dtype, low) for n, low in by_row)
            index, read = (batch * n for n in self.reading(p, shares, tokens, [low for _, low in by_row]))
            host = nbytes if p.storage.offload else 0
            low = None if kept is None or None in lows else tuple(n or 0 for n in lows)
            rows.append(LayerBytes(p.index, kept, total, nbytes, dense, host, index, read, dense_read, low))
        return rows

    def _block_bytes(self, blocks: Blocks, batch: int, tokens: int) -> list[LayerBytes]:
        """The same of a block transformer; what is read is the mean over the decode steps of one block."""
        blockwise = self.decoder.bytes(batch, tokens // blocks.length)
        rows = [replace(row, read=row.read // blocks.length) for row in blockwise]
        for p in self.layers[blocks.split :]:
            held = blocks.held(tokens % blocks.length) if p.owner == p.index else 0
            entry = batch * p.kv_heads * p.nbytes(1, self.dtype)
            read = entry * sum(map(blocks.held, range(blocks.length))) // blocks.length
            kept = (held,) * p.kv_heads
            rows.append(LayerBytes(p.index, kept, sum(kept), held * entry, 0, read=read, low=(0,) * p.kv_heads))
        entries = [batch * p.dense_width * DTYPE_BYTES[self.dtype] for p in self.layers]
        return [
            replace(row, dense_bytes=tokens * entry, dense_read=(tokens + 1) * entry)
            for row, entry in zip(rows, entries, strict=True)
        ]

    def reading(
        self, p: LayerPlan, lengths: Iterable[int], tokens: int, low: Iterable[int] | None = None
    ) -> tuple[int, int]:
        """(bytes of the index, bytes that the next step reads) of rows of `lengths` after a prompt of `tokens`.

        low: how many of each row are in the low tier (None: none). A step reads the token that it adds too, in the
        model's dtype.
        """
        every = itertools.repeat(0) if low is None else low
        rows = [self._reading(p, length, tokens, under) for length, under in zip(lengths, every, strict=False)]
        return sum(index for index, _ in rows), sum(read for _, read in rows)

    def _reading(self, p: LayerPlan, length: int, tokens: int, low: int) -> tuple[int, int]:
        new = (p.latent.width if p.latent else p.head_dim + p.value_dim) * DTYPE_BYTES[self.dtype]
        if p.recall is None:
            return 0, p.nbytes(length, self.dtype, low) + new
        chunk = length if p.selection else self.prefill_chunk or tokens
        covered, groups = p.recall.grouped(length, chunk, p.storage)
        unread = covered - p.recall.tokens(tokens + 1, covered, p.storage.block)
        numbers = p.key_dim * (2 if p.recall.grouping.form == "bounds" else 1)
        index = groups * (numbers * DTYPE_BYTES[self.dtype] + GROUP_BYTES)
        first, each = p.recall.first(p.storage.block), RECEIVED_BYTES if p.recall.grouping.receives else 0
        received, then = (each * max(0, n - first - covered) for n in (length, length + 1))
        return index + received, index + then + p.nbytes(length, self.dtype) - p.encoded_bytes(unread, self.dtype) + new

    def to_json(self) -> dict[str, Any]:
        """Plain dict of the whole plan, for reading and comparing; scores and allocations by class name and fields."""
        return {
            "architecture": self.architecture,
            "dtype": self.dtype,
            "prefill_chunk": self.prefill_chunk,
            "policies": [dataclasses.asdict(a) for a in self.applied],
            "layers": [_plain(p) for p in self.layers],
            **({} if self.blocks is None else {"blocks": dataclasses.asdict(self.blocks)}),
            **({"state_bytes": self.state_bytes} if self.state_bytes else {}),
        }

    def digest(self) -> str:
        """SHA-256 of `to_json`: two plans with the same digest make the same model."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def split_evenly(total: int, rows: int) -> tuple[int, ...]:
    """`total` tokens over rows, the first ones getting the remainder."""
    return tuple(total // rows + (i < total % rows) for i in range(rows))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        known = [f for f in dataclasses.fields(value) if f.name not in LATER or getattr(value, f.name) != f.default]
        fields = {f.name: _plain(getattr(value, f.name)) for f in known}
        return fields if isinstance(value, LayerPlan) else {"type": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def converts(plan: Plan) -> bool:
    """Whether a plan asks for other weights than the model's own."""
    return plan.blocks is not None or reprojects(plan)


def reprojects(plan: Plan) -> bool:
    """Whether it asks for other projections in the attentions."""
    return any(p.reprojects for p in plan.layers)


def centred(plan: Plan) -> int:
    """Tokens of the text over which keys are averaged; 0: keys of no layer are centred."""
    return max(p.storage.centred for p in plan.layers)


def text_wanted(plan: Plan) -> int:
    """Tokens of text that `convert` needs."""
    aligned = [p.heads.tokens for p in plan.layers if p.heads and p.heads.align != "none"]
    return max([*aligned, *(p.latent.tokens for p in plan.layers if p.latent)], default=0)
