"""GQA: several query heads share one KV head, merged from those that they had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Family, LayerPlan, Plan
from kvcompile.plan.policy import Calibrator, Policy
from kvcompile.plan.structure import Align, Groups, Heads, Merge, contiguous

Method = Literal["mean", "first", "similarity"]


@dataclass(frozen=True)
class HeadMerging(Policy):
    """Base of the policies that merge KV heads. Untrained, the result is much worse than the original: heal it.

    merge: `mean` of neighbouring heads, the `first` of each group, or the mean of heads grouped by `similarity` of
    their keys and values on `tokens` tokens of text (which permutes query heads and the output projection with them).
    align: rotate heads towards each other before the mean, `values` alone or `both` (keys by one 2-D rotation per
    RoPE frequency; not where keys are normed after their projection).
    tokens: length of the text that heads are compared or aligned on.
    groups: per layer the groups of KV heads that calibration found; left empty, it looks for them.
    """

    family: ClassVar[Family] = "structure"
    merge: Method = "mean"
    align: Align = "none"
    tokens: int = 1024
    groups: list[list[list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.require(self.merge in ("mean", "first", "similarity"), "merge", "mean, first or similarity")
        self.require(self.align in ("none", "values", "both"), "align", "none, values or both")
        self.require(
            self.align == "none" or self.merge != "first", "align", "none where merge=first: nothing is averaged"
        )
        self.require(self.tokens >= 16, "tokens", "16 or more")
        self.require(not self.groups or self.merge == "similarity", "groups", "empty unless merge=similarity")

    def kept(self, heads: int) -> int:
        """How many KV heads are left of `heads`. Raises KvcompileError where that cannot be."""
        raise NotImplementedError

    def calibrated(self, calibrator: Calibrator) -> Policy:
        """The policy with `groups` filled in where heads are grouped by similarity."""
        if self.merge != "similarity" or self.groups:
            return self
        from kvcompile.calibration.activations import calibration_ids, keys_values
        from kvcompile.structure.grouping import by_similarity

        seen = keys_values(calibrator.model, calibration_ids(calibrator.tokenizer, self.tokens, self.name))
        groups = [by_similarity(kv, self.kept(kv.keys.shape[0])) for kv in seen]
        return replace(self, groups=[[list(group) for group in layer] for layer in groups])

    def apply(self, plan: Plan) -> Plan:
        """Merge the KV heads of every layer. Raises KvcompileError where the groups or their number do not fit."""
        return merge_heads(plan.record(self.name, self.family), self, self.kept)


@dataclass(frozen=True)
class GQA(HeadMerging):
    """Merge KV heads until `kv_heads` are left, which must divide their number (arXiv 2305.13245).

    kv_heads: KV heads of every layer afterwards (0: the largest proper divisor, as 32 -> 16, 9 -> 3, 3 -> 1).
    """

    name: ClassVar[str] = "gqa"
    summary: ClassVar[str] = "fewer KV heads, each the mean of a group (needs healing)"
    kv_heads: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.kv_heads >= 0, "kv_heads", "0 or more")

    def kept(self, heads: int) -> int:
        """`kv_heads`, if it divides `heads`."""
        return divisor(self.name, "kv_heads", self.kv_heads, heads)


def divisor(policy: str, field_name: str, wanted: int, heads: int) -> int:
    """`wanted` KV heads (0: the largest proper divisor of `heads`). Raises KvcompileError unless it divides `heads`."""
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    wanted = wanted or divisors[max(0, len(divisors) - 2)]
    if wanted not in divisors:
        raise KvcompileError(
            f"stack.{policy}: {field_name} must divide the model's {heads} KV heads",
            wanted,
            f"one of {', '.join(map(str, divisors))}",
        )
    return wanted


def merge_heads(plan: Plan, policy: HeadMerging, kept: Callable[[int], int]) -> Plan:
    """The plan with the KV heads of every layer merged to `kept(heads)`; where none goes, the plan itself."""
    if policy.groups and len(policy.groups) != len(plan.layers):
        raise KvcompileError(
            f"stack.{policy.name}: groups must be given for each of the {len(plan.layers)} layers",
            len(policy.groups),
            f"stack.{policy.name}.groups=[] to calibrate",
        )
    if policy.align == "both" and plan.layers and plan.layers[0].key_norm:
        raise KvcompileError(
            f"stack.{policy.name}: keys that are normed after their projection cannot be rotated",
            f"align=both on {plan.architecture}",
            f"stack.{policy.name}.align=values",
        )

    def merged(p: LayerPlan) -> LayerPlan:
        if p.latent is not None:
            raise KvcompileError(
                f"layer {p.index}: a layer with a latent has no KV heads to merge",
                f"{policy.name!r} {p.latent.before}",
                f"drop {policy.name}" if p.latent.native else "drop one",
            )
        number = kept(p.kv_heads)
        if number == p.kv_heads:
            return p
        if p.heads is not None:
            raise KvcompileError(
                f"layer {p.index}: heads can be merged only once", f"{policy.name!r} after another merge", "drop one"
            )
        groups = checked_groups(policy, p, number) if policy.groups else contiguous(p.kv_heads, number)
        how: Merge = "first" if policy.merge == "first" else "mean"
        tokens = policy.tokens if policy.align != "none" else 0
        return replace(p, kv_heads=number, heads=Heads(groups, how, policy.align, tokens))

    return plan.map(merged)


def checked_groups(policy: HeadMerging, p: LayerPlan, number: int) -> Groups:
    """The groups of one layer as the policy gives them. Raises KvcompileError unless they are a fair partition."""
    groups = tuple(tuple(group) for group in policy.groups[p.index])
    fair = len(groups) == number and len({len(group) for group in groups}) == 1
    if not fair or sorted(h for group in groups for h in group) != list(range(p.kv_heads)):
        raise KvcompileError(
            f"stack.{policy.name}: groups of layer {p.index} must be {number} parts, alike in size, of the "
            f"{p.kv_heads} KV heads",
            policy.groups[p.index],
            f"stack.{policy.name}.groups=[] to calibrate",
        )
    return groups
