"""Composing: shipped files, overrides, every user mistake as one line, and the recipe that recreates a config."""

from __future__ import annotations

import threading
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcompile.config.compose import check, compose, expand
from kvcompile.config.recipe import from_recipe, to_recipe
from kvcompile.config.schema import Config, ModelConfig
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError
from kvcompile.stack import discover


def names(package: str, group: str) -> list[str]:
    return sorted(f.name.removesuffix(".yaml") for f in files(package).joinpath(group).iterdir())


@pytest.mark.parametrize("recipe", names("kvcompile.recipes", "recipe"))
def test_every_recipe_composes_and_says_how_to_run_it(recipe: str) -> None:
    text = files("kvcompile.recipes").joinpath("recipe", f"{recipe}.yaml").read_text("utf-8")
    lines = text.splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")
    assert f"# kvcompile recipe={recipe} model=llama" in lines
    config = compose([f"recipe={recipe}"])
    assert config.recipe == recipe
    assert config.stack
    assert config.output == f"outputs/{recipe}-llama"
    assert "_target_" not in text


@pytest.mark.parametrize("model", names("kvcompile.conf", "model"))
def test_every_model_composes(model: str) -> None:
    config = compose([f"model={model}"])
    assert config.model.name == model
    assert (config.model.pretrained is None) == (model == "llama")
    assert files("kvcompile.conf").joinpath("model", f"{model}.yaml").read_text("utf-8").startswith("# ")


def test_every_selection_policy_has_a_recipe_and_an_option() -> None:
    recipes = names("kvcompile.recipes", "recipe")
    assert [n for n, cls in discover().items() if cls.family == "selection" and n not in recipes] == []
    for name in discover():
        assert list(compose([f"policy=[{name}]"]).stack) == [name]


def test_sweep_presets_name_recipes_that_exist() -> None:
    import yaml

    text = files("kvcompile.conf").joinpath("sweep", "recipes.yaml").read_text("utf-8")
    wanted = yaml.safe_load(text)["hydra"]["sweeper"]["params"]["recipe"].split(",")
    assert set(wanted) <= set(names("kvcompile.recipes", "recipe"))


def test_defaults_are_a_dense_model() -> None:
    assert compose() == finish(Config())
    assert compose().output == "outputs/dense-llama"


def test_overrides_reach_the_policy() -> None:
    config = compose(["recipe=snapkv", "stack.snapkv.budget=0.1", "stack.snapkv.skip_layers=[0,1]"])
    (policy,) = config.policies()
    assert policy.budget == 0.1  # type: ignore[attr-defined]
    assert policy.skip_layers == [0, 1]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("overrides", "budget"),
    [(["recipe=zigzag", "budget=0.1"], 0.1), (["recipe=zigzag", "budget=null", "stack.zigzag.budget=0.3"], 0.3)],
    ids=str,
)
def test_the_budget_shortcut_overrides_what_a_recipe_says(overrides: list[str], budget: float) -> None:
    assert compose(overrides).stack["zigzag"]["budget"] == budget


def test_a_sweep_over_one_budget_does_not_hide_the_other() -> None:
    with pytest.raises(KvcompileError, match=r"budget=0.25 and stack.snapkv.budget=0.1"):
        check(["recipe=snapkv", "budget=0.25,0.5", "stack.snapkv.budget=0.1"], multirun=True)


def test_budget_shortcut_is_folded_into_the_stack() -> None:
    config = compose(["policy=[snapkv]", "budget=0.25"])
    assert config.stack["snapkv"]["budget"] == 0.25
    assert config.budget is None


def test_output_names_the_policies_where_there_is_no_recipe() -> None:
    assert compose(["policy=[snapkv]", "model=qwen2"]).output == "outputs/snapkv-qwen2"
    assert compose(["policy=[snapkv]", "output=here"]).output == "here"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=snpkv"], "unknown recipe, got 'snpkv'. Fix: did you mean 'snapkv'. Known: .*zigzag"),
        (["policy=[snpkv]"], "unknown policy, got 'snpkv'. Fix: did you mean 'snapkv'"),
        (["model=lama"], "unknown model, got 'lama'. Fix: did you mean 'llama'"),
        (["policy=[snapkv,snapkv]"], "each policy may be in the stack once"),
        (["recipe=snapkv", "stack.snapkv.budget=0"], r"stack.snapkv: budget must be in \(0, 1\]"),
        (["recipe=snapkv", "stack.snapkv.budget=abc"], "stack.snapkv.budget: Value 'abc'"),
        (["recipe=snapkv", "stack.snapkv.bugdet=1"], "unknown setting, got 'stack.snapkv.bugdet'. .*'budget'"),
        (["recipe=snapkv", "policy=[]", "+stack.snapkv.budget=1"], "stack.snapkv without 'snapkv'"),
        (["stack.snapkv.budget=1"], "stack.snapkv without 'snapkv'"),
        (["+stack.snpkv.budget=1"], "unknown policy, got 'snpkv'. Fix: did you mean 'snapkv'"),
        (["budget=0.5"], "budget needs a policy that has one"),
        (["modle=llama"], "unknown setting, got 'modle'. Fix: did you mean 'model'"),
        (["++modle=llama"], "unknown setting, got 'modle'. Fix: did you mean 'model'"),
        (["++needle.sample=9"], "unknown setting, got 'needle.sample'. Fix: did you mean 'samples'"),
        (["model=org/name"], "names a group of settings, got org/name. Fix: model.pretrained=org/name"),
        (["model.dtype=float8"], "unknown model.dtype, got 'float8'"),
        (["kernels=trition"], "unknown kernels, got 'trition'"),
        (["prefill_chunk=-1"], "prefill_chunk must be"),
        (["prefill_chunk=x"], "prefill_chunk: Value 'x'"),
        (["needle.depths=[2]"], "needle.depths must be"),
        (["needle.tokens=[]"], "needle.tokens must be"),
        (["plan.memory=0"], "plan.memory must be more than 0 GiB"),
        (["recipe=snapkv,zigzag"], "Fix: put -m first to sweep"),
        (["sweep=budget"], "a single config cannot hold a sweep"),
        (
            ["recipe=snapkv", "budget=0.5", "stack.snapkv.budget=0.1"],
            r"budget sets the budget of every policy .*, got budget=0.5 and stack.snapkv.budget=0.1. Fix: drop one",
        ),
        (["policy=[snapkv,adakv]", "++stack.adakv.budget=0.1", "budget=0.5"], "got budget=0.5 and stack.adakv.budget"),
        (["recipe=snapkv", "stack.snapkv={budget:0.1}", "budget=0.5"], "got budget=0.5 and stack.snapkv.budget=0.1"),
        (["x=]["], "x="),
        (["recipe", "zigzag"], "a setting must be given a value, got recipe. Fix: write it as recipe=<value>"),
        (["output=${oops}"], "oops"),
        (["output=o/${recipe}"], r"only name settings that are set, got output=o/\$\{recipe\}, where recipe is null"),
        (["output=o/${hydra:job.num}"], "where hydra:job.num is null"),
        (["output=run/lr=0.1"], """must be in quotes .* Fix: 'output="run/lr=0.1"'"""),
        (["output=größe"], """Fix: 'output="größe"'"""),
        (["output=~/x"], """Fix: 'output="~/x"'"""),
        (["output=a#b"], """Fix: 'output="a#b"'"""),
        (["hydra/launcher=nonesuch"], r"must be installed, got 'nonesuch'. Fix: .*pip install 'kvcompile\[joblib\]'"),
    ],
)
def test_mistakes_are_one_line(overrides: list[str] | str, message: str) -> None:
    with pytest.raises(KvcompileError, match=message) as caught:
        compose(overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["run/lr=0.1", "größe", "~/x", "a#b", 'say "so"', "f(x)"])
def test_the_quotes_that_an_error_proposes_are_read(text: str) -> None:
    """The fix of an error is typed into a shell as it stands."""
    import shlex

    with pytest.raises(KvcompileError) as caught:
        compose([f"output={text}"])
    (typed,) = shlex.split(str(caught.value.fix).rpartition(", with both")[0])
    assert compose([typed]).output == text


def test_one_override_needs_no_list() -> None:
    assert compose("policy=[snapkv]") == compose(["policy=[snapkv]"])


def test_hydras_own_values_and_the_recipe_can_be_named() -> None:
    """Hydra resolves them in a job, so a check before the job must."""
    wanted = "output=o/${hydra:runtime.choices.recipe}-${recipe}"
    assert compose(["recipe=knorm", wanted]).output == "o/knorm-knorm"
    check(["recipe=knorm,kivi", "output=o/${hydra:job.num}/${hydra:runtime.output_dir}"], multirun=True)


def test_a_sweep_over_what_a_glob_matches_is_checked() -> None:
    check(["recipe=glob(k*)", "plan=only"], multirun=True)
    with pytest.raises(KvcompileError, match=r"a sweep must have values, got recipe=glob\(qq\*\)"):
        check(["recipe=glob(qq*)"], multirun=True)


def test_policies_beside_a_recipe_are_named_with_it() -> None:
    """`recipe=mqa policy=[gqa]` compiles gqa: nothing may call that mqa alone."""
    config = compose(["recipe=mqa", "policy=[gqa]"])
    assert (config.recipe, config.output) == ("mqa+gqa", "outputs/mqa+gqa-llama")
    assert compose(["recipe=snapkv", "policy=[snapkv]"]).recipe == "snapkv"
    assert from_recipe(to_recipe(config)) == config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(stack={"kivi": {"group": "${oc.env:HOME}"}}), "stack.kivi: .*could not be converted to Integer"),
        (Config(stack={"kivi": {"group": "${nonesuch}"}}), "stack.kivi: .*'nonesuch' not found"),
        (Config(prefill_chunk="${oc.env:HOME}"), "prefill_chunk: .*could not be converted to Integer"),  # type: ignore[arg-type]
    ],
)
def test_interpolations_through_python_are_checked_too(
    config: Config, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(KvcompileError, match=message):
        finish(config)


def test_recipes_of_the_user_stand_beside_the_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    text = "# @package _global_\ndefaults: [override /policy: [snapkv]]\nstack: {snapkv: {budget: 0.125}}\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(text)
    here = f"hydra.searchpath=[file://{tmp_path}]"
    assert compose(["recipe=mine", here]).stack["snapkv"]["budget"] == 0.125
    assert compose(["recipe=snapkv", here]).recipe == "snapkv"
    with pytest.raises(KvcompileError, match=r"recipe=mine, which sets options of 'snapkv', got policy=\[\]"):
        compose(["recipe=mine", "policy=[]", here])


def test_compose_works_inside_another_hydra_application() -> None:
    with initialize(version_base="1.3", config_path=None):
        theirs = GlobalHydra.instance().hydra
        assert compose(["recipe=snapkv"]).recipe == "snapkv"
        assert GlobalHydra.instance().hydra is theirs
        assert hydra_compose(overrides=["+a=1"]) == {"a": 1}
        with pytest.raises(KvcompileError):
            compose(["recipe=nope"])
        assert GlobalHydra.instance().hydra is theirs


def test_compose_works_from_threads() -> None:
    found: dict[float, Any] = {}

    def work(budget: float) -> None:
        found[budget] = compose(["recipe=snapkv", f"budget={budget}"]).stack["snapkv"]["budget"]

    threads = [threading.Thread(target=work, args=(n / 10,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n / 10: n / 10 for n in range(1, 5)}


def test_expand_gives_the_jobs_of_a_sweep_in_order() -> None:
    jobs = list(expand(["recipe=zigzag,snapkv", "model=llama", "budget=0.5,0.25"]))
    assert jobs[1] == ["recipe=zigzag", "model=llama", "budget=0.25"]
    assert len(jobs) == 4
    assert list(expand(["budget=interval(0.1,0.5)"])) == []


@pytest.mark.parametrize("overrides", [[], ["recipe=snapkv", "budget=64"], ["plan=only", "needle.tokens=[512,1024]"]])
def test_a_recipe_recreates_its_config(overrides: list[str]) -> None:
    config = compose(overrides)
    assert from_recipe(to_recipe(config)) == config


@given(
    text=st.text(min_size=1, max_size=20).filter(lambda s: "${" not in s and s.isprintable() and s != "???"),
    budget=st.floats(0.001, 1),
    chunk=st.integers(0, 10**9),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_recipe_recreates_any_values(text: str, budget: float, chunk: int) -> None:
    model = ModelConfig(name=text, pretrained=text)
    config = finish(Config(model=model, stack={"snapkv": {"budget": budget}}, prefill_chunk=chunk, output=text))
    assert from_recipe(to_recipe(config)) == config


def test_order_of_the_stack_survives_a_recipe() -> None:
    config = finish(Config(stack={"snapkv": {}}))
    assert list(from_recipe(to_recipe(config)).stack) == ["snapkv"]
    assert config.with_policies(config.policies()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("polices: [snapkv]", "polices"),
        ("stack: {snapkv: {bugdet: 1}}", "unknown field of stack.snapkv, got 'bugdet'"),
        ("stack: {snapkv: {budget: 3.5}}", "stack.snapkv: budget must be"),
        ("stack: {nope: {}}", "unknown policy, got 'nope'"),
        ("prefill_chunk: abc", "prefill_chunk|abc"),
        ("output: ${oc.env:HOME}", "holds plain values"),
        ("output: !!python/object/apply:os.system ['true']", "must be YAML"),
        ("a: [", "must be YAML"),
        ("[1, 2]", "must be a YAML mapping"),
        ("", "must be a YAML mapping"),
    ],
)
def test_a_bad_recipe_is_one_line(text: str, message: str) -> None:
    with pytest.raises(KvcompileError, match=message) as caught:
        from_recipe(text)
    assert "\n" not in str(caught.value)


def test_finish_is_idempotent() -> None:
    config = compose(["recipe=snapkv", "budget=0.5"])
    assert finish(config) == config
    assert finish(replace(config, output=None)).output == "outputs/snapkv-llama"
