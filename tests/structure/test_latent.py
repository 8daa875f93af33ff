"""Latents by their algebra: moments of the text, RoPE components of keys, and the metric that a fit minimises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from converted import planned
from tiny import attentions, layouts, rotary, tiny_ids, tiny_model

from kvcompile.adapters.architectures import describe
from kvcompile.calibration.activations import attention_inputs
from kvcompile.plan.structure import Latent
from kvcompile.structure.latent import Components, components, decompose
from kvcompile.structure.moments import Moments, moments

TEXT = tiny_ids(1, 300, seed=7)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("name", "over"),
    [("mistral", {}), ("gemma2", {"attn_logit_softcapping": 0.5}), ("llama", {"rope_parameters": YARN})],
)
def test_moments_are_those_of_the_models_own_attention(name: str, over: dict[str, Any]) -> None:
    """Inputs by hooks, distances by the probabilities that transformers returns; a turn is one whatever its stretch."""
    model = tiny_model(name, attn_implementation="eager", **over)
    ids, plan = tiny_ids(1, 60), describe(model.config)
    found = moments(model, plan, ids)
    with torch.no_grad():
        seen = model(ids, output_attentions=True).attentions
    distance = torch.arange(60).unsqueeze(1) - torch.arange(60)
    for layer, inputs in enumerate(attention_inputs(model, ids)):
        h = torch.cat((inputs, torch.ones(60, 1)), 1).double()
        torch.testing.assert_close(found[layer].asking, h.T @ h / 60, atol=1e-5, rtol=1e-5)
        mass = seen[layer][0].mean(0).double()
        answering = h.T @ (h * mass.sum(0).unsqueeze(1)) / 60
        torch.testing.assert_close(found[layer].answering, answering, atol=1e-5, rtol=1e-5)
        cos, sin = (x[:, :8].double() for x in rotary(model, layer)(torch.arange(60)))
        turns = torch.complex(cos, -sin)[distance.clamp(min=0)] / torch.complex(cos, sin)[0].abs()  # [60, 60, 8]
        expected = torch.einsum("ij,ijf->f", mass.to(turns.dtype), turns) / 60
        torch.testing.assert_close(found[layer].turn, expected, atol=1e-5, rtol=1e-5)


def test_moments_are_kept_for_one_more_question() -> None:
    model = tiny_model()
    plan = describe(model.config)
    first = moments(model, plan, TEXT, keep=True)
    assert moments(model, plan, TEXT) is first
    again = moments(model, plan, TEXT)
    assert again is not first
    assert torch.equal(again[0].asking, first[0].asking)


def test_components_are_keys_in_other_coordinates_that_commute_with_rope() -> None:
    model = tiny_model("phi3")
    p = describe(model.config).layers[0]
    weights = layouts(model)[0].read()
    seen = moments(model, describe(model.config), TEXT)[0]
    parts = components(weights, p, seen.asking, seen.answering, mix=True)
    torch.testing.assert_close(parts.into @ parts.back, torch.eye(32, dtype=torch.float64))
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 16, dtype=torch.float64, generator=draw)
    cos, sin = (x[0].double() for x in rotary(model, 0)(torch.tensor([5])))

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x[:, :4], x[:, 4:8]
        return torch.cat((x[:, :8] * cos + torch.cat((-second, first), 1) * sin, x[:, 8:]), 1)

    before, after = parts.into @ keys.flatten(), parts.into @ turned(keys).flatten()
    for (real, imaginary), f in zip(parts.pairs, parts.frequency, strict=True):
        angle = torch.complex(cos[f], sin[f])
        was, now = torch.complex(before[real], before[imaginary]), torch.complex(after[real], after[imaginary])
        torch.testing.assert_close(was * angle, now)
    torch.testing.assert_close(before[parts.rest], after[parts.rest])
    by_frequency = torch.tensor(parts.energy).view(4, 2)
    assert bool((by_frequency[:, 0] >= by_frequency[:, 1]).all()), "of a frequency the first component has most energy"


def test_energy_is_the_expected_square_of_a_logit() -> None:
    """Of all components together, over independent queries and keys before rotation."""
    model = tiny_model()
    p = describe(model.config).layers[0]
    weights = layouts(model)[0].read()
    uniform = moments(model, describe(model.config), TEXT)[0].asking
    hidden = attention_inputs(model, TEXT)[0].double()
    keys = torch.einsum("gdh,nh->gnd", weights.key.weight.double(), hidden)
    queries = torch.einsum("gdh,nh->gnd", weights.query.weight.double(), hidden)
    one = components(weights, p, uniform, uniform, mix=False)
    f = 3
    for energy in [e for e, at in zip(one.energy, one.frequency, strict=True) if at == f]:
        sizes = []
        for g in range(2):
            k = torch.complex(keys[g, :, f], keys[g, :, f + 8]).abs().square().mean()
            q = queries[2 * g : 2 * g + 2]
            q = torch.complex(q[:, :, f], q[:, :, f + 8]).abs().square().mean(1).sum()
            sizes.append(float(k * q))
        assert min(abs(energy / size - 1) for size in sizes) < 1e-4
    mixed = components(weights, p, uniform, uniform, mix=True)
    assert sum(mixed.energy) == pytest.approx(sum(one.energy), rel=1e-4)
    assert max(mixed.energy) > max(one.energy)


def test_what_keeps_its_position_has_most_energy_or_loses_most_without() -> None:
    none = torch.zeros(0)
    parts = Components(none, none, [(0, 1), (2, 3), (4, 5), (6, 7)], [0, 0, 1, 1], [4.0, 1.0, 3.0, 2.0], [])
    assert parts.best(2) == (0, 1)
    assert parts.best(3) == (0, 1, 1)
    still = torch.tensor([0.99 + 0.1j, 0.1j])  # frequency 0 hardly turns: a mean of its turns says it all
    assert parts.best(2, still) == (1, 1)
    assert parts.best(3, still) == (0, 1, 1)


def rows_of(part: Any) -> torch.Tensor:
    """A projection by head with its bias as the last column, `[H, D, hidden + 1]`."""
    return torch.cat((part.weight, part.bias.unsqueeze(-1)), -1).double()


@pytest.mark.parametrize("mix", [True, False])
def test_a_component_has_the_energy_that_is_said_of_it(mix: bool) -> None:
    """E |y|^2 over what attention looks at; mixtures of one frequency do not correlate either."""
    model = tiny_model("llama", attention_bias=True)
    p = describe(model.config).layers[0]
    weights = layouts(model)[0].read()
    seen = moments(model, describe(model.config), TEXT)[0]
    parts = components(weights, p, seen.asking, seen.answering, mix)
    rows = parts.into @ rows_of(weights.key).flatten(0, 1)
    real, imaginary = (rows[[pair[part] for pair in parts.pairs]] for part in (0, 1))
    y = torch.complex(real, imaginary)
    spread = y @ seen.answering.to(y.dtype) @ y.mH
    energy = torch.tensor(parts.energy, dtype=torch.float64)
    torch.testing.assert_close(spread.diagonal().real, energy, rtol=1e-6, atol=1e-9)
    if mix:
        pairs = spread.view(8, 2, 8, 2).diagonal(dim1=0, dim2=2)  # of one frequency, [2, 2, 8]
        assert float(pairs[0, 1].abs().max()) < 1e-6 * float(energy.max())


@pytest.mark.parametrize("damp", [True, False])
@pytest.mark.parametrize("mix", [True, False])
def test_a_key_without_position_keeps_the_mean_of_its_turns(mix: bool, damp: bool) -> None:
    """q^* k exp(-i theta distance) becomes q^* k times the mean of that, and of RoPE's stretch."""
    model = tiny_model("llama", attention_bias=True)
    p = describe(model.config).layers[0]
    weights = layouts(model)[0].read()
    seen = moments(model, describe(model.config), TEXT)[0]
    kept, amplitude = (0, 0, 1, 3, 4, 4, 7), 1.5  # of frequencies 1, 3 and 7 one of two components
    made = decompose(weights, p, Latent(9, kept, 2, mix=mix, damp=damp), seen, amplitude)
    rest = made.back_rest.shape[2]
    lost = made.back_rest @ made.rows[:rest]  # [H_kv, D, hidden + 1]
    keys = rows_of(weights.key)
    for f in (2, 5, 6):
        turn = amplitude**2 * (seen.turn[f] if damp else torch.ones_like(seen.turn[f]))
        was, now = (torch.complex(x[:, f], x[:, f + 8]) for x in (keys, lost))
        torch.testing.assert_close(now, turn * was)
    for f in (0, 4):
        assert float(lost[:, [f, f + 8]].abs().max()) < 1e-9 * float(keys.abs().max())


def test_the_metric_is_the_expected_square_of_the_change_of_the_output() -> None:
    """By sums over tokens: an error of a value is felt through W_O, one of a logit by as much as values spread."""
    model = tiny_model("llama", attention_bias=True)
    p = describe(model.config).layers[0]
    weights = layouts(model)[0].read()
    inputs = attention_inputs(model, TEXT)[0].double()
    inputs = torch.cat((inputs, torch.ones(len(inputs), 1)), 1)
    uniform = inputs.T @ inputs / len(inputs)
    seen = Moments(uniform, uniform, torch.ones(8, dtype=torch.complex128))
    made = decompose(weights, p, Latent(8, (0, 1, 2, 3), 2), seen)
    rest = made.back_rest.shape[2]
    error = torch.randn(rest + 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of_keys, of_values = made.back_rest @ error[:rest], error[rest:].view(2, 16)
    queries, values = (torch.einsum("hdi,ni->nhd", rows_of(x), inputs) for x in (weights.query, weights.value))
    spread = values - values.mean(0)
    expected = 0.0
    for g, heads in enumerate(((0, 1), (2, 3))):
        out = [weights.out[:, h].double() for h in heads]
        size = sum((spread[:, g] @ o.T).square().sum(1).mean() for o in out) / 2
        logits = sum((p.scale * queries[:, h] @ of_keys[g]).square().mean() for h in heads)
        expected += float(size * logits + sum((o @ of_values[g]).square().sum() for o in out))
    assert float((made.metric @ error).square().sum()) == pytest.approx(expected, rel=1e-4)


def test_a_constant_of_the_keys_is_held_unless_a_latent_is_centred() -> None:
    model = tiny_model("llama", attention_bias=True)
    with torch.no_grad():
        attentions(model)[0].k_proj.bias.add_(20)
    p = describe(model.config).layers[0]
    weights = layouts(model)[0].read()
    seen = moments(model, describe(model.config), TEXT)[0]
    lost = {}
    for centred in (True, False):
        made = decompose(weights, p, Latent(4, (), 2, centred=centred), seen)
        first, rest = made.vectors[:, :4], made.back_rest.shape[2]
        mean = made.rows @ seen.answering[-1]
        held = made.inverse @ (first @ (first.T @ (made.metric @ mean)))
        lost[centred] = float((held - mean)[:rest].norm() / mean[:rest].norm())
    assert lost[False] < 0.1 < 0.5 < lost[True]


def test_more_rank_never_loses_energy() -> None:
    model = tiny_model()
    p = planned(model, {"mla": {"rope": 8, "rank": 8, "select": "high"}}).layers[1]
    weights = layouts(model)[1].read()
    found = decompose(weights, p, Latent(8, p.latent.frequencies, 2), moments(model, describe(model.config), TEXT)[1])
    assert [found.rank(e) for e in (1e-9, 1.0)] == [1, 56]
    assert [found.rank(e) for e in (0.2, 0.5, 0.9)] == sorted(found.rank(e) for e in (0.2, 0.5, 0.9))
