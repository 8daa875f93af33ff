"""The stack: policies found by name, built from their options, folded over a plan."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcompile.errors import KvcompileError
from kvcompile.options import filled, suggest
from kvcompile.plan.extensions import with_extensions
from kvcompile.plan.plan import Plan

if TYPE_CHECKING:
    from kvcompile.plan.policy import Policy

GROUP = "kvcompile.policies"


@functools.cache
def discover() -> dict[str, type[Policy]]:
    """All installed policies by name: those in the package `kvcompile.policies`, and entry points of the same group.

    Raises KvcompileError if an entry point cannot be loaded, is no policy, or takes a name that is taken.
    """
    import kvcompile.policies as package

    policies: dict[str, type[Policy]] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        for cls in vars(importlib.import_module(f"{package.__name__}.{module}")).values():
            if _is_policy(cls) and cls.__module__ == f"{package.__name__}.{module}":
                policies[cls.name] = cls
    named = with_extensions(GROUP, "policy", policies, "a Policy", lambda x, name: _is_policy(x) and x.name == name)
    return dict(sorted(named.items()))


def _is_policy(cls: Any) -> bool:
    from kvcompile.plan.policy import Policy

    return isinstance(cls, type) and issubclass(cls, Policy) and isinstance(getattr(cls, "name", None), str)


def policy_class(name: str) -> type[Policy]:
    """The policy called `name`. Raises KvcompileError with the nearest name and the list of all."""
    policies = discover()
    if name not in policies:
        raise KvcompileError("unknown policy", repr(name), suggest(name, policies))
    return policies[name]


def build_policy(name: str, options: Mapping[str, Any]) -> Policy:
    """The policy `name` with `options` over its defaults.

    Raises KvcompileError for an unknown policy or field, a value of the wrong type, out of range, or missing.
    """
    return filled(policy_class(name), f"stack.{name}", options)


def build_stack(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> tuple[Policy, ...]:
    """The policies in order, each with its own entry of `options`.

    Raises KvcompileError for a name given twice, options of a policy that is not in the stack, an illegal order of
    families, and whatever `build_policy` refuses.
    """
    for name in names:
        policy_class(name)
        if names.count(name) > 1:
            raise KvcompileError("each policy may be in the stack once", f"{name!r} {names.count(name)} times")
    for name in options:
        if name not in names:
            raise orphan(name, names)
    policies = tuple(build_policy(name, options.get(name) or {}) for name in names)
    order = Plan("", "float32", ())
    for policy in policies:
        order = order.record(policy.name, policy.family)
    return policies


def orphan(name: str, names: Sequence[str]) -> KvcompileError:
    """The error about options `stack.<name>` of a policy that is not among `names`, or does not exist at all."""
    try:
        policy_class(name)
    except KvcompileError as unknown:
        return unknown
    return KvcompileError(
        "options need their policy in the stack",
        f"stack.{name} without {name!r}",
        f"policy=[{','.join([*names, name])}], or drop stack.{name}",
    )


def apply_stack(plan: Plan, policies: Iterable[Policy]) -> Plan:
    """Left fold of the policies over the plan, then one check. Raises KvcompileError where they cannot work."""
    plan = _folded(plan, policies)
    plan.check()
    return plan


def _folded(plan: Plan, policies: Iterable[Policy]) -> Plan:
    return functools.reduce(_applied, policies, plan)


def _applied(plan: Plan, policy: Policy) -> Plan:
    """The plan with one more policy: all but structure acts on the block decoder, where there is one."""
    if plan.blocks is None or policy.family == "structure":
        return policy.apply(plan)
    if policy.uncalibrated is not None:
        raise KvcompileError(
            f"{policy.name} measures a model that attends to tokens before it is compiled, not to blocks",
            f"{policy.name!r} after 'block_transformer', with {policy.uncalibrated} to be found",
            f"say it in stack.{policy.name}, or take another policy",
        )
    return plan.over(policy.apply(plan.decoder))


@dataclass(frozen=True)
class StackPlan:
    """A stack planned for a model: made once a job, before weights are read, and handed down.

    identity: the plan of the model as it is. policies: the stack. shape: the plan of the structural policies alone,
    to which weights are converted. plan: that of the whole stack, checked.
    """

    identity: Plan
    policies: tuple[Policy, ...]
    shape: Plan
    plan: Plan

    @property
    def structure(self) -> tuple[Policy, ...]:
        """The policies that convert weights; they stand first."""
        return tuple(p for p in self.policies if p.family == "structure")

    @property
    def others(self) -> tuple[Policy, ...]:
        """The policies that select and store, which see the converted model."""
        return tuple(p for p in self.policies if p.family != "structure")


def plan_stack(identity: Plan, policies: tuple[Policy, ...]) -> StackPlan:
    """The policies applied to a model, each of them once. Raises KvcompileError where they cannot work on it."""
    shape = _folded(identity, (p for p in policies if p.family == "structure"))
    plan = apply_stack(shape, (p for p in policies if p.family != "structure"))
    return StackPlan(identity, policies, shape, plan)
