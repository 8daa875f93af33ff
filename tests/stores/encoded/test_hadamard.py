"""The Hadamard rotation changes the basis of what is stored, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from contract_table import compiled, kept_positions, off, plan_of
from test_contract import steps
from tiny import ARCHITECTURES, tiny_ids, tiny_model

from kvcompile.adapters.architectures import describe
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.graph import ops
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import Plan
from kvcompile.stores.encoded.hadamard import _block, block_of, matrix, turn_basis

TOKENS = 40


def rotated_plan(model: Any) -> Plan:
    """Every layer in the Hadamard basis, sliding ones too."""
    return describe(model.config).map(lambda p: replace(p, storage=replace(p.storage, rotated=True)))


@pytest.mark.parametrize(("dim", "block"), [(1, 1), (16, 16), (24, 8), (64, 64), (80, 16), (96, 32), (128, 128)])
def test_the_matrix_is_orthogonal_and_its_own_inverse(dim: int, block: int) -> None:
    h = matrix(dim)
    assert block_of(dim) == block
    torch.testing.assert_close(h @ h, torch.eye(dim, dtype=torch.float64))
    assert torch.equal(h, h.T)
    assert bool(((h == 0) | (h.abs() == h.abs().max())).all()), "every channel of a block counts alike"
    x = torch.randn(3, 5, dim)
    torch.testing.assert_close(turn_basis(x), (x.double() @ h).float())
    torch.testing.assert_close(turn_basis(turn_basis(x)), x)


def test_an_outlier_is_spread_over_all_channels() -> None:
    x = torch.zeros(1, 64)
    x[0, 17] = 8.0
    torch.testing.assert_close(turn_basis(x).abs(), torch.ones(1, 64))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_the_model(name: str) -> None:
    """Separate, fused and interleaved projections, biases, norms of heads, layers without positions, soft-caps."""
    model = tiny_model(name)
    plan = rotated_plan(model)
    plan.check()
    ids = tiny_ids(2, TOKENS + 4)
    with torch.no_grad():
        expected = model(ids).logits
    rotated = compile_plan(shared(model), plan)
    got, cache = steps(rotated, ids, TOKENS)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    plain, _ = steps(compile_plan(model, describe(model.config)), ids, TOKENS)
    torch.testing.assert_close(got, plain, atol=2e-4, rtol=1e-4)
    assert sum(n.target is ops.hadamard for n in rotated.kvcompile.graph.graph.nodes) == 2 * 4
    with torch.no_grad():
        again = model(ids, use_cache=True).past_key_values
    for mine, true in zip(cache.layers, again.layers, strict=True):
        for (keys, values, at), (k, v, held) in zip(mine.held.rows(), true.held.rows(), strict=True):
            mine_in, true_in = torch.isin(at, held), torch.isin(held, at)
            torch.testing.assert_close(turn_basis(keys)[mine_in], k[true_in], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(turn_basis(values)[mine_in], v[true_in], atol=1e-4, rtol=1e-4)


def test_the_original_keeps_its_weights() -> None:
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    turned = compile_plan(shared(model), rotated_plan(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    changed = [n for n, p in turned.named_parameters() if not torch.equal(p, before[n])]
    assert all(n.endswith(("v_proj.weight", "o_proj.weight")) for n in changed)
    assert len(changed) == 2 * 4


def test_a_weight_that_cannot_be_folded_is_refused() -> None:
    model = tiny_model()
    attention: Any = model.model.layers[2].self_attn
    attention.v_proj = torch.nn.Sequential(attention.v_proj)
    with pytest.raises(KvcompileError, match="plain"):
        compile_plan(model, rotated_plan(model))


@pytest.mark.parametrize("score", ["snapkv", "expected_attention", "h2o", "tova", "keydiff", "knorm", "adakv", "corm"])
def test_scores_do_not_depend_on_the_basis(score: str) -> None:
    """Queries seen by scores are rotated too, the mean rotation of expected attention becomes R H, norms stay."""
    options = {score: {} if score == "corm" else {"budget": 16}}
    if score == "snapkv":
        options[score]["window"] = 8
    ids = tiny_ids(2, TOKENS)
    with torch.no_grad():
        plain, rotated = (compiled(stack)(ids).past_key_values for stack in (options, {**options, "rotate": {}}))
    assert kept_positions(rotated) == kept_positions(plain)


def test_few_bits_hold_more_of_keys_with_outliers() -> None:
    """What it is for: a token's own scale suffers from one large channel, the rotated token's does not."""
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[5] *= 20
            layer.self_attn.o_proj.weight.view(64, 4, 16)[:, :2, 5] /= 20
    ids = tiny_ids(2, TOKENS + 20)
    with torch.no_grad():
        expected = model(ids).logits[:, TOKENS:]
    stored = {"kivi": {"key_bits": 8, "value_bits": 4, "group": 16, "residual": 0}}
    errors = []
    for stack in (stored, {"rotate": {}, **stored}):
        got, _ = steps(compile_plan(shared(model), plan_of(stack)), ids, TOKENS)
        errors.append(off(got[:, TOKENS:], expected))
    assert errors[1] < 0.8 * errors[0]


def test_shared_caches_are_rotated_once_and_read_rotated() -> None:
    """A layer that reads another layer's KV rotates its queries and folds its output only."""
    stack = {"cla": {}}
    ids = tiny_ids(2, TOKENS + 4)
    plain, _ = steps(compiled(stack), ids, TOKENS)
    model = compiled({**stack, "rotate": {}})
    rotated, _ = steps(model, ids, TOKENS)
    torch.testing.assert_close(rotated, plain, atol=2e-4, rtol=1e-4)
    nodes = [n.target for n in model.kvcompile.graph.graph.nodes]
    assert nodes.count(ops.hadamard) == 4 + nodes.count(ops.kv_append)


def test_it_is_refused_under_compact_positions() -> None:
    with pytest.raises(KvcompileError, match="compact positions"):
        compiled({"streaming": {"positions": "compact"}, "rotate": {}})


def test_a_basis_first_asked_for_in_inference_mode_serves_training_too() -> None:
    _block.cache_clear()
    with torch.inference_mode():
        turn_basis(torch.ones(1, 48))
    x = torch.ones(1, 48, requires_grad=True)
    turn_basis(x).sum().backward()
    assert x.grad is not None
