"""Learned sinks, from a checkpoint's parameter to every kernel: gpt_oss is the first family that has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model

from kvcompile.adapters.architectures import describe
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.exporters.static.supports import refuse
from kvcompile.kernels.cpp import build
from kvcompile.plan.structure import Heads
from kvcompile.stack import apply_stack, build_stack
from kvcompile.structure.heads import merge_heads

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
BACKENDS = [
    "reference",
    "sdpa",
    pytest.param("cpp", marks=pytest.mark.skipif(bool(build.available()), reason="no compiler")),
]


def compiled(kernels: str, **stack: Any) -> Any:
    model = tiny_model("gpt_oss")
    return compile_plan(model, apply_stack(describe(model.config), build_stack(list(stack), stack)), kernels)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_a_padded_batch_says_what_transformers_says(kernels: str) -> None:
    ids, mask = tiny_ids(2, 37), torch.ones(2, 37, dtype=torch.long)
    ids[0, :9], mask[0, :9] = 0, 0
    options = {"attention_mask": mask, "return_dict_in_generate": True, **GREEDY}
    expected, got = tiny_model("gpt_oss").generate(ids, **options), compiled(kernels).generate(ids, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_sinks_are_heard(kernels: str) -> None:
    """Without what goes to the sinks, the logits are others: the test above would not be blind."""
    ids, model = tiny_ids(1, 30), compiled(kernels)
    with torch.no_grad():
        before = model(ids).logits
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(-1e4)
        assert not torch.allclose(model(ids).logits, before, atol=1e-2)


@pytest.mark.skipif(bool(build.available()), reason="no compiler")
@pytest.mark.parametrize(
    "stack",
    [
        {"h2o": {"budget": 12, "decode_every": 2}},
        {"expected_attention": {"budget": 0.5}, "adakv": {}},
        {"snapkv": {"budget": 12, "window": 4}, "kivi": {"bits": 8, "group": 8, "residual": 8}},
        {"cla": {"pattern": [0, 1, 0, 1]}, "snapkv": {"budget": 12, "window": 4}},
    ],
    ids=lambda stack: ",".join(stack),
)
def test_kernels_and_scores_count_the_sink_alike(stack: dict[str, Any]) -> None:
    """The same tokens stay whether a kernel adds up attention or a score computes it from queries and keys."""
    kept, logits = [], []
    for kernels in ("reference", "cpp", "sdpa"):
        with torch.no_grad():
            model = compiled(kernels, **stack)
            out = model(tiny_ids(2, 40))
            kept.append(
                [at.tolist() for layer in out.past_key_values.layers if layer.store for *_, at in layer.held.rows()]
            )
            logits.append(model(tiny_ids(2, 1), past_key_values=out.past_key_values).logits)
    assert kept[0] == kept[1] == kept[2]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=2e-3, rtol=2e-3)


def test_sinks_go_where_their_query_heads_go() -> None:
    from kvcompile.adapters.architectures import architecture_of

    model = tiny_model("gpt_oss", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    layout = architecture_of(model.config).layouts(model, describe(model.config))[0]
    old = layout.read()
    assert old.sinks is not None
    new = merge_heads(old, Heads(((0, 2), (1, 3))))
    assert torch.equal(new.sinks, old.sinks[[0, 1, 4, 5, 2, 3, 6, 7]])
    assert torch.equal(layout.learned(new)["sinks"], new.sinks)


def test_programs_refuse_sinks() -> None:
    config = tiny_model("gpt_oss").config
    with pytest.raises(KvcompileError, match="learned sinks"):
        refuse(describe(config), config)
