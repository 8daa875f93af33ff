"""A decode step by fused kernels: what its modules compute, in every family of that form, and only while it may."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import family_model
from tiny import tiny_ids, tiny_model
from torch import Tensor, nn

import kvcompile
from kvcompile.adapters.built_in import BUILT_IN
from kvcompile.kernels.cpp import build
from kvcompile.kernels.layers import MOST_ROWS

pytestmark = pytest.mark.skipif(build.available() is not None, reason=f"no compiler: {build.available()}")

TOKENS = 24
WHOLE = {  # families all of whose attending layers run as two kernels
    *("arcee", "bamba", "cwm", "ernie4_5", "flint", "gemma", "gemma2", "gemma3_text", "gemma4_text"),
    *("gemma4_unified_text", "glm", "glm4", "gpt_bigcode", "gpt_neo", "granite", "granite_swa", "helium"),
    *("hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder", "jais2", "lfm2", "llama", "minicpm3"),
    *("ministral", "ministral3", "mistral", "persimmon", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3"),
    *("stablelm", "starcoder2", "vaultgemma", "youtu"),
}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def compiled(name: str = "llama", **over: Any) -> Any:
    return kvcompile.compile(tiny_model(name, **over))


def describe(model: Any) -> str:
    return str(model.kvcompile.decode_step())


def decode(model: Any, cache: Any, batch: int, fused: bool = True) -> Tensor:
    """Logits of one more token of each sequence, `[B, vocabulary]`; the cache stays as it is."""
    steps = model.kvcompile.steps
    model.kvcompile.steps = steps if fused else None
    out = model(tiny_ids(batch, 1, seed=7), past_key_values=cache.fork())
    model.kvcompile.steps = steps
    return out.logits[:, -1]


def prompt(model: Any, batch: int = 3) -> Any:
    return model(tiny_ids(batch, TOKENS)).past_key_values


class Counter:
    """How many tokens run as kernels."""

    def __init__(self, model: Any) -> None:
        self.count, self.steps = 0, model.kvcompile.steps
        self.real = self.steps.graph
        self.steps.graph = self

    def __call__(self, *args: Any) -> Any:
        graph = self.real(*args)
        self.count += graph is not None
        return graph


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_family_decodes_as_its_modules_do(name: str) -> None:
    """Up to rounding, with a padded batch; layers of another form keep their modules, and the report says why."""
    model = kvcompile.compile(family_model(name))
    ids, mask = tiny_ids(3, TOKENS), torch.ones(3, TOKENS, dtype=torch.long)
    mask[0, :5] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    expected, got = decode(model, cache, 3, fused=False), decode(model, cache, 3)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    said, layers = describe(model), len(model.kvcompile.plan.layers)
    whole = said == f"{2 * layers} fused kernels a token"
    assert whole or name not in WHOLE, said
    assert whole or ": " in said, "no reason"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_bfloat16_is_nearer_to_float64_than_modules_are(name: str) -> None:
    """Sums, norms, rotation, activation and residuals in a kernel are in fp32: it rounds less often."""
    exact, errors = tiny_model(name).to(torch.bfloat16).double(), {}
    model = kvcompile.compile(tiny_model(name).to(torch.bfloat16))
    cache = prompt(model)
    whole = torch.cat((tiny_ids(3, TOKENS), tiny_ids(3, 1, seed=7)), 1)
    true = exact(whole).logits[:, -1]
    for fused in (True, False):
        errors[fused] = float((decode(model, cache, 3, fused).double() - true).norm() / true.norm())
    assert errors[True] < 1.05 * errors[False] < 0.1


def test_a_sequence_decodes_as_it_does_alone() -> None:
    """To the bit, logits included: up to 8 rows the head is a kernel too."""
    model = compiled()
    cache = prompt(model, 5)
    batch = decode(model, cache, 5)
    for i in range(5):
        alone = cache.fork()
        alone.batch_select_indices(torch.tensor([i]))
        token = tiny_ids(5, 1, seed=7)[i : i + 1]
        assert torch.equal(model(token, past_key_values=alone).logits[:, -1], batch[i : i + 1])


def test_prompts_gradients_and_large_batches_run_the_modules() -> None:
    model = compiled()
    counter = Counter(model)
    cache = prompt(model, 2)
    model(tiny_ids(1, 1))
    model(tiny_ids(2, 3), past_key_values=cache.fork())
    with torch.enable_grad():
        loss = model(tiny_ids(2, 1), past_key_values=cache.fork()).logits.sum()
    with torch.autocast("cpu", torch.bfloat16):
        model(tiny_ids(2, 1), past_key_values=cache.fork())
    model(tiny_ids(2, 1), past_key_values=cache.fork(), output_hidden_states=True)
    model(tiny_ids(MOST_ROWS + 1, 1), past_key_values=prompt(model, MOST_ROWS + 1))
    assert counter.count == 0
    assert loss.requires_grad
    decode(model, cache, 2)
    decode(model, prompt(model, MOST_ROWS), MOST_ROWS)
    assert counter.count == 2


def test_dropouts_drop_where_the_model_is_trained() -> None:
    """Without gradients too: kernels know of none."""
    model = kvcompile.compile(tiny_model("phi3", resid_pdrop=0.5))
    cache, counter = prompt(model, 2), Counter(model)
    still = decode(model, cache, 2)
    assert counter.count == 1
    model.train()
    assert not torch.equal(decode(model, cache, 2), still)
    assert counter.count == 1
    model.eval()
    assert torch.equal(decode(model, cache, 2), still)


@pytest.mark.parametrize("name", ["phi3", "glm4"])
def test_pieces_of_one_projection_in_few_bits(name: str) -> None:
    """Queries, keys and values, or gate and up, are rows of one weight, which is read where it lies."""
    model = kvcompile.compile(family_model(name), overrides=["model.weights=int8"])
    assert describe(model) == f"{2 * len(model.kvcompile.plan.layers)} fused kernels a token"
    cache = prompt(model)
    fused, modules = decode(model, cache, 3), decode(model, cache, 3, fused=False)
    assert float((fused - modules).norm() / modules.norm()) < 0.03


def places(model: Any) -> list[nn.Module]:
    layer = model.model.layers[1]
    return [layer.input_layernorm, layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp, layer.mlp.act_fn]


@pytest.mark.parametrize("place", range(5))
def test_hooks_fire(place: int) -> None:
    """Put on between two steps, on whatever a kernel stands for; what they return counts."""
    model = compiled()
    cache = prompt(model)
    before = decode(model, cache, 3)
    handle = places(model)[place].register_forward_hook(lambda module, args, out: out * 2)
    changed = decode(model, cache, 3)
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(changed, decode(model, cache, 3, fused=False), rtol=1e-4, atol=1e-4)
    assert "layers 1: a hook" in describe(model)
    handle.remove()
    torch.testing.assert_close(decode(model, cache, 3), before, rtol=1e-4, atol=1e-4)


def test_hooks_on_all_modules_fire() -> None:
    model, seen = compiled(), []
    cache = prompt(model)
    with torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module)):
        decode(model, cache, 3)
    assert {*places(model)} <= {*seen}


class Doubled(nn.Linear):
    """In place of a projection, as an adapter or a quantised layer would be."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replaced(model: Any) -> None:
    old = model.model.layers[2].mlp.down_proj
    model.model.layers[2].mlp.down_proj = Doubled(old.in_features, old.out_features, bias=False)


def reloaded(model: Any) -> None:
    weight = model.model.layers[2].self_attn.k_proj.weight
    weight.data = weight.data * -1


def parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[2].self_attn.v_proj)
    model.model.layers[2].self_attn.v_proj.parametrizations.weight.original0.mul_(3)


def written(model: Any) -> None:
    model.model.layers[2].mlp.gate_proj.weight.mul_(-1)


@pytest.mark.parametrize("change", [replaced, reloaded, parametrized, written])
def test_what_is_put_into_the_model_later_runs(change: Any) -> None:
    model = compiled()
    cache = prompt(model)
    before = decode(model, cache, 3)
    change(model)
    after = decode(model, cache, 3)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, decode(model, cache, 3, fused=False), rtol=1e-4, atol=1e-4)


def test_a_model_in_another_dtype_has_other_kernels() -> None:
    model = compiled()
    counter = Counter(model)
    model.to(torch.bfloat16)
    cache = prompt(model)
    expected = decode(model, cache, 3, fused=False)
    torch.testing.assert_close(decode(model, cache, 3), expected, rtol=0.1, atol=0.1 * float(expected.float().std()))
    assert counter.count == 1
    model.to(torch.float16)
    decode(model, prompt(model), 3)
    assert counter.count == 1
    assert "no kernel for weights in float16" in describe(model)


def test_a_copy_has_its_own_weights() -> None:
    model = compiled()
    cache = prompt(model)
    before = decode(model, cache, 3)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(decode(model, cache, 3), before)
    assert not decode(twin, prompt(twin), 3).any()


def test_positions_of_one_row_serve_all_sequences() -> None:
    model = compiled()
    cache, at = prompt(model), torch.tensor([[TOKENS]])
    steps = [model(tiny_ids(3, 1), past_key_values=cache.fork(), position_ids=p).logits for p in (None, at)]
    assert torch.equal(*steps)


def test_a_dense_and_an_expert_layer_say_what_they_are() -> None:
    assert describe(compiled("llama")) == "8 fused kernels a token"
    assert describe(compiled("mixtral")) == (
        "4 fused kernels a token; layers 0-3: MixtralSparseMoeBlock is no plain MLP"
    )
    assert describe(kvcompile.compile(tiny_model(), overrides=["kernels=sdpa"])) == ""
