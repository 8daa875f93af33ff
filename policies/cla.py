"""CLA: some layers have keys and values, the others read those of a layer before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Family, LayerPlan, Plan
from kvcompile.plan.policy import Calibrator, Policy
from kvcompile.plan.structure import Fold

Variant = Literal["uniform", "keep_ends", "dense_front", "dense_back"]
Pairs = Literal["fixed", "kv", "activations"]


@dataclass(frozen=True)
class CLA(Policy):
    """One layer in `share` owns a cache, the next ones read it (arXiv 2405.12981). Untrained, heal the result.

    share: layers that read one cache, its owner included.
    variant: `uniform` groups of neighbours; `keep_ends` the same without the first and the last layer; `dense_front`
    and `dense_back` as many owners at one end, and a single shared cache for the rest.
    pairs: `fixed` as the variant says, or chosen by similarity of layers (their `kv`, or the `activations` that their
    attention reads) on `tokens` tokens of text: the most and the least similar layers are both tried (the latter is
    KVSharer's choice, 2410.18517), and the pattern that changes the model's output less is taken.
    pattern: owner of each layer, as in `[0,0,2,2]`; given, or found by calibration, it overrides the rest.
    fold: owners keep their `owner` weights, or take the `mean` of their readers' (`successive`: see MLKV).
    tokens: length of the text that pairs are chosen on.
    """

    name: ClassVar[str] = "cla"
    family: ClassVar[Family] = "structure"
    summary: ClassVar[str] = "layers read the KV of a layer before them (needs healing)"
    share: int = 2
    variant: Variant = "uniform"
    pairs: Pairs = "fixed"
    pattern: list[int] = field(default_factory=list)
    fold: Fold = "owner"
    tokens: int = 512

    def __post_init__(self) -> None:
        self.require(self.share >= 1, "share", "1 or more")
        variants = ("uniform", "keep_ends", "dense_front", "dense_back")
        self.require(self.variant in variants, "variant", ", ".join(variants))
        self.require(self.pairs in ("fixed", "kv", "activations"), "pairs", "fixed, kv or activations")
        self.require(
            self.pairs == "fixed" or self.variant == "uniform", "variant", "uniform where pairs are calibrated"
        )
        self.require(self.fold in ("owner", "mean", "successive"), "fold", "owner, mean or successive")
        self.require(self.tokens >= 16, "tokens", "16 or more")

    def calibrated(self, calibrator: Calibrator) -> CLA:
        """The policy with `pattern` filled in where pairs are chosen by similarity."""
        if self.pairs == "fixed" or self.pattern or self.share == 1:
            return self
        from kvcompile.calibration.activations import calibration_ids
        from kvcompile.structure.pairing import best_pattern

        ids = calibration_ids(calibrator.tokenizer, self.tokens, self.name)
        return replace(self, pattern=best_pattern(calibrator.model, ids, self.share, self.pairs, self.fold))

    def apply(self, plan: Plan) -> Plan:
        """Give each layer its owner. Raises KvcompileError for a pattern that the model's layers do not allow."""
        owners = self.pattern or uniform_owners(len(plan.layers), self.share, self.variant)
        return share(plan.record(self.name, self.family), self.name, owners, self.fold)


def uniform_owners(layers: int, factor: int, variant: Variant = "uniform") -> list[int]:
    """Owner of each layer: groups of `factor`, or a variant named after the paper's ablations.

    keep_ends: groups between a first and a last layer of their own (up to one owner more). dense_front: the first
    ceil(L / factor) layers own, the rest reads the last of them. dense_back: the mirror image, the rest reads layer 0.
    """
    count = -(-layers // factor)
    if variant == "dense_front":
        return [min(i, count - 1) for i in range(layers)]
    if variant == "dense_back":
        return [i if i > layers - count else 0 for i in range(layers)]
    if variant == "keep_ends" and layers > 2 and factor > 1:
        middle = [1 + (i // factor) * factor for i in range(layers - 2)]
        return [0, *middle, layers - 1]
    return [i // factor * factor for i in range(layers)]


def share(plan: Plan, policy: str, owners: Sequence[int], fold: Fold) -> Plan:
    """The plan in which layer i reads the cache of layer `owners[i]`.

    Raises KvcompileError where an owner comes later or reads itself, where layers differ in window or positions, and
    where another policy shares layers already.
    """
    number = len(plan.layers)
    valid = len(owners) == number and all(0 <= o <= i and owners[o] == o for i, o in enumerate(owners))
    if not valid:
        raise KvcompileError(
            f"stack.{policy}: pattern must give each of the {number} layers an owner at or before it that owns itself",
            list(owners),
            "e.g. [0,0,2,2]",
        )
    if any(p.owner != p.index for p in plan.layers):
        native = any(p.shared for p in plan.layers)
        where = "in a model whose layers share caches" if native else "after another policy that shares"
        fix = f"drop {policy}" if native else "drop one"
        raise KvcompileError("caches of layers can be shared only once", f"{policy!r} {where}", fix)
    for i, o in enumerate(owners):
        require_alike(plan, policy, plan.layers[i], plan.layers[o])

    def shared(p: LayerPlan) -> LayerPlan:
        read = sum(o == p.index for o in owners) > 1
        return replace(p, owner=owners[p.index], fold=fold if read else "owner")

    return plan.map(shared)


def require_alike(plan: Plan, policy: str, reader: LayerPlan, owner: LayerPlan) -> None:
    """Raise KvcompileError, with a pattern that works, unless both layers see the same tokens at the same positions."""
    if _kind(reader) == _kind(owner):
        return
    kinds = [_kind(p) for p in plan.layers]
    latest: dict[tuple[int | None, bool], list[int]] = {}
    pattern = []
    for i, kind in enumerate(kinds):  # pairs inside each kind
        same_kind = latest.setdefault(kind, [])
        same_kind.append(i)
        pattern.append(same_kind[(len(same_kind) - 1) // 2 * 2])
    differ = "sliding window" if reader.sliding_window != owner.sliding_window else "rotary positions"
    raise KvcompileError(
        f"stack.{policy}: layers that share a cache must be alike in window and positions",
        f"layer {reader.index} reading layer {owner.index}: {differ} differ",
        f"policy=[cla] with stack.cla.pattern=[{','.join(map(str, pattern))}]",
    )


def _kind(p: LayerPlan) -> tuple[int | None, bool]:
    return p.sliding_window, p.rotates
