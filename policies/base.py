"""What a policy is: a frozen dataclass whose fields are its schema, and one method, `apply(plan) -> plan`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Family, LayerPlan, Plan
from kvcompile.plan.policy import Policy
from kvcompile.plan.selection import Allocation, Budget, Needs, Schedule, Score, Selection, Uniform

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class CarriedScore(Score):
    """Base of the scores that every query updates once: one number per entry, carried from one scoring to the next.

    s[h, j] starts at 0 where entry j is new; `update` says what the attention of some queries makes of it.
    """

    @property
    def needs(self) -> Needs:
        """Every query once."""
        return Needs(queries=None, carries=True)

    def update(self, state: Tensor, query_positions: Tensor, attention: Tensor, seen: Observation) -> Tensor:
        """`state [H_kv, n]` after queries at positions `query_positions [w]`, whose attention is `[H_kv, g, w, n]`."""
        raise NotImplementedError

    def observe(self, seen: Observation) -> Tensor:
        """The numbers with the new queries in them, `[H_kv, n]`, float32."""
        import torch

        state = (
            torch.zeros(seen.positions.shape, device=seen.keys.device, dtype=torch.float32)
            if seen.carried is None
            else seen.carried
        )
        for query_positions, attention in seen.attention_blocks():
            state = self.update(state, query_positions, attention, seen)
        return state if seen.column_sums is None else self.receive(state, seen.column_sums)

    def receive(self, state: Tensor, column_sums: Tensor) -> Tensor:
        """`state [H_kv, n]` after queries of which only sums came (where `needs.reduce` is `sum`)."""
        raise NotImplementedError

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`: the numbers as carried."""
        if seen.carried is None:
            raise RuntimeError(f"{type(self).__name__} is scored before it was observed")
        return seen.carried


@dataclass(frozen=True)
class TokenPolicy(Policy):
    """Base of the policies that keep some tokens: what always stays, and when the others are dropped.

    sinks: first tokens always kept. decode_every: evict again after so many decoded tokens (0: never).
    between_chunks: evict after each prefill chunk, not only after the last (see `prefill_chunk`).
    skip_layers: layers left whole.
    """

    family: ClassVar[Family] = "selection"
    sinks: int = 4
    decode_every: int = 0
    between_chunks: bool = True
    skip_layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.require(self.sinks >= 0, "sinks", "0 or more")
        self.require(self.decode_every >= 0, "decode_every", "0 or more")

    def selection(self) -> Selection:
        """The whole selection as data."""
        raise NotImplementedError

    def apply(self, plan: Plan) -> Plan:
        """Give every layer but the skipped ones this selection."""
        return choose(plan.record(self.name, self.family), self.selection(), self.skip_layers)


@dataclass(frozen=True)
class SelectionPolicy(TokenPolicy):
    """Base of the policies that rank tokens: a score, under a budget. A subclass says how entries are ranked.

    budget: fraction of the tokens seen (<= 1) or tokens (> 1), per KV head.

    Examples:
        >>> from dataclasses import dataclass
        >>> from typing import ClassVar
        >>> from kvcompile.adapters.architectures import describe
        >>> from kvcompile.compiler import compile_plan
        >>> from kvcompile.plan.selection import Score
        >>> from kvcompile.policies.base import SelectionPolicy
        >>> class ValueNorm(Score):
        ...     def score(self, seen):  # [H_kv, n], the highest stay
        ...         return seen.values.float().norm(dim=-1)
        >>> @dataclass(frozen=True)
        ... class VNorm(SelectionPolicy):
        ...     name: ClassVar[str] = "vnorm"
        ...     summary: ClassVar[str] = "tokens whose values have the largest norm"
        ...     def score(self):
        ...         return ValueNorm()
        >>> plan = VNorm(budget=0.25).apply(describe(model.config))
        >>> compile_plan(model, plan)(ids).past_key_values.lengths()[0]
        [25, 25]
    """

    budget: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_budget(self, self.budget)

    def score(self) -> Score:
        """How entries are ranked."""
        raise NotImplementedError

    def allocation(self) -> Allocation:
        """How the budget is split over layers and heads."""
        return Uniform()

    @property
    def recent(self) -> int | float:
        """Newest tokens that always stay; below 1, a fraction of the budget."""
        return 0

    def selection(self) -> Selection:
        """The whole selection as data."""
        return Selection(
            policy=self.name,
            score=self.score(),
            budget=Budget(self.budget),
            allocation=self.allocation(),
            schedule=self.schedule(),
            sinks=self.sinks,
            recent=self.recent,
        )

    def schedule(self) -> Schedule:
        """When tokens are dropped."""
        return Schedule(self.between_chunks, self.decode_every)


@dataclass(frozen=True)
class AllocationPolicy(Policy):
    """Base of the policies that split a budget: over the selection before them in the stack, or over `score` alone.

    After a score policy (`policy=[expected_attention,adakv]`) only the allocation changes; alone, the policy named by
    `score` is taken as it comes. The other fields override what that selection says; null leaves it.

    score: name of a policy that ranks tokens (null: the one before in the stack, else `default_score`).
    budget: fraction of the tokens seen (<= 1) or tokens (> 1), mean over KV heads.
    sinks: first tokens always kept. decode_every: evict again after so many decoded tokens (0: never).
    between_chunks: evict after each prefill chunk, not only after the last.
    skip_layers: layers left as they are.
    """

    family: ClassVar[Family] = "selection"
    default_score: ClassVar[str]
    score: str | None = None
    budget: float | None = None
    sinks: int | None = None
    decode_every: int | None = None
    between_chunks: bool | None = None
    skip_layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.budget is not None:
            require_budget(self, self.budget)
        self.require(self.sinks is None or self.sinks >= 0, "sinks", "0 or more")
        self.require(self.decode_every is None or self.decode_every >= 0, "decode_every", "0 or more")

    def allocation(self) -> Allocation:
        """How the budget is split over layers and heads."""
        raise NotImplementedError

    def alone(self) -> Selection:
        """What is allotted where no selection comes before in the stack."""
        return replace(scored_by(self.score or self.default_score), policy=self.name)

    def over(self, before: Selection) -> Selection:
        """The selection `before` with this allocation and what this policy overrides."""
        schedule = replace(
            before.schedule,
            between_chunks=before.schedule.between_chunks if self.between_chunks is None else self.between_chunks,
            decode_every=before.schedule.decode_every if self.decode_every is None else self.decode_every,
        )
        return replace(
            before,
            policy=before.policy if self.budget is None else self.name,
            budget=before.budget if self.budget is None else Budget(self.budget),
            allocation=self.allocation(),
            schedule=schedule,
            sinks=before.sinks if self.sinks is None else self.sinks,
        )

    def apply(self, plan: Plan) -> Plan:
        """Replace the allocation of the layers that select; where none does, give every layer a selection.

        Raises KvcompileError where another policy allots already, or where two policies name the score.
        """
        plan = plan.record(self.name, self.family)
        if not plan.selected:
            return choose(plan, self.over(self.alone()), self.skip_layers)
        require_layers(plan, self.name, self.skip_layers)
        if self.score is not None:
            raise KvcompileError(
                "a layer has only one score",
                f"stack.{self.name}.score={self.score} after {plan.applied[-2].name!r}",
                f"drop stack.{self.name}.score, or the policy before it",
            )
        return plan.map(self._reallot, [p.index for p in plan.layers if p.index not in self.skip_layers])

    def _reallot(self, p: LayerPlan) -> LayerPlan:
        if p.selection is None:
            return p
        if p.selection.allocation != Uniform():
            raise KvcompileError(
                f"layer {p.index}: a layer has only one allocation",
                f"{self.name!r} after {p.selection.policy!r}",
                f"drop one; {self.name} goes after a policy that only ranks tokens",
            )
        return replace(p, selection=self.over(p.selection))


def scored_by(name: str, **options: Any) -> Selection:
    """The selection of the policy called `name`, which must be one that ranks tokens (`SelectionPolicy`).

    Raises KvcompileError for an unknown name, a policy without a score, or one whose text is read again.
    """
    from kvcompile.stack import discover, policy_class

    cls = policy_class(name)
    if not issubclass(cls, SelectionPolicy):
        known = [n for n, c in discover().items() if issubclass(c, SelectionPolicy)]
        raise KvcompileError("score must name a policy that ranks tokens", repr(name), f"one of {', '.join(known)}")
    selection = cls(**options).selection()
    if selection.schedule.replay is not None:
        raise KvcompileError(
            f"{name} has the text read again before it selects, and brings the prompts for that itself",
            f"score={name}",
            f"policy=[{name},<the policy that splits or stores>], without score",
        )
    return selection


def require_budget(policy: Policy, budget: float) -> None:
    """Range check of a budget. Raises KvcompileError."""
    whole = budget > 1 and float(budget).is_integer()
    policy.require(0 < budget <= 1 or whole, "budget", "in (0, 1] or a whole number of tokens")


def require_layers(plan: Plan, policy: str, layers: list[int], name: str = "skip_layers") -> None:
    """Raise KvcompileError if the field `name` names a layer that the model has not."""
    outside = [i for i in layers if not 0 <= i < len(plan.layers)]
    if outside:
        raise KvcompileError(f"stack.{policy}: {name} must be in 0..{len(plan.layers) - 1}", outside)


def choose(plan: Plan, selection: Selection, skip_layers: list[int]) -> Plan:
    """The plan with `selection` on every layer not skipped. Raises KvcompileError if another policy selects there."""
    require_layers(plan, selection.policy, skip_layers)

    def give(p: LayerPlan) -> LayerPlan:
        if p.selection is not None:
            raise KvcompileError(
                f"layer {p.index}: a layer has only one selection",
                f"{selection.policy!r} after {p.selection.policy!r}",
                "drop one; two recombine only as a score and then an allocation, as in policy=[snapkv,adakv]",
            )
        return replace(p, selection=selection)

    return plan.map(give, [p.index for p in plan.layers if p.index not in skip_layers])
