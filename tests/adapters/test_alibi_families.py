"""Policies over a model whose logits fall with distance: they run, or say that they do not know of distances."""

from __future__ import annotations

import pytest
import torch
from families import family_config, family_model
from tiny import tiny_ids
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.falcon.modeling_falcon import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.adapters.families.gpt2 import mpt_slopes
from kvcompile.adapters.families.gpt_neox import bloom_slopes
from kvcompile.errors import KvcompileError
from kvcompile.kernels.reference import fall


class Heads:
    def __init__(self, count: int) -> None:
        self.num_attention_heads = count


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 16, 25, 112])
def test_slopes_are_those_of_the_models(heads: int) -> None:
    bloom, mpt = bloom_slopes(Heads(heads)), mpt_slopes(Heads(heads))
    torch.testing.assert_close(torch.tensor(bloom), _get_alibi_slopes(heads, torch.device("cpu")))
    torch.testing.assert_close(torch.tensor(mpt), -build_mpt_alibi_tensor(heads, 2)[:, 0, 0])


@pytest.mark.parametrize("policy", ["h2o", "tova", "keydiff", "zigzag", "kvzip", "kivi", "leankv"])
def test_policies_that_run(policy: str) -> None:
    """A prompt and tokens after it; the last says what is left is met."""
    model, ids = family_model("bloom"), tiny_ids(1, 40)
    replays = ["stack.kvzip.ids=[[3,4],[5,6],[7]]"] if policy == "kvzip" else []
    compiled = kvcompile.compile(model, overrides=[f"policy=[{policy}]", "kernels=cpp", *replays])
    with torch.no_grad():
        out = compiled.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out.shape == (1, 44)


@pytest.mark.parametrize("policy", ["quest", "clusterkv", "infllm", "expected_attention", "ghost"])
def test_policies_that_know_no_distance(policy: str) -> None:
    everywhere = [f"stack.{policy}.skip_layers=[]"] if policy in ("quest", "clusterkv") else []
    with pytest.raises(KvcompileError, match=r"fall with their distance|are turned") as error:
        kvcompile.compile(family_model("bloom"), overrides=[f"policy=[{policy}]", *everywhere])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", ["gqa", "mla"])
def test_weights_are_not_converted(policy: str) -> None:
    with pytest.raises(KvcompileError, match="only in layouts that are known"):
        kvcompile.compile(family_model("bloom"), overrides=[f"policy=[{policy}]"])


@pytest.mark.parametrize("heads", [4, 6])
def test_falcon_rounds_its_distances(heads: int) -> None:
    """To what transformers adds to the logits of each entry, also where bfloat16 has no such position."""
    config = family_config("falcon (alibi)", num_attention_heads=heads)
    (layer, _) = describe(config).layers
    assert (layer.rotates, layer.turnable, layer.alibi_rounded) == (False, False, True)
    positions = torch.arange(3000)
    expected = build_alibi_tensor(torch.ones(1, 3000, dtype=torch.long), heads, torch.float32)[:, 0] * layer.scale
    got = fall(torch.tensor(layer.alibi)[:, None], positions, positions[-1:], layer.scale, layer.alibi_rounded)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got.diff(), expected.diff()[:, :1].expand_as(got[:, 1:]), rtol=1e-3)


def test_falcon_with_rotary_positions_falls_not() -> None:
    (layer, _) = describe(family_config("falcon")).layers
    assert (layer.rotates, layer.turnable, layer.alibi, layer.alibi_rounded) == (True, True, (), False)
