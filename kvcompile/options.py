"""Dataclasses as options: their schema for Hydra, and their values from YAML."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvcompile.errors import KvcompileError, first_line

Options = TypeVar("Options")  # a frozen dataclass whose fields can be set by their names


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? Known: a, b`: the fix of an error about a name."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}? Known: {', '.join(known)}" if close else f"one of {', '.join(known) or 'none'}"


def schema(cls: type[Any]) -> type[Any]:
    """A plain dataclass with the fields of a policy or an exporter: OmegaConf would make a frozen one read-only."""
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


def options_of(policies: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """The inverse of `build_stack` (and of `build_exporters`): every field as plain data, in order."""
    return {policy.name: {key: _plain(value) for key, value in vars(policy).items()} for policy in policies}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
