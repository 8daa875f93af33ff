"""What a search chooses from: policies that may stand in each place of a stack, and what their fields may be."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

from kvcompile.errors import KvcompileError
from kvcompile.options import suggest
from kvcompile.searching.stack import FIT, Stack, default
from kvcompile.stack import build_policy, policy_class
from kvcompile.tasks.registry import build_tasks

WHEN = "when"
Primitive = float | int | str | bool | None


class Draw(Protocol):
    """What values are drawn by: a trial of Optuna."""

    def suggest_categorical(self, name: str, choices: Sequence[Primitive], /) -> Any:
        """One of them."""

    def suggest_int(self, name: str, low: int, high: int, /, *, step: int, log: bool) -> int:
        """A whole number."""

    def suggest_float(self, name: str, low: float, high: float, /, *, step: float | None, log: bool) -> float:
        """A number."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, whole where both are. log: drawn by their logarithm. step: between two of them."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def draw(self, name: str, trial: Draw) -> float:
        """A number of it."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, step=int(self.step or 1), log=self.log)
        return float(f"{trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log):.3g}")

    @property
    def ends(self) -> tuple[float, float]:
        """What is tried to see whether a policy takes it."""
        return self.low, self.high

    def holds(self, value: Any) -> bool:
        """Whether a value could be drawn."""
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class Values:
    """Any values to choose among; those that are no plain values are drawn by their JSON."""

    values: tuple[Any, ...]

    def draw(self, name: str, trial: Draw) -> Any:
        """One of them."""
        known = {_primitive(value): value for value in self.values}
        return known[trial.suggest_categorical(name, list(known))]

    @property
    def ends(self) -> tuple[Any, ...]:
        """All of them."""
        return self.values

    def holds(self, value: Any) -> bool:
        """Whether a value could be drawn."""
        return value in self.values


def _primitive(value: Any) -> Primitive:
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


@dataclass(frozen=True)
class Choice:
    """What may stand in a place: policies with their fields (a value, a `Range`, `Values` or `fit`).

    when: by place before this one, the choices of which one must have been made.
    """

    policies: Mapping[str, Mapping[str, Any]]
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def possible(self, chosen: Mapping[str, str]) -> bool:
        """Whether it may follow what was chosen before."""
        return all(chosen.get(place) in names for place, names in self.when.items())


@dataclass(frozen=True)
class Space:
    """A space of stacks, and what they are asked.

    Attributes:
        name: of its file.
        places: by name, in the order of a stack; of each one choice is taken, or none where none is possible.
        bytes: shares of the bfloat16 cache to try, where no number of bytes is wished for.
        first: what is tried before anything is drawn: choices by place, and fields as `policy.field`.
        tasks, unseen: tasks with their options, for the search and for the proof of what it found.
    """

    name: str
    places: Mapping[str, Mapping[str, Choice]]
    bytes: Range
    first: tuple[Mapping[str, Any], ...]
    tasks: Mapping[str, Mapping[str, Any]]
    unseen: Mapping[str, Mapping[str, Any]]

    def draw(self, trial: Draw) -> Stack:
        """One stack, its budget left to be solved."""
        chosen: dict[str, str] = {}
        options: dict[str, dict[str, Any]] = {}
        for place in self.places:
            names = self._possible(place, chosen)
            if not names:
                continue
            chosen[place] = str(trial.suggest_categorical(self._parameter(place, names), names))
            options |= {policy: {} for policy in self.places[place][chosen[place]].policies}
            for policy, key, spec in self._fields(place, chosen[place]):
                value = spec.draw(f"{place}.{chosen[place]}.{policy}.{key}", trial) if _drawn(spec) else spec
                options[policy][key] = value
        return Stack(options)

    def begin(self, first: Mapping[str, Any]) -> dict[str, Any]:
        """One entry of `first` as the parameters of a trial; fields that it leaves out are at their defaults."""
        chosen: dict[str, str] = {}
        parameters: dict[str, Any] = {}
        for place in self.places:
            names = self._possible(place, chosen)
            if place not in first or first[place] not in names:
                continue
            chosen[place] = str(first[place])
            parameters[self._parameter(place, names)] = chosen[place]
            for policy, key, spec in self._fields(place, chosen[place]):
                value = first.get(f"{policy}.{key}", default(policy, key))
                if _drawn(spec) and spec.holds(value):
                    parameters[f"{place}.{chosen[place]}.{policy}.{key}"] = _primitive(value)
        return parameters

    def _possible(self, place: str, chosen: Mapping[str, str]) -> list[str]:
        return [name for name, choice in self.places[place].items() if choice.possible(chosen)]

    def _parameter(self, place: str, names: Sequence[str]) -> str:
        """One parameter has one set of values: where not all are possible, it is another one."""
        return place if len(names) == len(self.places[place]) else f"{place}({','.join(names)})"

    def _fields(self, place: str, name: str) -> Iterator[tuple[str, str, Any]]:
        for policy, fields in self.places[place][name].policies.items():
            for key, spec in fields.items():
                yield policy, key, spec


def _drawn(spec: Any) -> bool:
    return isinstance(spec, (Range, Values))


def parse(name: str, data: Mapping[str, Any]) -> Space:
    """The space of a file's content. Raises KvcompileError, on one line, for whatever no stack can be drawn from."""
    where = f"search space {name}"
    known = [f.name for f in dataclasses.fields(Space) if f.name != "name"]
    for key in data:
        if key not in known:
            raise KvcompileError(f"{where}: unknown key", repr(key), suggest(str(key), known))
    places: dict[str, dict[str, Choice]] = {}
    known_choices: dict[str, list[str]] = {}  # those that are null, left out of another space, too
    for place, choices in _mapping(where, "places", data.get("places")).items():
        at = f"{where}: places.{place}"
        entries = _mapping(where, f"places.{place}", choices)
        chosen = {n: c for n, c in entries.items() if c is not None}
        places[place] = {n: _choice(f"{at}.{n}", c, known_choices) for n, c in chosen.items()}
        known_choices[place] = list(entries)
    if not any(places.values()):
        raise KvcompileError(f"{where} must have places with choices in them", "none")
    tasks = {key: _mapping(where, key, data.get(key)) for key in ("tasks", "unseen")}
    for options in tasks.values():
        build_tasks(options)
    shares = _spec(f"{where}: bytes", data.get("bytes", {"low": 1 / 64, "high": 1 / 2, "log": True}))
    if not isinstance(shares, Range) or not 0 < shares.low <= shares.high <= 1:
        raise KvcompileError(f"{where}: bytes must be a range of shares in (0, 1]", data.get("bytes"))
    firsts = tuple(data.get("first") or ())
    for first in firsts:
        _check_first(where, places, known_choices, first)
    able = tuple(f for f in firsts if all(f[place] in places[place] for place in places if place in f))
    return Space(name, places, shares, able, **tasks)


def _choice(where: str, data: Any, before: Mapping[str, Sequence[str]]) -> Choice:
    content = dict(_mapping(where, "a choice", data))
    when = {place: _names(where, place, names, before) for place, names in dict(content.pop(WHEN, {})).items()}
    policies = {}
    for policy, fields in content.items():
        specs = {key: _spec(f"{where}.{policy}.{key}", value) for key, value in (fields or {}).items()}
        _check_fields(where, policy, specs)
        policies[policy] = specs
    return Choice(policies, when)


def _names(where: str, place: str, names: Any, before: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    if place not in before:
        raise KvcompileError(f"{where}: when may ask about places before it", repr(place), suggest(place, before))
    chosen = (names,) if isinstance(names, str) else tuple(names)
    for name in chosen:
        if name not in before[place]:
            raise KvcompileError(f"{where}: unknown choice of {place}", repr(name), suggest(str(name), before[place]))
    return chosen


def _spec(where: str, value: Any) -> Any:
    """A list is values to choose among, a mapping a range; `{value: x}` and everything else a value."""
    if isinstance(value, list):
        if not value:
            raise KvcompileError(f"{where} must have values to choose among", "[]")
        return Values(tuple(value))
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"value"}:
        return value["value"]
    known = [f.name for f in dataclasses.fields(Range)]
    if not {"low", "high"} <= set(value) <= set(known):
        raise KvcompileError(f"{where} must be a value, a list of values, or low and high", dict(value), "low: 1")
    numbers = {key: _number(where, key, v) for key, v in value.items() if key != "log"}
    found = Range(**numbers, log=bool(value.get("log", False)))
    if found.low > found.high or (found.log and (found.low <= 0 or found.step)) or (found.step or 1) <= 0:
        rule = "must be a range: low <= high, with log above 0 and without a step"
        raise KvcompileError(f"{where} {rule}", dict(value))
    return found


def _number(where: str, key: str, value: Any) -> float:
    if isinstance(value, str):
        try:
            return float(Fraction(value))
        except (ValueError, ZeroDivisionError) as error:
            raise KvcompileError(f"{where}: {key} must be a number", repr(value)) from error
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise KvcompileError(f"{where}: {key} must be a number", repr(value))
    return value


def _check_fields(where: str, policy: str, specs: Mapping[str, Any]) -> None:
    """Raise KvcompileError for what a policy does not take, each field by itself beside those that are fixed."""
    known = [f.name for f in dataclasses.fields(policy_class(policy))]
    for key in specs:
        if key not in known:
            raise KvcompileError(f"{where}: unknown field of {policy}", repr(key), suggest(str(key), known))
    fixed = {key: 0.5 if spec == FIT else spec for key, spec in specs.items() if not _drawn(spec)}
    drawn = {key: spec for key, spec in specs.items() if _drawn(spec)}
    middle = {key: spec.ends[0] for key, spec in drawn.items()}
    for key, spec in drawn.items():
        for value in spec.ends:
            _build(where, policy, {**fixed, **middle, key: value})
    _build(where, policy, {**fixed, **middle})


def _build(where: str, policy: str, options: Mapping[str, Any]) -> None:
    try:
        build_policy(policy, options)
    except KvcompileError as error:
        raise KvcompileError(f"{where}: {error.rule}", error.got, error.fix) from error


def _check_first(
    where: str, places: Mapping[str, Mapping[str, Choice]], known: Mapping[str, Sequence[str]], first: Any
) -> None:
    every = [choice for choices in places.values() for choice in choices.values()]
    fields = {f"{policy}.{key}" for choice in every for policy, keys in choice.policies.items() for key in keys}
    for key, value in _mapping(where, "an entry of first", first).items():
        if key in places:
            if value not in known[key]:
                rule = f"{where}: first: unknown choice of {key}"
                raise KvcompileError(rule, repr(value), suggest(str(value), known[key]))
        elif key not in fields and "." not in key:
            raise KvcompileError(f"{where}: first: unknown place", repr(key), suggest(str(key), places))


def _mapping(where: str, what: str, data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise KvcompileError(f"{where}: {what} must be a mapping", type(data).__name__)
    return data
