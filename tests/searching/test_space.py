"""Protects the space as data: what it says is drawn, conditions hold, and mistakes are told on one line."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvcompile.config.compose import option
from kvcompile.errors import KvcompileError
from kvcompile.searching.space import Range, Values, parse
from kvcompile.stack import policy_class

TEXT = """
places:
  score:
    snapkv: {snapkv: {budget: fit, kernel: [1, 7], window: {low: 4, high: 16}}}
    retrieval: {retrieval_heads: {keep: fit, score: snapkv, fraction: {low: 0.1, high: 0.4}, skip_layers: [[0], []]}}
  allocation:
    adakv: {when: {score: snapkv}, adakv: {safeguard: {low: 0.0, high: 0.5}}}
    uniform: {}
  storage:
    int4: {rotate: {}, kivi: {group: 64, residual: 0}}
    plain: {}
first:
  - {score: snapkv, allocation: adakv, storage: int4, snapkv.kernel: 1}
tasks: {needle: {samples: 1}}
unseen: {needle: {samples: 1, seed: 2}}
"""


def space(**change: Any) -> Any:
    return parse("mine", {**yaml.safe_load(TEXT), **change})


MINE = space()


class Drawn:
    """Draws as a trial does, remembers the distributions, and takes what is given."""

    def __init__(self, seed: int, fixed: dict[str, Any] | None = None) -> None:
        self.rng, self.fixed, self.asked = random.Random(seed), fixed or {}, {}

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._known(name, tuple(choices), self.rng.choice(list(choices)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        return self._known(name, (low, high, step, log), self.rng.randrange(low, high + 1))

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        return self._known(name, (low, high, step, log), self.rng.uniform(low, high))

    def _known(self, name: str, distribution: Any, value: Any) -> Any:
        self.asked[name] = distribution
        return self.fixed.get(name, value)


def test_stacks_are_drawn_in_the_order_of_places_and_within_their_ranges() -> None:
    for seed in range(60):
        options = MINE.draw(Drawn(seed)).options
        names = list(options)
        assert names[0] in ("snapkv", "retrieval_heads")
        assert names[-2:] == ["rotate", "kivi"] or "kivi" not in names
        if names[0] == "snapkv":
            assert options["snapkv"]["kernel"] in (1, 7)
            assert options["snapkv"]["budget"] == "fit"
            assert 4 <= options["snapkv"]["window"] <= 16
            assert isinstance(options["snapkv"]["window"], int)
        else:
            assert options["retrieval_heads"]["skip_layers"] in ([0], [])
            assert options["retrieval_heads"]["score"] == "snapkv"


def test_a_choice_is_drawn_only_after_those_it_may_follow_and_each_parameter_has_one_set_of_values() -> None:
    seen: dict[str, Any] = {}
    for seed in range(60):
        trial = Drawn(seed)
        names = list(MINE.draw(trial).options)
        assert not {"retrieval_heads", "adakv"} <= set(names)
        for name, distribution in trial.asked.items():
            assert seen.setdefault(name, distribution) == distribution
    assert {"allocation", "allocation(uniform)"} <= set(seen)


def test_what_is_tried_first_is_drawn_so_with_fields_at_their_defaults() -> None:
    trial = Drawn(0, MINE.begin(MINE.first[0]))
    options = MINE.draw(trial).options
    assert list(options) == ["snapkv", "adakv", "rotate", "kivi"]
    assert options["snapkv"]["kernel"] == 1
    assert options["adakv"] == {"safeguard": 0.2}  # the policy's own
    assert 4 <= options["snapkv"]["window"] <= 16  # its default is out of the range


def test_the_shipped_space_tries_its_first_stacks_as_policies_ship() -> None:
    """A range that leaves a default out would have it drawn instead, and the best stack known never tried."""
    shipped = parse("default", option("search", "default"))
    for first in shipped.first:
        options = shipped.draw(Drawn(0, shipped.begin(first))).options
        for name, fields in options.items():
            usual = {f.name: f.default for f in dataclasses.fields(policy_class(name))}
            drawn = {k: v for k, v in fields.items() if isinstance(shipped_spec(shipped, name, k), (Range, Values))}
            said = {key.partition(".")[2]: v for key, v in first.items() if key.startswith(f"{name}.")}
            assert drawn == {key: said.get(key, usual[key]) for key in drawn}


def shipped_spec(space: Any, policy: str, field: str) -> Any:
    choices = (choice for place in space.places.values() for choice in place.values())
    return next((c.policies[policy][field] for c in choices if field in c.policies.get(policy, {})), None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"plces": {}}, "did you mean 'places'"),
        ({"places": {}}, "must have places with choices"),
        ({"places": {"a": {"x": {"snapvk": {}}}}}, "unknown policy, got 'snapvk'. Fix: did you mean 'snapkv'"),
        ({"places": {"a": {"x": {"snapkv": {"kernl": 1}}}}}, "places.a.x: unknown field of snapkv, got 'kernl'"),
        ({"places": {"a": {"x": {"snapkv": {"kernel": [1, 2]}}}}}, "places.a.x: stack.snapkv: kernel must be"),
        ({"places": {"a": {"x": {"snapkv": {"kernel": []}}}}}, "must have values"),
        ({"places": {"a": {"x": {"snapkv": {"window": {"low": 9, "high": 2}}}}}}, "low <= high"),
        ({"places": {"a": {"x": {"snapkv": {"window": {"low": 0, "high": 2, "log": True}}}}}}, "with log above 0"),
        ({"places": {"a": {"x": {"snapkv": {"window": {"lo": 9, "high": 2}}}}}}, "or low and high"),
        ({"places": {"a": {"x": {"when": {"b": "y"}}}}}, "may ask about places before it, got 'b'"),
        ({"places": {"a": {"x": {}}, "b": {"y": {"when": {"a": "z"}}}}}, "unknown choice of a, got 'z'"),
        ({"places": {"a": [1]}}, "places.a must be a mapping, got list"),
        ({"first": [{"score": "h2o"}]}, "first: unknown choice of score"),
        ({"first": [{"scores": "snapkv"}]}, "first: unknown place, got 'scores'. Fix: did you mean 'score'"),
        ({"bytes": {"low": 0, "high": 1}}, "bytes must be a range of shares"),
        ({"bytes": {"low": "1/x", "high": 1}}, "low must be a number, got '1/x'"),
        ({"tasks": {"nedle": {}}}, "unknown task, got 'nedle'"),
        ({"tasks": None}, "tasks must be a mapping"),
    ],
)
def test_mistakes_are_told_on_one_line(change: dict[str, Any], says: str) -> None:
    with pytest.raises(KvcompileError) as error:
        space(**change)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_the_shipped_space_is_one_and_the_users_own_go_on_from_it(tmp_path: Path) -> None:
    shipped = parse("default", option("search", "default"))
    assert set(shipped.places) == {"score", "allocation", "values", "storage"}
    assert shipped.places["score"]["ghost"].policies["ghost"]["band"] == Range(4, 128, log=True)
    (tmp_path / "search").mkdir()
    own = "defaults: [default]\nplaces:\n  score: {kvzip: null, keydiff: {keydiff: {budget: fit, sinks: [2, 4]}}}\n"
    (tmp_path / "search" / "mine.yaml").write_text(own)
    mine = parse("mine", option("search", "mine", str(tmp_path)))
    assert "kvzip" not in mine.places["score"]
    assert mine.places["score"]["keydiff"].policies == {"keydiff": {"budget": "fit", "sinks": Values((2, 4))}}
    with pytest.raises(KvcompileError, match=r"unknown search, got 'mein'. Fix: did you mean 'mine'"):
        option("search", "mein", str(tmp_path))
