"""Discovery, building and folding of the stack; plug-ins stand beside built-ins."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import pytest

from kvcompile.config.compose import compose
from kvcompile.config.recipe import from_recipe, to_recipe
from kvcompile.errors import KvcompileError
from kvcompile.options import options_of
from kvcompile.plan import extensions
from kvcompile.plan.plan import ORDER, Family, LayerPlan, Plan
from kvcompile.plan.policy import Policy
from kvcompile.stack import apply_stack, build_stack, discover, policy_class


@dataclass(frozen=True)
class Probe(Policy):
    """A plug-in with every kind of field."""

    name: ClassVar[str] = "probe"
    family: ClassVar[Family] = "storage"
    summary: ClassVar[str] = "for tests"
    bits: int = 8
    mode: Literal["fast", "exact"] = "fast"
    heads: tuple[int, ...] = (1, 2)
    table: list[list[int]] | None = None
    share: float | None = None
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.require(self.bits in (2, 4, 8), "bits", "2, 4 or 8")

    def apply(self, plan: Plan) -> Plan:
        return plan.record(self.name, self.family)


@dataclass(frozen=True)
class Early(Policy):
    """A structure policy, which must stand before the others; it records the KV heads it gave."""

    name: ClassVar[str] = "early"
    family: ClassVar[Family] = "structure"
    summary: ClassVar[str] = "for tests"
    kv_heads: int = 1

    def apply(self, plan: Plan) -> Plan:
        return plan.record(self.name, self.family).map(lambda p: replace(p, kv_heads=self.kv_heads))


class Entry:
    def __init__(self, name: str, target: Any) -> None:
        self.name, self.value, self.target = name, f"elsewhere:{name}", target

    def load(self) -> Any:
        if isinstance(self.target, Exception):
            raise self.target
        return self.target


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def install(*entries: Entry) -> None:
        monkeypatch.setattr(extensions, "entry_points", lambda group: entries if group == "kvcompile.policies" else ())
        discover.cache_clear()

    install(Entry("probe", Probe), Entry("early", Early))
    yield install
    discover.cache_clear()


def identity(layers: int = 2) -> Plan:
    return Plan("llama", "float32", tuple(LayerPlan(i, 4, 2, 8, i, 1.0) for i in range(layers)))


def refused(match: str) -> Any:
    return pytest.raises(KvcompileError, match=match)


def test_discover_finds_built_in_and_third_party_policies(plug: Any) -> None:
    assert discover()["probe"] is Probe
    assert discover()["snapkv"].__module__ == "kvcompile.policies.snapkv"
    assert list(discover()) == sorted(discover())


def test_a_plug_in_is_composed_like_a_built_in_policy(plug: Any) -> None:
    config = compose(["policy=[early,probe]", "stack.probe.bits=4", "stack.probe.heads=[7]"])
    assert config.policies() == (Early(), Probe(bits=4, heads=(7,)))
    assert from_recipe(to_recipe(config)) == config


def test_every_policy_file_is_discovered() -> None:
    import pkgutil

    import kvcompile.policies as package

    homes = {cls.__module__.rpartition(".")[2] for cls in discover().values()}
    helpers = {"base"}
    lost = {m.name for m in pkgutil.iter_modules(package.__path__)} - homes - helpers
    for name in lost:  # a module of shared scores or allocations defines no named policy
        module = sys.modules[f"kvcompile.policies.{name}"]
        named = [c for c in vars(module).values() if isinstance(c, type) and "name" in vars(c)]
        assert not [c for c in named if c.__module__ == module.__name__], name


def test_unknown_policy_names_the_nearest_and_all(plug: Any) -> None:
    with refused("unknown policy, got 'snapvk'. Fix: did you mean 'snapkv'. Known: .*probe"):
        policy_class("snapvk")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry("other", Probe), "must be a Policy of that name"),
        (Entry("probe", dict), "must be a Policy of that name"),
        (Entry("probe", ImportError("no such module")), "does not load, got no such module"),
        (Entry("snapkv", dataclasses.make_dataclass("X", [], bases=(Probe,), frozen=True)), "must be a Policy"),
    ],
)
def test_broken_plug_ins_are_one_line(plug: Any, entry: Entry, message: str) -> None:
    plug(entry)
    with refused(message):
        discover()


def test_a_plug_in_cannot_replace_a_built_in(plug: Any) -> None:
    plug(Entry("snapkv", type("Mine", (Probe,), {"name": "snapkv"})))
    with refused("policy 'snapkv' is there twice"):
        discover()


def test_fields_keep_their_types(plug: Any) -> None:
    options = {"heads": [3], "table": [[1], [2, 3]], "share": 1, "weights": {"a": 0.5}, "mode": "exact"}
    (probe,) = build_stack(["probe"], {"probe": options})
    assert probe == Probe(heads=(3,), table=[[1], [2, 3]], share=1.0, weights={"a": 0.5}, mode="exact")
    assert isinstance(probe.heads, tuple)  # type: ignore[attr-defined]


def test_options_of_is_the_inverse_of_build_stack(plug: Any) -> None:
    policies = build_stack(["early", "snapkv", "probe"], {"probe": {"bits": 4, "table": [[1]]}, "snapkv": {"sinks": 2}})
    again = options_of(policies)
    assert list(again) == ["early", "snapkv", "probe"]
    assert build_stack(list(again), again) == policies


def test_errors_name_only_families_that_a_policy_has() -> None:
    """A fix that lists the legal order must not send anyone looking for policies that are not there."""
    assert set(ORDER) == {cls.family for cls in discover().values()}


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["probe", "probe"], {}, "each policy may be in the stack once, got 'probe' 2 times"),
        (["prob"], {}, "did you mean 'probe'"),
        ([], {"probe": {}}, r"stack.probe without 'probe'. Fix: policy=\[probe\]"),
        ([], {"prob": {}}, "unknown policy, got 'prob'. Fix: did you mean 'probe'"),
        (["probe"], {"probe": {"bit": 4}}, "unknown field of stack.probe, got 'bit'. Fix: did you mean 'bits'"),
        (["probe"], {"probe": {"bits": "many"}}, "stack.probe: Value 'many' of type 'str' could not be converted"),
        (
            ["probe"],
            {"probe": {"heads": [[1]]}},
            r"stack.probe: heads must be of type tuple\[int, ...\], got \[\[1\]\]",
        ),
        (["probe"], {"probe": {"bits": 3}}, "stack.probe: bits must be 2, 4 or 8, got 3"),
        (["probe"], {"probe": {"mode": "slow"}}, "stack.probe: mode must be one of fast, exact, got 'slow'"),
        (["probe", "snapkv"], {}, "selection policies come before storage policies, got 'snapkv'"),
        (["snapkv"], {"snapkv": {"budget": 7.5}}, "stack.snapkv: budget must be in"),
    ],
)
def test_mistakes_are_one_line(plug: Any, names: list[str], options: dict[str, Any], message: str) -> None:
    with refused(message) as caught:
        build_stack(names, options)
    assert "\n" not in str(caught.value)


def test_apply_stack_folds_from_left_to_right(plug: Any) -> None:
    early, snapkv, probe = build_stack(["early", "snapkv", "probe"], {})
    plan = apply_stack(identity(), [early, snapkv, probe])
    assert [a.name for a in plan.applied] == ["early", "snapkv", "probe"]
    assert {p.kv_heads for p in plan.layers} == {1}
    assert apply_stack(identity(), []) == identity()
    assert apply_stack(apply_stack(identity(), [early]), [snapkv, probe]) == plan


def test_apply_stack_checks_the_result(plug: Any) -> None:
    with refused("layer 0: KV heads must divide the query heads, got 3 and 4"):
        apply_stack(identity(), [Early(kv_heads=3)])


def test_nothing_heavy_is_imported_on_the_way_to_a_stack() -> None:
    code = (
        "import sys, kvcompile, kvcompile.cli\n"
        "from kvcompile.config.compose import compose\n"
        "compose(['policy=[snapkv]'])\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
