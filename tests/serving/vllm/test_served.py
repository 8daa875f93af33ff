"""The folder for vLLM: what it refuses and why, what is in it, and that plan.json gives the plan again or nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config, tiny_model, tiny_tokenizer

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.errors import KvcompileError
from kvcompile.exporters.vllm import VLLM
from kvcompile.serving.vllm.served import FILE, MODEL_TYPE, read
from kvcompile.stack import apply_stack, build_stack

SERVED = ("dropkv", "expected_attention", "ghost", "h2o", "keydiff", "knorm", "pyramidkv", "snapkv", "streaming")
AT_THE_END = {"streaming", "h2o", "tova"}  # they drop tokens while they decode, unless told otherwise
REFUSED = {
    "adakv": "asks the scores",
    "attention_matching": "read again",
    "clusterkv": "a recall drops nothing",
    "corm": "threshold",
    "global_topk": "asks the scores",
    "h2o": "stack.h2o.decode_every=0",
    "infllm": "a recall drops nothing",
    "int8": "--kv-cache-dtype",
    "kivi": "--kv-cache-dtype",
    "kvzip": "read again",
    "leankv": "number formats",
    "offload": "own blocks",
    "paged": "own blocks",
    "retrieval_heads": "share one block table",
    "rotate": "export=[hf]",
    "tova": "stack.tova.decode_every=0",
    "zigzag": "asks the scores",
}


def refusal(*names: str, kind: str = "llama", **options: Any) -> str | None:
    config = tiny_config(kind)
    stack = build_stack(list(names), {names[-1]: options} if options else {})
    try:
        VLLM().refuse(apply_stack(describe(config), stack), config)
    except KvcompileError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", SERVED)
def test_these_policies_are_served(name: str) -> None:
    assert refusal(name, **({"decode_every": 0} if name in AT_THE_END else {})) is None


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_block_table_cannot_express_is_refused_with_the_reason(name: str) -> None:
    before = {"attention_matching": ("snapkv", name), "retrieval_heads": (name,)}.get(name, (name,))
    assert REFUSED[name] in str(refusal(*before))


def test_what_depends_on_an_option_is_refused_with_the_option() -> None:
    assert "stack.streaming.decode_every=0" in str(refusal("streaming"))
    assert "stack.streaming.positions=original" in str(refusal("streaming", decode_every=0, positions="compact"))
    assert "skip_layers" in str(refusal("snapkv", kind="gemma2"))
    assert "latent" in str(refusal("mla", "snapkv"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "model"
    model = kvcompile.compile(
        tiny_model(), overrides=["policy=[gqa,snapkv]", "stack.snapkv.budget=0.25", "kernels=sdpa"]
    )
    kvcompile.export(model, "vllm", path, tokenizer=tiny_tokenizer())
    return path


def test_the_folder_is_marked_so_that_nothing_but_the_plugin_opens_it(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert {"config.json", "model.safetensors", FILE, "README.md"} <= {p.name for p in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["model_type"] == MODEL_TYPE
    if "vllm" in sys.modules:
        pytest.skip("the plugin may be at work in this process")
    with pytest.raises(ValueError, match=r"serve with vllm and kvcompile\[vllm\]"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_plan_json_gives_the_compiled_selection_in_the_shape_of_the_weights(folder: Path) -> None:
    config, facts = (json.loads((folder / name).read_text()) for name in ("config.json", FILE))
    served = read(facts, config["kvcompile"]["served"])
    assert {p.kv_heads for p in served.plan.layers} == {config["num_key_value_heads"]}
    assert all(rule is not None and rule.selection.policy == "snapkv" for rule in served.rules)
    assert served.rules[0].target(1000) == 250  # type: ignore[union-attr]


def test_a_plan_that_was_changed_is_refused(folder: Path) -> None:
    config, facts = (json.loads((folder / name).read_text()) for name in ("config.json", FILE))
    digest = config["kvcompile"]["served"]
    facts["policies"][0]["options"]["budget"] = 0.5
    with pytest.raises(KvcompileError, match="the plan must be the one"):
        read(facts, digest)
    for broken in ({**facts, "format": 99}, {**facts, "policies": [{"name": "nothing", "options": {}}]}, {}):
        with pytest.raises(KvcompileError, match=FILE):
            read(broken, digest)


def test_a_model_without_a_recipe_is_refused(tmp_path: Path) -> None:
    from kvcompile.compiler import compile_plan

    model = tiny_model()
    plan = apply_stack(describe(model.config), build_stack(["knorm"], {}))
    with pytest.raises(KvcompileError, match="compiled from a recipe"):
        kvcompile.export(compile_plan(model, plan, kernels="sdpa"), "vllm", tmp_path / "model")
