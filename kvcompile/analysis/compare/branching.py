"""One dense prefill, many stacks: each is applied to a copy of the same cache, so that the prompt is paid for once.

Equal to compiling each stack by itself for selections that act after a prefill in one piece. `decode`, `loss` and
`says` go on densely over what a branch holds; the model of `compiled` goes on as the stack itself does, which reads a
part, evicts and encodes while it decodes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvcompile.adapters.architectures import describe
from kvcompile.calibration.probe import Everything
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import LayerPlan, Plan, converts
from kvcompile.plan.selection import Needs, Schedule, Score, Selection
from kvcompile.policies.expected_attention import ExpectedAttention
from kvcompile.runtime.cache import KVCache, Step
from kvcompile.runtime.replay.finish import select
from kvcompile.runtime.replay.replay import replay
from kvcompile.stores.encoded.quantized import QuantizedStore
from kvcompile.stores.encoded.tiered import TieredStore

SCORINGS = 32  # different ways to rank whose numbers stay in memory, of each prompt


@dataclass(frozen=True)
class Recorder(Score):
    """Remembers all queries and the moments of every `stride`-th, keeps everything."""

    stride: int

    @property
    def needs(self) -> Needs:
        """All of them, before rotation too."""
        return Needs(queries=1 << 30, moments=self.stride)

    def score(self, seen: Any) -> Tensor:
        """Zeros."""
        return torch.zeros(seen.keys.shape[:2], dtype=torch.float32, device=seen.keys.device)


@dataclass(frozen=True)
class Once(Score):
    """The score `of`, computed once for all the stacks that rank by it: what is `known` is looked up."""

    of: Score
    known: dict[Any, Tensor] = field(compare=False)

    @property
    def needs(self) -> Needs:
        """Those of the score itself."""
        return self.of.needs

    def observe(self, seen: Any) -> Tensor:
        """As the score does, where it has not."""
        return self._once("observe", seen)

    def score(self, seen: Any) -> Tensor:
        """As the score does, where it has not."""
        return self._once("score", seen)

    def _once(self, what: str, seen: Any) -> Tensor:
        key = what, self.of, seen.layer
        if key not in self.known:
            self.known[key] = getattr(self.of, what)(seen)
        return self.known[key]


@dataclass
class Room:
    """How many beginnings of prompts stay in memory (`most`), of all readers that share it; how many do (`taken`)."""

    most: int = 1
    taken: int = 0


@dataclass(frozen=True)
class _Read:
    """The beginning of prompts as it was read: its cache, the logits after it, and scores of its entries."""

    ids: list[int]
    cache: KVCache | None
    logits: Tensor | None
    scores: dict[Any, Any]


class Branching:
    """A model prefilled once per prompt; `branch(plan)` gives the cache that a stack would have left.

    stride: of the moments of queries, alike in all stacks that look at them. rotated: keys and values lie in the
    Hadamard basis, which a stack with `rotate` needs and no other may have. centred: keys are less their mean over so
    many tokens of text that `tokenizer` reads, as a stack with `center` needs. room: of shared beginnings of
    prompts, which stay in memory with the scores of their entries. Beyond that the newest gives way, but one stays in
    any case: who reads the same prompts in turns finds the first ones again.
    """

    def __init__(
        self,
        model: Any,
        stride: int = ExpectedAttention().stride,
        rotated: bool = False,
        kernels: str = "auto",
        room: Room | None = None,
        centred: int = 0,
        tokenizer: Any = None,
    ) -> None:
        identity = describe(model.config, str(model.dtype).removeprefix("torch."))
        identity = identity.map(lambda p: replace(p, storage=replace(p.storage, rotated=rotated, centred=centred)))
        recorder = Selection("recorder", Recorder(stride), None, Everything(), Schedule(True, 1 << 30))
        self.base, self.identity, self.stride, self.tokenizer = model, identity, stride, tokenizer
        recorded = identity.map(lambda p: replace(p, selection=recorder))
        self.model = compile_plan(shared(model), recorded, kernels, tokenizer)
        self.ids: list[int] = []
        self.cache: KVCache | None = None
        self.logits: Tensor | None = None
        self.room, self._aside = room or Room(), list[_Read]()
        self._scores: dict[Any, Any] = {}  # of what has been read

    def prefill(self, ids: Sequence[int]) -> None:
        """Run the prompt densely."""
        self.cache, self.ids = None, []
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Read on densely: more of the prompt."""
        with torch.no_grad():
            out = self.model(self._tensor(ids), past_key_values=self.cache, logits_to_keep=1)
        self.cache, self.logits, self.ids = out.past_key_values, out.logits[:, -1], [*self.ids, *ids]
        self._scores = {}

    def read(self, ids: Sequence[int], shared: int = 0) -> None:
        """Have read `ids` and nothing else: what has been read already is not read again.

        shared: so many of the first tokens begin other prompts too: what is read of them alone is put aside.
        """
        if shared and not any(each.ids == list(ids[:shared]) for each in self._aside):
            self._go_on_to(ids[:shared])
            if self._aside and self.room.taken >= self.room.most:
                self._aside.pop()
                self.room.taken -= 1
            self._aside.append(_Read(self.ids, self.cache, self.logits, self._scores))
            self.room.taken += 1
        self._go_on_to(ids)

    def _go_on_to(self, ids: Sequence[int]) -> None:
        begun = [each for each in self._aside if _begins(ids, each.ids)]
        if not _begins(ids, self.ids) and begun:
            longest = max(begun, key=lambda each: len(each.ids))
            self.ids, self.cache, self.logits = longest.ids, longest.cache, longest.logits
            self._scores = longest.scores
        if not _begins(ids, self.ids):
            self.prefill(ids)
        elif len(self.ids) < len(ids):
            if self.cache is not None and any(self.cache is each.cache for each in self._aside):
                self.cache = self.cache.fork()
            self.extend(ids[len(self.ids) :])

    def compiled(self, plan: Plan) -> Any:
        """The model of a stack over the same weights: it goes on with the branches of its plan."""
        return compile_plan(shared(self.base), plan, tokenizer=self.tokenizer)

    def serves(self, plan: Plan) -> bool:
        """Whether a stack of this plan reads a prompt as this does: all at once, with the weights as they are."""
        wanted = {p.selection.score.needs.moments for p in plan.selected if p.selection} - {0, self.stride}
        reads_in_part = any(p.recall is not None and p.recall.prompts for p in plan.layers)
        return not (plan.prefill_chunk or wanted or reads_in_part or self._rewrites(plan))

    def _rewrites(self, plan: Plan) -> bool:
        stored = [(p.storage.rotated, p.storage.centred) for p in (*plan.layers, *self.identity.layers)]
        return converts(plan) or len(set(stored)) > 1

    def branch(self, plan: Plan) -> KVCache:
        """A copy of the cache after the selection, grouping and encoding of `plan`.

        Raises KvcompileError for a plan whose prefill would be another one: it changes weights or the moments' stride.
        """
        if self._rewrites(plan):
            raise KvcompileError("one prefill serves only stacks that leave the weights alone", str(plan.applied))
        strides = {p.selection.score.needs.moments for p in plan.selected if p.selection} - {0, self.stride}
        if strides:
            raise KvcompileError(f"one prefill has moments of every {self.stride}th query", f"stride {strides}")
        if self.cache is None:
            raise RuntimeError("prefill first")
        while len(self._scores) > SCORINGS * len(plan.layers):
            del self._scores[next(iter(self._scores))]  # the oldest
        branch = KVCache(plan, self.cache.rotaries, self.cache.backend)
        branch.seen = list(self.cache.seen)
        for mine, theirs in zip(branch.layers, self.cache.layers, strict=True):
            changed = mine.plan.recall or (mine.plan.selection and mine.plan.selection.refit)
            copied = copy.deepcopy if changed else copy.copy  # its entries may change places or values
            mine.store, mine.columns, mine.is_initialized = copied(theirs.store), theirs.columns, True
            segments = [copy.copy(s) for s in theirs.history.segments]
            mine.history = replace(theirs.history, segments=segments, received={})  # counted for this stack alone
            if mine.plan.storage.quantized:
                kind = QuantizedStore if mine.plan.storage.low is None else TieredStore
                mine.store = kind(mine.plan.storage, mine.store)
        if branch.transcript is not None:
            branch.transcript.add(self._tensor(self.ids), None)
            if any(p.selection is not None and p.selection.replays for p in plan.selected):
                self._replay(branch)
        step = Step(branch, self._tensor([0]), None, prefill=True, last=True)
        select(step, plan.map(self._ranked), compiled=self.model.kvcompile)
        return branch

    def _replay(self, branch: KVCache) -> None:
        """Have a branch carry what a replay counts; it is read once for all stacks that ask for the same."""
        selections = [(p.index, p.selection) for p in branch.plan.selected if p.selection is not None]
        asked = tuple((i, s.score, s.schedule.replay, s.sinks) for i, s in selections)
        if asked not in self._scores:
            replay(self.model.kvcompile, branch, [True])
            counted = [branch.layers[i].history.carried for i, _ in selections]
            if any(carried is None for carried in counted):
                return  # this budget holds all of it, so that nothing was read
            self._scores[asked] = counted
        elif branch.transcript is not None:
            branch.transcript.done(0)  # a later turn repeats what comes from here on
        for (i, _), carried in zip(selections, self._scores[asked], strict=True):
            branch.layers[i].history.carried = list(carried)

    def _ranked(self, p: LayerPlan) -> LayerPlan:
        """The layer with its score computed once; as it is where it compares two, or a replay has counted it."""
        s = p.selection
        if s is None or s.demotes or s.replays:
            return p
        return replace(p, selection=replace(s, score=Once(s.score, self._scores)))

    def decode(self, cache: KVCache, count: int) -> list[int]:
        """Greedy continuation of the prompt over a branch."""
        token = self._first()
        out = []
        for _ in range(count):
            out.append(int(token))
            logits = self._forward(token.view(1, 1), cache)
            token = logits[:, -1].argmax(-1)
        return out

    def loss(self, cache: KVCache, ids: Sequence[int]) -> float:
        """Mean negative log-likelihood of the true continuation `ids` over a branch, in one causal pass."""
        return float(torch.nn.functional.cross_entropy(self._forced(cache, ids), self._tensor(ids)[0]))

    def says(self, cache: KVCache, wordings: Sequence[Sequence[int]]) -> int | None:
        """The token that follows if greedy decoding over a branch says one of `wordings`, None if it says none.

        One causal pass. The wordings must differ in their first token, which the prefill has decided already.
        """
        start = int(self._first())
        said = next((w for w in wordings if w[0] == start), None)
        if said is None:
            return None
        logits = self._forced(cache, said, last=True).argmax(-1).tolist()
        return int(logits[-1]) if logits[:-1] == list(said) else None

    def _forced(self, cache: KVCache, ids: Sequence[int], last: bool = False) -> Tensor:
        """Logits `[n, vocabulary]` that predict `ids` (with `last`: and what follows); nothing more is evicted."""
        if self.logits is None:
            raise RuntimeError("prefill first")
        cache.plan = self.identity
        for layer, plan in zip(cache.layers, self.identity.layers, strict=True):
            layer.plan = plan
        after = self._forward(self._tensor(ids), cache)[0]
        return torch.cat([self.logits, after if last else after[:-1]])

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], dtype=torch.int64, device=self.base.device)

    def _first(self) -> Tensor:
        if self.logits is None:
            raise RuntimeError("prefill first")
        return self.logits.argmax(-1)

    def _forward(self, ids: Tensor, cache: KVCache) -> Tensor:
        start = cache.get_seq_length()
        at = torch.arange(start, start + ids.shape[1], device=ids.device, dtype=torch.int64).unsqueeze(0)
        if cache.shift is not None:
            at = at - cache.shift.unsqueeze(1)
        with torch.no_grad():
            logits: Tensor = self.model.kvcompile.graph(ids, None, at, cache, slice(None))
        return logits


def _begins(ids: Sequence[int], with_these: Sequence[int]) -> bool:
    return len(with_these) > 0 and list(ids[: len(with_these)]) == list(with_these)
