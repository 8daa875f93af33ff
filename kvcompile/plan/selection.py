"""Which tokens stay: score x allocation x schedule, as data that a plan can hold.

This module has names and numbers only (no torch at import): the tensors arrive in
`kvcompile.runtime.observation.Observation`, the run-time side is `kvcompile.runtime.eviction`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvcompile.errors import KvcompileError
from kvcompile.plan.ghost import GhostRule

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation

Scope = Literal["layer", "head"]


@dataclass(frozen=True)
class Budget:
    """How many tokens a KV head may keep: `value` <= 1 is a fraction of the tokens seen, above 1 a count of tokens."""

    value: float

    def of(self, tokens: int) -> int:
        """Tokens kept out of `tokens` seen: never more than there are, never fewer than one."""
        wanted = int(self.value * tokens + 1e-6) if self.value <= 1 else int(self.value)
        return max(1, min(wanted, tokens))


@dataclass(frozen=True)
class Needs:
    """What a score must see of a layer. What it does not ask for is neither remembered nor computed.

    queries: how many of the newest queries; None: every query since it last scored.
    reduce: `sum` or `mean` where it sees the attention of its `queries` to each entry as that alone. A kernel then
        adds that up, and it comes as `Observation.column_sums` or as `Observation.window_attention`.
    carries: it keeps one number per cached entry from one scoring to the next (see `Score.observe`).
    chunk: it counts queries in chunks of so many positions of the text (1: as they come; None: all together), no longer
        than the layer's sliding window. Those of an unfinished chunk wait until it is read or a selection is due, so
        that one pass is passes of any size.
    rotation: by how many positions it turns queries on (`Observation.rotation`), so that angles must not depend on the
        length of the prompt; 0: it turns none.
    moments: mean and covariance of every how many-th query before rotation (1: of all); 0 none.
    norms: how long what an entry adds is, and the states to which its queries add it (only under a `Replay`).
    absolute: it measures keys themselves, not only what queries make of their differences.
    traceable: `score` is made of tensor operations alone, as an exported program needs it.

    Raises KvcompileError for a value out of range.
    """

    queries: int | None = 0
    reduce: Literal["sum", "mean"] | None = None
    carries: bool = False
    chunk: int | None = 1
    rotation: int = 0
    moments: int = 0
    norms: bool = False
    absolute: bool = False
    traceable: bool = True

    def __post_init__(self) -> None:
        if self.reduce not in (None, "sum", "mean"):
            raise KvcompileError("Needs: reduce must be None, 'sum' or 'mean'", repr(self.reduce))
        if (self.queries is not None and self.queries < 0) or self.moments < 0:
            raise KvcompileError("Needs: queries and moments are counts", f"{self.queries} and {self.moments}")
        if self.rotation < 0:
            raise KvcompileError("Needs: queries are turned on by 0 positions or more", self.rotation)
        if self.chunk is not None and self.chunk < 1:
            raise KvcompileError("Needs: a chunk has 1 position or more", self.chunk)
        if self.chunk != 1 and not (self.carries and self.queries is None and self.reduce is None):
            raise KvcompileError(
                "Needs: queries counted in chunks are all queries, which a score sees itself and carries the sum of",
                f"chunk {self.chunk}, queries {self.queries}, reduce {self.reduce}, carries {self.carries}",
            )

    def together(self, window: int | None) -> int | None:
        """Positions of a chunk in a layer with this sliding window; None: no end."""
        ends = [length for length in (self.chunk, window) if length is not None]
        return min(ends) if ends else None


@dataclass(frozen=True)
class Traits:
    """How an allocation splits a budget.

    scope: `head` if the heads of one layer may keep different numbers of tokens.
    cross_layer: it must see the scores of all layers before any of them is compressed.
    traceable: `allot` is made of tensor operations alone, with nothing read back; there must be a `most` then.
    competing: the heads of a layer compete for what it gets, so that one of them may take nearly all.
    compares: scores of different layers are ranked together, so that they should be `Score.comparable`.
    """

    scope: Scope = "layer"
    cross_layer: bool = False
    traceable: bool = False
    competing: bool = False
    compares: bool = False


@dataclass(frozen=True)
class Score:
    """Ranks the cached entries of one sequence in one layer; the highest stay.

    A subclass says what it must see (`needs`) and implements `score`. `comparable`: its values mean the same in every
    layer and head, so that they may be ranked together. `mixes_heads`: what it says of a KV head depends on others too,
    so that machines which have some heads each cannot tell.
    """

    comparable: ClassVar[bool] = False
    mixes_heads: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        """What it must see; a subclass may say it as a class attribute, `needs = Needs(queries=32)`.

        Not a field (no annotation): it follows from the fields, so a plan does not hold it.
        """
        return Needs()

    def ghost_rule(self, scale: float, softcap: float | None, window: int | None) -> GhostRule | None:
        """What it asks `Observation.ghost` for in a layer with this attention; None: nothing."""
        return None

    def observe(self, seen: Observation) -> Tensor:
        """New per-entry state `[H_kv, n]`, from the state so far and the new queries (only where `needs.carries`)."""
        raise NotImplementedError

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`, float32, higher = keep; entries past a row's end are ignored."""
        raise NotImplementedError


@dataclass(frozen=True)
class LayerScores:
    """What an allocation sees of one layer of one sequence: scores, row lengths, and what the layer may keep.

    In a trace `budget` and `floor` are tensors of one number, `[1]`.
    """

    scores: Tensor  # [H_kv, n] float32; protected entries +inf, entries past a row's end -inf
    mass: Tensor | None  # [H_kv, n] attention mass of the last queries, where the selection asks for `uncertainty`
    lengths: Tensor  # [H_kv] int64, entries held
    budget: int | Tensor  # tokens a head keeps on average
    floor: int | Tensor  # protected tokens (sinks and recent ones) that every head keeps
    newest: int = 0  # true position of the newest token


@dataclass(frozen=True)
class Demand:
    """What a layer may keep of the `tokens` that its `heads` hold: `budget` a head on average, `floor` at least."""

    heads: int
    budget: int
    floor: int
    tokens: int


@dataclass(frozen=True)
class Allocation:
    """Splits a budget over the rows (layers x KV heads) of one sequence.

    `static` answers when the split is known before any input is seen, `allot` when it depends on the scores.
    The sum of what `allot` returns equals the sum of `budget * H_kv` over the layers it was given
    (or the rows' lengths, where those are shorter).
    """

    @property
    def traits(self) -> Traits:
        """How it splits; a subclass may say it as a class attribute, `traits = Traits(scope="head")`."""
        return Traits()

    def static(
        self, layer: int, layers: int, heads: int, budget: int, tokens: int, floor: int
    ) -> tuple[int, ...] | None:
        """Tokens per head that `layer` (of the `layers` selected ones) keeps of `tokens`; None: ask `allot`."""
        return None

    def allot(self, layers: Sequence[LayerScores]) -> list[Tensor]:
        """Tokens per head, one int64 `[H_kv]` for each given layer."""
        raise NotImplementedError

    def most(self, layers: Sequence[Demand]) -> list[int]:
        """The most entries that a head of each layer may get, whatever the scores (where heads compete: a mean head).

        Asked where `traits.traceable`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every head of every layer keeps the same number of tokens."""

    def static(self, layer: int, layers: int, heads: int, budget: int, tokens: int, floor: int) -> tuple[int, ...]:
        """`(budget,) * heads`."""
        return (min(tokens, max(budget, floor)),) * heads


Ids = tuple[int, ...]


@dataclass(frozen=True)
class Replay:
    """How a model repeats what it has read, once more before each selection.

    What came since the last replay is cut into pieces of `chunk` tokens. For each the model reads `first` (at the start
    of the text) or `later` and the `overlap` tokens before the piece, then `closing`, then the piece itself. A score
    sees what the queries of that pay to the sinks, the piece and the replay; nothing of it stays in the cache.
    `first`, `later` and `closing` are token ids: None until a tokenizer has made them.
    `scores`: scores see the queries of that alone; else they rank what the first reading has shown, as ever.
    """

    chunk: int
    overlap: int
    first: Ids | None = None
    later: Ids | None = None
    closing: Ids | None = None
    scores: bool = True


@dataclass(frozen=True)
class Schedule:
    """When a selection is applied: always at the end of a prefill, and where switched on more often."""

    between_chunks: bool = True  # also after every prefill chunk (bounds the peak), not only after the last
    decode_every: int = 0  # also after this many decoded tokens; 0: never
    replay: Replay | None = None  # what is read again before it is applied


@dataclass(frozen=True)
class Refit:
    """What stays gets other values, so that queries of a replay get what the whole cache would give them.

    policy: that asks for it. queries: of each piece and query head, how many are asked, spread evenly over the piece.
    ridge: how dear a change is, as a multiple of the mean weight that the asked queries give an entry, squared.
    most: heads that keep a larger share of their entries have nothing to make up for. recent: newest tokens that keep
    their values.
    """

    policy: str
    queries: int
    ridge: float
    most: float
    recent: int


@dataclass(frozen=True)
class Tiers:
    """Which of the entries that stay are held in high precision; the others go to the low tier (`Storage.low`).

    share: of the entries that a head keeps, the part with the highest scores is high; those that always stay in any
    case. alpha: in its place, entries whose score is alpha / (tokens seen) or more; how many depends on the input.
    prune: where given, every decoded token may push one entry down: the weakest by the mean attention it has received,
    which `Selection.uncertainty` begins, goes to the low tier below alpha / (tokens seen), and out below prune /
    (tokens seen). None: entries change their tier when the selection is applied.
    """

    share: float = 1.0
    alpha: float | None = None
    prune: float | None = None

    def high(self, kept: int, floor: int) -> int | None:
        """How many of the `kept` entries of a head are high, `floor` of which always stay; None: by the input."""
        if self.alpha is not None:
            return None
        return min(kept, max(floor, int(self.share * kept + 1e-6)))


@dataclass(frozen=True)
class Selection:
    """Everything static about which tokens a layer keeps.

    `budget` None means a threshold decides: the allocation then sees budget = row length.
    `sinks` first and `recent` last tokens of a sequence are always kept and count towards the budget;
    `recent` below 1 is a fraction of the budget (see `protected`).
    `tiers`: what stays is held in two precisions. `refit`: it gets other values.
    `uncertainty` is a second score whose values reach the allocation as `LayerScores.mass`.
    """

    policy: str
    score: Score
    budget: Budget | None
    allocation: Allocation = Uniform()
    schedule: Schedule = Schedule()
    sinks: int = 0
    recent: int | float = 0
    uncertainty: Score | None = None
    positions: Literal["original", "compact"] = "original"
    tiers: Tiers | None = None
    refit: Refit | None = None

    @property
    def replays(self) -> bool:
        """Whether its score counts the queries of a replay in place of those that read the text."""
        return self.schedule.replay is not None and self.schedule.replay.scores

    @property
    def replayer(self) -> str:
        """The policy for which a text is read again."""
        return self.policy if self.refit is None else self.refit.policy

    @property
    def demotes(self) -> bool:
        """Whether every decoded token may push an entry into the low tier, or out."""
        return self.tiers is not None and self.tiers.prune is not None

    @property
    def averages(self) -> bool:
        """Whether a score of it sees the newest queries as their mean attention."""
        return "mean" in (self.score.needs.reduce, self.uncertainty and self.uncertainty.needs.reduce)

    @property
    def mixes_units(self) -> bool:
        """Whether scores that may mean something else in every layer are ranked together."""
        return self.allocation.traits.compares and not self.score.comparable

    def protected(self, budget: int) -> tuple[int, int]:
        """(first tokens, last tokens) that always stay, where a head may keep `budget` tokens.

        A fraction `recent` is cut to what the sinks leave of the budget; counts are taken as they are.
        """
        if 0 < self.recent < 1:
            return self.sinks, min(int(self.recent * budget), max(0, budget - self.sinks))
        return self.sinks, int(self.recent)

    def resolve(self, tokens: int) -> tuple[int, int]:
        """(tokens a head keeps on average, those of them that always stay) out of `tokens` seen."""
        budget = self.budget.of(tokens) if self.budget else tokens
        floor = min(tokens, sum(self.always(tokens)))
        return max(budget, floor), floor

    def always(self, tokens: int) -> tuple[int, int]:
        """(first tokens, last tokens) that stay of `tokens` seen."""
        return self.protected(self.budget.of(tokens) if self.budget else tokens)

    def spares(self, tokens: int) -> bool:
        """Whether the budget holds all of `tokens` seen in one precision, so that nothing is scored.

        A threshold may drop any, and tiers want to know which are high.
        """
        return self.budget is not None and self.tiers is None and self.resolve(tokens)[0] >= tokens
