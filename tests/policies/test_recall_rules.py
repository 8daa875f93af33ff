"""What no recall can stand beside, and what nobody can ask of it, is refused in a line that says the fix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from contract_recall import TABLE
from contract_table import Options, compiled, plan_of
from tiny import tiny_ids

from kvcompile.adapters.architectures import describe
from kvcompile.compiler import assemble
from kvcompile.config.compose import compose
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError
from kvcompile.policies.quest import Quest
from kvcompile.stack import build_policy

QUEST = TABLE["quest"].stack()
RULES: dict[str, tuple[Options, str, str, str]] = {
    "a selection while decoding": (
        {"h2o": {"decode_every": 8}, **QUEST},
        "llama",
        "quest: layer 0: tokens are in groups while they are decoded",
        r"stack.h2o.decode_every=0",
    ),
    "compact positions": (
        {"streaming": {"positions": "compact", "decode_every": 0}, **QUEST},
        "llama",
        "tokens in groups keep their positions",
        r"stack.streaming.positions=original",
    ),
    "a selection after it": (
        {**QUEST, "snapkv": {"decode_every": 0}},
        "llama",
        "selection policies come before recall policies, got 'snapkv'",
        "structure -> selection -> recall -> storage",
    ),
    "a structure after it": ({**QUEST, "gqa": {}}, "llama", "structure policies come before recall policies", "order"),
    "it after a storage": ({"kivi": {}, **QUEST}, "llama", "recall policies come before storage policies", "order"),
    "windows alone": (QUEST, "mistral", "quest: some layer must see the whole context", "drop quest"),
    "every layer skipped": (
        TABLE["quest"].stack(skip_layers=[0, 1, 2, 3]),
        "llama",
        "some layer must see the whole context, got none of 4 with a cache, 4 skipped",
        r"stack.quest.skip_layers=\[\]",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_what_it_cannot_stand_beside_is_refused(name: str) -> None:
    stack, architecture, rule, fix = RULES[name]
    with pytest.raises(KvcompileError, match=rule) as caught:
        plan_of(stack, architecture)
    assert "\n" not in str(caught.value)
    assert caught.value.fix
    with pytest.raises(KvcompileError, match=fix):
        plan_of(stack, architecture)


def test_a_layer_has_one_recall() -> None:
    """Neither one policy twice nor two of them."""
    with pytest.raises(KvcompileError, match=r"twice|once"):
        compose(["policy=[quest,quest]"])

    @dataclass(frozen=True)
    class Other(Quest):
        name: ClassVar[str] = "other"

    plan = plan_of(QUEST)
    with pytest.raises(
        KvcompileError, match=r"layer 2: a layer has only one recall, got 'other' after 'quest'\. Fix: drop"
    ):
        Other().apply(plan)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"budget": 0}, "budget"),
        ({"sinks": -1}, "sinks must be 0 or more"),
        ({"recent": -1}, "recent must be 0 or more"),
        ({"every": 0}, "every must be 1 or more"),
        ({"reuse": 0}, "reuse must be 1 or more"),
        ({"page": 0}, "page must be 1 or more"),
        ({"agree": "vote"}, "agree"),
        ({"skip_layers": [9]}, "skip_layers"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(KvcompileError, match=said):
        build_policy("quest", fields).apply(plan_of({}))


def test_a_layer_without_a_cache_or_with_a_window_cannot_be_made_to_recall() -> None:
    """By hand, as no policy does."""
    plan = plan_of(QUEST)
    reads = replace(plan.layers[1], owner=0)
    with pytest.raises(KvcompileError, match=r"quest: layer 1 has no cache of its own.*skip_layers=\[1\]"):
        replace(plan, layers=(plan.layers[0], reads, *plan.layers[2:])).check()
    slides = plan.map(lambda p: replace(p, sliding_window=16))
    with pytest.raises(KvcompileError, match="quest: layer 0 attends to a sliding window, all of which is read"):
        slides.check()


def test_tokens_in_groups_are_not_taken_back() -> None:
    """Assisted decoding takes tokens back; a crop does, up to those that came after the last groups."""
    model = compiled(TABLE["quest"].stack(every=1000), kernels="sdpa")
    with pytest.raises(KvcompileError, match=r"assisted decoding takes back tokens.*recalls"):
        model.generate(tiny_ids(1, 40), prompt_lookup_num_tokens=3, max_new_tokens=4)
    with torch.no_grad():
        cache = model(tiny_ids(1, 60)).past_key_values
        with pytest.raises(KvcompileError, match="only tokens after the last"):
            cache.crop(-1)
        new = tiny_ids(1, 5, seed=7)
        for t in range(5):
            logits = model(new[:, t : t + 1], past_key_values=cache).logits
        cache.crop(-3)
        for t in (2, 3, 4):
            again = model(new[:, t : t + 1], past_key_values=cache).logits
    assert torch.equal(again, logits)


@torch.no_grad()
def test_a_choice_of_several_steps_is_not_taken_back() -> None:
    model = compiled(TABLE["quest, reuse"].stack(every=1000), kernels="sdpa")
    cache = model(tiny_ids(1, 60)).past_key_values
    for t in range(2):
        model(tiny_ids(1, 1, t), past_key_values=cache)
    with pytest.raises(KvcompileError, match="only tokens after the last"):
        cache.crop(-1)


def test_batches_of_transformers_own_cache_are_refused() -> None:
    with pytest.raises(KvcompileError, match="generate_batch"):
        compiled(QUEST, kernels="sdpa").generate_batch([[1, 2, 3]])


def test_gradients_of_a_prompt_are_those_without_it() -> None:
    """Groups and choices take no part in them, and disturb none."""
    from tiny import tiny_model

    grads = []
    for stack in ({}, QUEST):
        model = assemble(tiny_model(), finish(Config(stack=stack, kernels="sdpa")))
        model(tiny_ids(1, 60)).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_plan_says_what_is_recalled() -> None:
    plan = describe(compiled({}).config, "float32")
    recalled = [p.recall for p in build_policy("quest", {}).apply(plan).layers]
    assert [r is None for r in recalled] == [True, True, False, False]
    assert recalled[2].policy == "quest"
