"""How far entries move the state, for output projections of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_table import compiled
from families import family_model
from repeating import OPTIONS, prefilled
from tiny import attentions, tiny_ids
from torch import Tensor, nn

import kvcompile
from kvcompile.errors import KvcompileError
from kvcompile.runtime.replay import norms as under_test
from kvcompile.runtime.replay.norms import Norms, matrix

KVZIP = {"kvzip": {"budget": 12, **OPTIONS}}
MLA = {"mla": {"factor": "weights", "select": "uniform"}}


def moved(model: Any, layer: int, values: Tensor) -> Tensor:
    """||W_O v|| of values `[H_kv, n, D_v]` by query head of one layer, `[H_kv, g, n]`: one head alone at a time."""
    attention, p = attentions(model)[layer], model.kvcompile.plan.layers[layer]
    out, heads = getattr(attention, attention.out), p.query_heads
    rows = []
    for h in range(heads):
        mine = values[h * len(values) // heads]
        if p.latent is not None:
            mine = mine @ attention.latent.up.weight[h * p.latent.kv_heads // heads].T
        alone = torch.zeros(len(mine), heads, p.head_dim)
        alone[:, h] = mine
        rows.append((out(alone.flatten(1)) - out(torch.zeros(1, heads * p.head_dim))).norm(dim=-1))
    return torch.unflatten(torch.stack(rows), 0, (len(values), -1))


@pytest.mark.parametrize(
    ("stack", "architecture"),
    [({}, "llama"), ({}, "gpt_neox"), ({}, "phi3"), ({"gqa": {}}, "llama"), ({"cla": {}}, "qwen2"), (MLA, "llama")],
    ids=["llama", "gpt_neox", "phi3", "gqa", "cla", "mla"],
)
def test_norms_are_what_the_output_projection_makes_of_each_head(
    stack: Any, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heads of all layers that read a cache, in the order of their queries; latents through their up-projection."""
    model, seen = compiled({**stack, **KVZIP}, architecture, kernels="sdpa"), []
    inner = Norms.shown

    def shown(self: Norms, *args: Any) -> Any:
        seen.append((self.hidden, inner(self, *args)))
        return seen[-1][1]

    monkeypatch.setattr(under_test.Norms, "shown", shown)
    cache = prefilled(model, tiny_ids(1, 60))
    assert all(sum(n) == 12 * len(n) for n in cache.lengths())
    assert len({each.layer for _, each in seen}) == len(model.kvcompile.plan.owners)
    for hidden, each in seen:
        readers = [p.index for p in model.kvcompile.plan.layers if p.owner == each.layer]
        with torch.no_grad():
            expected = torch.cat([moved(model, i, each.values) for i in readers], 1)
        torch.testing.assert_close(each.value_norms, expected, atol=1e-4, rtol=1e-3)
        heads, group = expected.shape[0], expected.shape[1] // len(readers)
        states = torch.cat([hidden[i].expand(heads, group, -1) for i in readers], 1)
        assert torch.equal(each.hidden_norms, states)
        assert each.hidden_norms.shape == each.queries.shape[:3]


def test_what_multiplies_rows_need_not_be_a_linear_layer() -> None:
    """An adapter around one, say: its matrix is found by what it does."""
    plain = nn.Linear(6, 4)
    around = nn.Sequential(plain, nn.Linear(4, 4))
    expected = around[1].weight @ plain.weight
    torch.testing.assert_close(matrix(around, 6, torch.zeros(1)), expected)
    assert matrix(plain, 6, torch.zeros(1)) is plain.weight


@pytest.mark.parametrize(
    ("family", "says"),
    [("afmoe", "a gate or a norm before o_proj"), ("bitnet", "a gate or a norm"), ("longcat_flash", "two attentions")],
)
def test_where_more_than_a_projection_stands_behind_is_refused(family: str, says: str) -> None:
    """Attention alone is a score there too."""
    ids = "stack.kvzip.ids=[[3,4],[5,6],[7]]"
    overrides = ["policy=[kvzip]", "budget=20", "kernels=sdpa", ids]
    with pytest.raises(KvcompileError, match=says):
        kvcompile.compile(family_model(family), overrides=overrides)
    if family != "longcat_flash":
        return
    model = kvcompile.compile(family_model(family), overrides=[*overrides, "stack.kvzip.normalise=false"])
    with torch.no_grad():
        cache = model(tiny_ids(1, 40)).past_key_values
    assert cache.lengths()[0] == [20]
