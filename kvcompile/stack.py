"""The stack: policies found by name, built from their options, folded over a plan."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvcompile.errors import KvcompileError, first_line
from kvcompile.plan.plan import Plan

if TYPE_CHECKING:
    from kvcompile.policies.base import Policy

GROUP = "kvcompile.policies"
Options = TypeVar("Options")  # a frozen dataclass whose fields can be set by their names


@functools.cache
def discover() -> dict[str, type[Policy]]:
    """All installed policies by name: those in the package `kvcompile.policies`, and entry points of the same group.

    Raises KvcompileError if an entry point cannot be loaded, is no policy, or takes a name that is taken.
    """
    import kvcompile.policies as package

    found: dict[str, type[Policy]] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        for cls in vars(importlib.import_module(f"{package.__name__}.{module}")).values():
            if _is_policy(cls) and cls.__module__ == f"{package.__name__}.{module}":
                found[cls.name] = cls
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        try:
            cls = entry.load()
        except Exception as error:
            raise KvcompileError(
                f"the policy {entry.value!r} of another package does not load", error, "mend or remove it"
            ) from error
        if not _is_policy(cls) or cls.name != entry.name:
            raise KvcompileError(f"entry point {entry.name!r} of {GROUP} must be a Policy of that name", entry.value)
        if found.setdefault(entry.name, cls) is not cls:
            raise KvcompileError(f"policy {entry.name!r} is there twice", f"{entry.value} and {found[entry.name]}")
    return dict(sorted(found.items()))


def _is_policy(cls: Any) -> bool:
    from kvcompile.policies.base import Policy

    return isinstance(cls, type) and issubclass(cls, Policy) and isinstance(getattr(cls, "name", None), str)


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? Known: a, b`: the fix of an error about a name."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}? Known: {', '.join(known)}" if close else f"one of {', '.join(known) or 'none'}"


def policy_class(name: str) -> type[Policy]:
    """The policy called `name`. Raises KvcompileError with the nearest name and the list of all."""
    policies = discover()
    if name not in policies:
        raise KvcompileError("unknown policy", repr(name), suggest(name, policies))
    return policies[name]


def schema(cls: type[Any]) -> type[Any]:
    """A plain dataclass with the fields of a policy or a door: OmegaConf would make a frozen one read-only."""
    hints = typing.get_type_hints(cls)
    fields = [(f.name, _config_type(hints[f.name]), _default(f)) for f in dataclasses.fields(cls)]
    return dataclasses.make_dataclass(cls.__name__, fields, namespace={"__doc__": cls.__doc__})


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=f.default_factory)
    return "???" if f.default is dataclasses.MISSING else f.default


def _config_type(hint: Any) -> Any:
    """The nearest type that OmegaConf can check: Literal as its base type, tuples as lists, `X | None` as Optional."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        kinds = {type(value) for value in inner}
        return kinds.pop() if len(kinds) == 1 else Any
    if origin in (list, tuple):
        return types.GenericAlias(list, (_config_type(inner[0]) if inner else Any,))
    if origin is dict:
        return types.GenericAlias(dict, (inner[0], _config_type(inner[1])))
    if origin in (Union, types.UnionType):
        return Union[tuple(_config_type(each) for each in inner)]  # noqa: UP007
    return hint


def _policy_type(hint: Any, value: Any) -> Any:
    """The checked value as the policy's own type: tuples where it says tuple."""
    origin, inner = get_origin(hint), get_args(hint)
    if value is None:
        return None
    if origin in (list, tuple):
        items = [_policy_type(inner[0], item) for item in value] if inner else list(value)
        return tuple(items) if origin is tuple else items
    if origin in (Union, types.UnionType):
        return _policy_type(next((h for h in inner if get_origin(h) in (list, tuple, dict)), None), value)
    return value


def _shaped(hint: Any, value: Any) -> bool:
    """Whether there are lists where the type has lists; OmegaConf takes one in place of a list's number."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_shaped(each, value) for each in inner)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_shaped(inner[0], item) for item in value)
    return hint is Any or not isinstance(value, list)


def build_policy(name: str, options: Mapping[str, Any]) -> Policy:
    """The policy `name` with `options` over its defaults.

    Raises KvcompileError for an unknown policy or field, a value of the wrong type, out of range, or missing.
    """
    return filled(policy_class(name), f"stack.{name}", options)


def filled(cls: type[Options], where: str, options: Mapping[str, Any]) -> Options:
    """An instance of the dataclass `cls` with `options` over its defaults; errors call its fields `<where>.<field>`."""
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in options:
        if key not in known:
            raise KvcompileError(f"unknown field of {where}", repr(key), suggest(str(key), known))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema(cls)), dict(options))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise KvcompileError(f"{where}: {first_line(error)}", fix=f"set {where}.{error.key}") from error
    for key, value in values.items():
        choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else ()
        if choices and value not in choices:
            raise KvcompileError(f"{where}: {key} must be one of {', '.join(map(str, choices))}", repr(value))
        if not _shaped(hints[key], value):
            raise KvcompileError(f"{where}: {key} must be of type {hints[key]}", repr(value))
    make: Callable[..., Options] = cls
    return make(**{key: _policy_type(hints[key], value) for key, value in values.items()})


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


def options_of(policies: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """The inverse of `build_stack` (and of `build_doors`): every field as plain data, in order."""
    return {policy.name: {key: _plain(value) for key, value in vars(policy).items()} for policy in policies}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def apply_stack(plan: Plan, policies: Iterable[Policy]) -> Plan:
    """Left fold of the policies over the plan, then one check. Raises KvcompileError where they cannot work."""
    for policy in policies:
        plan = policy.apply(plan)
    plan.check()
    return plan
