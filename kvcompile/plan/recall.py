"""What a step reads of the tokens that are kept, as data that a plan can hold. Names and numbers only (no torch).

A row of the cache is, in this order,

    sinks | group | group | ... | group | recent

Every group is a stretch of entries that are recalled together; a step reads the sinks, the groups that its queries ask
for and the recent entries. The run-time side is `kvcompile.recall`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvcompile.plan.selection import Budget
from kvcompile.plan.storage import Storage

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["vector", "bounds"]
Agreement = Literal["mean", "max"]
Choosing = Literal["own", "shared"]
Far = Literal["original", "constant"]
GROUP_BYTES = 8  # where a group begins and how many entries it has, int32 each
RECEIVED_BYTES = 4  # float32, of an entry behind the groups


@dataclass(frozen=True)
class Entries:
    """What a grouping sees of the entries that it divides, of rows with equally many: `keys [R, n, D]`, as cached.

    unit: sizes of groups must be multiples of it (tokens that share scales). movable: entries may change places.
    received: `[R, n]` float32, the attention that each entry has received since it came, summed over queries and query
    heads; None unless the grouping `receives`.
    """

    keys: Tensor
    unit: int = 1
    movable: bool = True
    received: Tensor | None = None


@dataclass(frozen=True)
class Groups:
    """Entries of R rows, divided into G groups each.

    representatives: `[R, G, D]`, or bounds `[R, G, 2, D]` (smallest and largest of each channel).
    sizes: `[R, G]` int64, tokens; each row's add up to its entries. order: `[R, n]` int64, the entries group by group,
    those first in each that stay where its end is cut off; None: as they lie.
    """

    representatives: Tensor
    sizes: Tensor
    order: Tensor | None = None


@dataclass(frozen=True)
class Grouping:
    """Divides the entries of a row into groups and says what stands for a group. A subclass implements `divide`.

    How much a query q wants a group is, by `form`, with r its representative,

        vector: q . r        bounds: sum_d max(q_d low_d, q_d high_d)
    """

    form: ClassVar[Form] = "vector"
    reorders: ClassVar[bool] = False  # whether entries change places, where they may
    receives: ClassVar[bool] = False  # whether it looks at the attention that entries have received

    @property
    def block(self) -> int:
        """What it divides is a multiple of so many entries."""
        return 1

    def count(self, entries: int, unit: int) -> int:
        """Groups that `entries` entries make."""
        raise NotImplementedError

    def divide(self, entries: Entries) -> Groups:
        """The groups of some entries, `count` of them in each row."""
        raise NotImplementedError


@dataclass(frozen=True)
class Recall:
    """Everything static about what a step reads of a layer.

    policy: who said so, for messages. budget: entries of groups that a KV head reads at a step. sinks: first entries of
    a row, always read and in no group. recent: newest entries that stay out of groups. every: decoded tokens beyond
    these that make new groups together. agree: how the query heads of a KV head agree on a group; queries of a chunk
    ask together, by their mean, and of a prompt's last chunk by the last one. heads: each KV head has its `own` choice,
    or one is `shared` by all, by the sum of what they score. reuse: steps that a choice stands for. prompts: also later
    chunks of a prompt read a choice. far: entries of groups are met at their `original` distance, or all at a
    `constant` one: their keys are turned to position 0, and those behind them lie right after the sinks.
    """

    policy: str
    grouping: Grouping
    budget: Budget
    sinks: int = 16
    recent: int = 0
    every: int = 320
    agree: Agreement = "mean"
    heads: Choosing = "own"
    reuse: int = 1
    prompts: bool = False
    far: Far = "original"

    def step(self, unit: int) -> int:
        """Entries are grouped in multiples of so many."""
        return math.lcm(unit, self.grouping.block)

    def first(self, unit: int) -> int:
        """Entries of a row in front of its groups: the sinks, up to a whole unit."""
        return -(-self.sinks // unit) * unit

    def newest(self, storage: Storage) -> int:
        """Newest entries that stay out of groups: those that are not encoded yet are among them."""
        return max(self.recent, storage.residual)

    def groupable(self, length: int, covered: int, unit: int, newest: int) -> int:
        """How many entries of a row of `length`, of which `covered` are in groups, can be grouped now."""
        step = self.step(unit)
        return max(0, length - self.first(unit) - covered - newest) // step * step

    def tokens(self, seen: int, covered: int, unit: int) -> int:
        """Entries of groups that a row reads, where `covered` are in groups, after `seen` tokens."""
        wanted = self.budget.of(seen)
        return min(covered, max(unit, wanted // unit * unit))

    def grouped(self, length: int, chunk: int, storage: Storage) -> tuple[int, int]:
        """(entries in groups, groups) of a row that has grown to `length` by `chunk` entries at a time."""
        unit, newest = storage.block, self.newest(storage)
        step, chunk = self.step(unit), max(1, chunk)

        def covered(end: int) -> int:
            return self.groupable(end, 0, unit, newest)

        chunks = max(0, length - 1) // chunk  # before the last one
        begin = min(chunks, -(-(self.first(unit) + newest + step) // chunk))  # after which the first groups are made
        small, early, late = chunk // step * step, covered(begin * chunk), covered(chunks * chunk)
        larger = (late - early - (chunks - begin) * small) // step  # chunks that group a step more than the others do
        sizes = ((early, 1), (small, chunks - begin - larger), (small + step, larger), (covered(length) - late, 1))
        return covered(length), sum(n * self.grouping.count(size, unit) for size, n in sizes if size and n)
