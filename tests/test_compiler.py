"""What is refused before any work: a place that holds something else, a tokenizer of another model; one plan a job."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

import kvcompile
from kvcompile import compiler, stack
from kvcompile.adapters import architectures
from kvcompile.artifact.manifest import MANIFEST, RECIPE
from kvcompile.config import schema
from kvcompile.config.compose import compose
from kvcompile.config.recipe import to_recipe
from kvcompile.config.schema import Config
from kvcompile.errors import KvcompileError
from kvcompile.job import compile_config, target
from kvcompile.models import loading


def test_an_artifact_of_other_policies_is_not_replaced(tmp_path: Path) -> None:
    """`recipe=mqa` today and `recipe=mqa policy=[gqa]` tomorrow must not end in one folder without a word."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / MANIFEST).touch()
    (folder / RECIPE).write_text(to_recipe(compose(["policy=[snapkv,kivi]"])))
    same = compose(["policy=[snapkv,kivi]", "stack.snapkv.budget=0.1", f"output={folder}"])
    assert target(same) == folder
    for other in ("[kivi]", "[snapkv]", "[]"):
        with pytest.raises(KvcompileError, match=r"holds policy=\[snapkv,kivi\]. Fix: output=<another folder>"):
            target(compose([f"policy={other}", f"output={folder}"]))
    (folder / RECIPE).write_text("broken: [")
    assert target(same) == folder


def test_one_override_needs_no_list() -> None:
    model = kvcompile.compile(tiny_model(), "snapkv", "budget=0.5")
    assert model.kvcompile.plan.layers[0].selection.budget.value == 0.5


def test_a_tokenizer_of_another_vocabulary_is_refused() -> None:
    """Else a token out of range ends as an IndexError in the embeddings, or as an assertion on a GPU."""
    with pytest.raises(KvcompileError, match=r"tokenizer must be the model's own, got a token of number 127 .* 100"):
        kvcompile.compile(tiny_model(vocab_size=100), "snapkv", tokenizer=tiny_tokenizer())
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"])
    kvcompile.compile(tiny_model(), "snapkv", tokenizer=tokenizer)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the things are made that a job needs once; a policy's `apply` by its name."""
    counted: Counter[str] = Counter()

    def count(owner: Any, function: str, name: str) -> None:
        original = getattr(owner, function)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, function, counting)

    for owner, function in (
        (Config, "policies"),
        (schema, "build_stack"),
        (architectures, "describe"),
        (loading, "config_of"),
    ):
        count(owner, function, function)
    for name in ("gqa", "snapkv", "retrieval_heads", "int8"):
        count(stack.policy_class(name), "apply", name)
    return counted


QUICK = ["needle.enabled=false", "speed.enabled=false", "perplexity.enabled=false"]
ONCE = {"policies": 1, "build_stack": 1, "describe": 1, "config_of": 1}


@pytest.mark.parametrize(
    ("overrides", "planned"),
    [
        (["policy=[snapkv,int8]"], {"snapkv": 1, "int8": 1}),
        (["policy=[gqa,snapkv]"], {"gqa": 1, "snapkv": 1}),
        (["policy=[retrieval_heads,int8]", "stack.retrieval_heads.samples=1"], {"retrieval_heads": 2, "int8": 2}),
    ],
)
def test_a_job_makes_its_policies_and_its_plan_once(
    overrides: list[str], planned: dict[str, int], calls: Counter[str], tmp_path: Path
) -> None:
    """They are handed down; only what a policy has learnt from the model makes another plan."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    where = [f"model.pretrained={tmp_path / 'model'}", "model.device=cpu", f"output={tmp_path / 'out'}"]
    config = compose([*overrides, *where, *QUICK])
    calls.clear()  # composing checks the options of each policy
    compile_config(config)
    assert calls == ONCE | planned


def test_only_planning_makes_them_once_too(calls: Counter[str]) -> None:
    config = compose(["policy=[gqa,snapkv]", "plan=only"])
    calls.clear()
    planned = compiler.plan_config(config)
    assert calls == ONCE | {"gqa": 1, "snapkv": 1}
    assert [p.name for p in planned.policies] == [a.name for a in planned.plan.applied]
    assert [a.name for a in planned.shape.applied] == ["gqa"]
    assert planned.identity.applied == ()


def test_weights_of_another_dtype_than_planned_are_planned_anew() -> None:
    """On an accelerator, `dtype=auto` is what the checkpoint holds, which its configuration need not say."""
    config, model = compose(["policy=[int8]"]), tiny_model()
    planned = stack.plan_stack(architectures.describe(model.config, "bfloat16"), config.policies())
    built = compiler.assemble(model, config, stack=planned)
    assert built.kvcompile.plan.dtype == "float32"


def test_a_stack_that_cannot_calibrate_is_refused_before_weights_are_converted() -> None:
    model = tiny_model()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with pytest.raises(KvcompileError, match="retrieval_heads needs a tokenizer to calibrate, got none"):
        kvcompile.compile(model, overrides=["policy=[cla,retrieval_heads]"])
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    kvcompile.compile(model, overrides=["policy=[cla,retrieval_heads]", "stack.retrieval_heads.heads=[[0,1]]"])
