"""Merging KV heads: exact where heads are equal, a plain smaller model of transformers, and invariant rotations."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from converted import WIDE, converted, copied, edit, logits, parameters, planned
from tiny import ARCHITECTURES, attentions, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.adapters.layout import Projection, Weights
from kvcompile.calibration.activations import LayerKV, keys_values
from kvcompile.errors import KvcompileError
from kvcompile.plan.structure import Heads
from kvcompile.policies.gqa import divisor
from kvcompile.structure.convert import convert
from kvcompile.structure.grouping import alignment, by_similarity, partition, similarity
from kvcompile.structure.heads import merge_heads

STOCK = [name for name in ARCHITECTURES if name != "gpt_neox"]  # which has no stock class with fewer KV heads
OWN_KEYS = [name for name in ARCHITECTURES if name not in ("qwen3", "gemma3_text", "olmo2")]
SIZES = {name: WIDE if name != "gpt_neox" else {"num_attention_heads": 4} for name in ARCHITECTURES}


def wide(name: str, **over: Any) -> Any:
    """A model with 4 KV heads; llama and qwen2 with biases."""
    biased = {"attention_bias": True} if name == "llama" else {}
    return tiny_model(name, **SIZES[name], **biased, **over)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_heads_merge_without_a_trace(name: str) -> None:
    """Heads 0 and 1, and 2 and 3, are equal: half of them say the same."""
    model = copied(wide(name), [0, 0, 2, 2])
    for merge in ("mean", "first"):
        got = converted(model, {"gqa": {"kv_heads": 2, "merge": merge}})
        torch.testing.assert_close(logits(got), logits(model), atol=1e-5, rtol=1e-5)
    kept = attentions(got)[0]
    if hasattr(kept, "k_proj"):
        assert torch.equal(kept.k_proj.weight, attentions(model)[0].k_proj.weight.view(4, 16, -1)[[0, 2]].flatten(0, 1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_likeness_finds_equal_heads_wherever_they_are(name: str) -> None:
    """Heads 0 and 3, and 1 and 2, are equal: query heads must move with them, and the output's columns with those."""
    model = copied(wide(name), [0, 1, 1, 0])
    seen = keys_values(model, tiny_ids(1, 40))
    groups = [[list(g) for g in by_similarity(kv, 2)] for kv in seen]
    assert groups == [[[0, 3], [1, 2]]] * 4
    got = converted(model, {"gqa": {"kv_heads": 2, "merge": "similarity", "groups": groups}})
    torch.testing.assert_close(logits(got), logits(model), atol=1e-4, rtol=1e-4)
    neighbours = converted(model, {"gqa": {"kv_heads": 2}})
    assert (logits(neighbours) - logits(model)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_heads_merge_to_the_bit(dtype: torch.dtype) -> None:
    """Also three of them, whose sum in their own dtype is rounded."""
    row = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    heads = Projection(row.expand(6, -1, -1))
    out = torch.zeros(64, 6, 16, dtype=dtype)
    got = merge_heads(Weights(heads, heads, heads, out), Heads(((0, 1, 2), (3, 4, 5))))
    assert torch.equal(got.key.weight, row.expand(2, -1, -1))


def rotated(model: Any, keys: bool) -> Any:
    """Every second KV head becomes a copy of the one before it, in another basis: the same function as before."""
    width = {"phi3": 8, "gpt_neox": 4}.get(model.config.model_type, 16)
    draw = torch.Generator().manual_seed(3)

    def change(w: Weights, p: Any) -> Weights:
        like, heads = [0, 0, 2, 2], p.kv_heads
        same = Weights(w.query, w.key.map(lambda x: x[like]), w.value.map(lambda x: x[like]), w.out, w.head_norm)
        orthogonal = torch.linalg.qr(torch.randn(heads, 16, 16, generator=draw, dtype=torch.float64)).Q
        turn = torch.linalg.qr(torch.randn(heads, 16, 16, generator=draw, dtype=torch.float64)).Q
        if p.rotates:
            turn, half = torch.zeros(heads, 16, 16, dtype=torch.float64), width // 2
            angle, i = 6.28 * torch.rand(heads, half, generator=draw, dtype=torch.float64), torch.arange(half)
            turn[:, i, i] = turn[:, i + half, i + half] = angle.cos()
            turn[:, i, i + half], turn[:, i + half, i] = -angle.sin(), angle.sin()
            rest = torch.linalg.qr(torch.randn(heads, 16 - width, 16 - width, generator=draw, dtype=torch.float64)).Q
            turn[:, width:, width:] = rest
        one_each = Heads(tuple((h,) for h in range(heads)))
        return merge_heads(same, one_each, turn if keys else None, orthogonal)

    return edit(model, change)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_alignment_undoes_a_change_of_basis(name: str) -> None:
    """Copies in another basis: the plain mean ruins them, the mean after alignment is exact."""
    align = "both" if name in OWN_KEYS else "values"
    plain = copied(wide(name), [0, 0, 2, 2])
    model = rotated(wide(name), keys=align == "both")
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)
    aligned = converted(model, {"gqa": {"kv_heads": 2, "align": align}}, tiny_ids(1, 60))
    torch.testing.assert_close(logits(aligned), logits(model), atol=1e-4, rtol=1e-4)
    assert (logits(converted(model, {"gqa": {"kv_heads": 2}})) - logits(model)).abs().max() > 1e-2


@pytest.mark.parametrize("stack", [{"gqa": {"kv_heads": 2}}, {"mqa": {}}, {"mqa": {"merge": "first"}}], ids=str)
@pytest.mark.parametrize("name", STOCK)
def test_the_result_is_a_plain_smaller_model(name: str, stack: dict[str, Any]) -> None:
    """Its state dict loads into transformers' own class with its config, and gives the same logits."""
    got = converted(wide(name), stack)
    assert got.config.num_key_value_heads == (1 if "mqa" in stack else 2)
    options = {"attn_implementation": "eager"} if name == "gemma2" else {}
    stock = AutoModelForCausalLM.from_config(got.config, **options).eval()
    stock.load_state_dict(got.state_dict())
    torch.testing.assert_close(logits(got), logits(stock), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_and_bytes_are_those_planned(name: str) -> None:
    model = wide(name)
    got, before = converted(model, {"gqa": {"kv_heads": 1}}), describe(model.config)
    gone = 3 * 16 * 2 * model.config.hidden_size * 4  # three heads' keys and values in four layers
    biases = 3 * 16 * 2 * 4 if name in ("llama", "qwen2", "gpt_neox", "gpt_oss") else 0
    norms = 3 * 16 * 4 if name == "olmo2" else 0
    assert parameters(model) - parameters(got) == gone + biases + norms
    cache = got(tiny_ids(2, 30)).past_key_values
    planned_bytes, dense = got.kvcompile.plan.bytes(2, 30), before.bytes(2, 30)
    assert [r.dense_bytes for r in planned_bytes] == [r.dense_bytes for r in dense]
    assert cache.nbytes() == sum(r.bytes for r in planned_bytes) == sum(r.bytes for r in dense) // 4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_many_heads_as_before_is_the_identity(name: str) -> None:
    model = wide(name)
    got = converted(model, {"gqa": {"kv_heads": 4, "merge": "similarity"}})
    assert got.kvcompile.plan.layers == describe(model.config).layers
    assert torch.equal(logits(got), logits(converted(model, {})))
    assert {n: t.data_ptr() for n, t in got.state_dict().items()} == {
        n: t.data_ptr() for n, t in model.state_dict().items()
    }


def test_the_original_is_not_touched() -> None:
    model = wide("llama")
    before, expected = {n: t.clone() for n, t in model.state_dict().items()}, logits(model)
    converted(model, {"mqa": {"align": "both"}}, tiny_ids(1, 30))
    assert model.config.num_key_value_heads == 4
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_rotations_are_orthogonal_and_commute_with_rope() -> None:
    x = torch.randn(4, 50, 16, generator=torch.Generator().manual_seed(0))
    for width in (0, 4, 16):
        turns = alignment(x, ((0, 2), (1, 3)), width)
        eye = torch.eye(16, dtype=torch.float64)
        torch.testing.assert_close(turns @ turns.transpose(1, 2), eye.expand(4, 16, 16))
        if width:
            angle, half = torch.rand(width // 2, dtype=torch.float64), width // 2
            rope, i = eye.clone(), torch.arange(half)
            rope[i, i] = rope[i + half, i + half] = angle.cos()
            rope[i, i + half], rope[i + half, i] = -angle.sin(), angle.sin()
            torch.testing.assert_close(turns @ rope, rope @ turns)
        together = lambda r: float((x[0].double() @ r[0].T - x[2].double() @ r[2].T).pow(2).sum())  # noqa: E731
        assert together(turns) < together(eye.expand(4, 16, 16))


def test_similar_heads_are_grouped_as_well_as_can_be() -> None:
    draw = torch.Generator().manual_seed(1)
    for _ in range(10):
        kv = LayerKV(*torch.randn(2, 6, 5, 3, generator=draw))
        alike = similarity(kv.keys)
        torch.testing.assert_close(alike.diagonal(), torch.ones(6, dtype=torch.float64))

        def inside(groups: Any, alike: Any = alike) -> float:
            return sum(float(alike[i, j]) for g in groups for i in g for j in g if i < j)

        best = max(inside((p[:2], p[2:4], p[4:])) for p in permutations(range(6)))
        got = partition(alike, 3)
        assert sorted(h for g in got for h in g) == list(range(6))
        assert inside(got) >= max(inside(((0, 1), (2, 3), (4, 5))), 0.9 * best)


def test_default_is_the_largest_proper_divisor() -> None:
    assert [divisor("gqa", "kv_heads", 0, n) for n in (1, 2, 3, 8, 9, 32)] == [1, 1, 1, 4, 3, 16]


@pytest.mark.parametrize(
    ("stack", "says"),
    [
        ({"gqa": {"kv_heads": 3}}, "must divide the model's 4 KV heads, got 3. Fix: one of 1, 2, 4"),
        ({"gqa": {"kv_heads": 2}, "mqa": {}}, "heads can be merged only once"),
        ({"gqa": {"kv_heads": 2, "merge": "similarity", "groups": [[[0, 1], [2, 3]]]}}, "each of the 4 layers"),
        ({"gqa": {"kv_heads": 2, "merge": "similarity", "groups": [[[0, 1], [1, 3]]] * 4}}, "groups of layer 0"),
        ({"gqa": {"groups": [[[0, 1]]]}}, "empty unless merge=similarity"),
        ({"gqa": {"merge": "first", "align": "both"}}, "none where merge=first"),
        ({"snapkv": {}, "gqa": {}}, "structure policies come before selection"),
    ],
)
def test_what_cannot_be_is_refused(stack: dict[str, Any], says: str) -> None:
    with pytest.raises(KvcompileError, match=says):
        planned(wide("llama"), stack)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "olmo2"])
def test_normed_keys_are_not_rotated(name: str) -> None:
    with pytest.raises(KvcompileError, match=r"cannot be rotated.*align=values"):
        planned(wide(name), {"mqa": {"align": "both"}})


def test_alignment_needs_text() -> None:
    with pytest.raises(KvcompileError, match="heads are aligned on text"):
        converted(wide("llama"), {"mqa": {"align": "values"}})


def _offloaded(model: Any) -> None:
    model.model.layers[2].self_attn.v_proj.to("meta")


def _tied(model: Any) -> None:
    model.model.layers[2].self_attn.v_proj.weight = model.model.layers[1].self_attn.v_proj.weight


def _quantised(model: Any) -> None:
    class Int4Linear(torch.nn.Linear):
        pass

    model.model.layers[2].self_attn.v_proj.__class__ = Int4Linear


class Codes(torch.Tensor):
    """Stands for a quantised weight."""


def _codes(model: Any) -> None:
    linear = model.model.layers[2].self_attn.v_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Codes))


def test_quantised_weights_are_refused_before_anything_is_calibrated() -> None:
    model = tiny_model("llama")
    _codes(model)
    for stack in (["policy=[gqa]", "stack.gqa.merge=similarity"], ["policy=[rotate]"]):
        with pytest.raises(KvcompileError, match=r"v_proj must be a plain nn\.Linear .* got Linear with Codes"):
            kvcompile.compile(model, overrides=stack)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_codes, "Linear with Codes of torch.float32"),
        (_offloaded, r"layers\.2\.self_attn\.v_proj"),
        (_tied, "layer 1: v_proj.weight is tied"),
        (_quantised, "Int4Linear"),
    ],
)
def test_weights_that_cannot_be_edited_are_refused_and_nothing_changes(change: Any, says: str) -> None:
    model = tiny_model("llama")
    change(model)
    modules = list(model.modules())
    with pytest.raises(KvcompileError, match=says):
        convert(model, planned(model, {"mqa": {}}))
    assert list(model.modules()) == modules
    assert model.config.num_key_value_heads == 2


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(half: torch.dtype) -> None:
    model = copied(wide("llama"), [0, 0, 2, 2]).to(half)
    got = converted(model, {"gqa": {"kv_heads": 2}})
    assert {p.dtype for p in got.parameters()} == {half}
    assert torch.equal(attentions(got)[1].v_proj.weight[:16], attentions(model)[1].v_proj.weight[:16])
