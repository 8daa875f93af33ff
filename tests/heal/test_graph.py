"""The compiled graph can be trained: the gradients are those of the plain model, and attentions run alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from converted import SharingCache
from tiny import ARCHITECTURES, tiny_ids, tiny_model

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.compiler import compile_plan
from kvcompile.heal.student import Teacher, student
from kvcompile.heal.taps import taps
from kvcompile.models.sharing import shared


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_through_the_graph_are_those_of_the_plain_model(name: str) -> None:
    plain, ids = tiny_model(name), tiny_ids(2, 24)
    compiled = compile_plan(tiny_model(name), describe(plain.config), "sdpa")
    for model in (plain, compiled):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    wanted = dict(plain.named_parameters())
    assert set(wanted) == {n for n, _ in compiled.named_parameters()}
    for n, p in compiled.named_parameters():
        assert p.grad is not None, n
        torch.testing.assert_close(p.grad, wanted[n].grad, rtol=2e-3, atol=2e-5, msg=n)


def test_shared_layers_get_the_gradients_of_all_their_readers() -> None:
    """Against transformers' own model over a cache that hands each layer its owner's keys and values."""
    plain, ids = tiny_model(), tiny_ids(2, 24)
    compiled = kvcompile.compile(tiny_model(), overrides=["policy=[cla]", "kernels=sdpa"])
    owners = [p.owner for p in compiled.kvcompile.plan.layers]
    assert owners == [0, 0, 2, 2]
    plain(input_ids=ids, labels=ids, past_key_values=SharingCache(plain.config, owners)).loss.backward()
    compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    wanted = dict(plain.named_parameters())
    readers = {n for n, p in wanted.items() if p.grad is None}
    assert readers == {f"model.layers.{i}.self_attn.{kv}_proj.weight" for i in (1, 3) for kv in "kv"}
    assert set(wanted) - readers == {n for n, _ in compiled.named_parameters()}
    for n, p in compiled.named_parameters():
        torch.testing.assert_close(p.grad, wanted[n].grad, rtol=2e-3, atol=2e-5, msg=n)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attentions_alone_on_the_originals_inputs_give_its_outputs(name: str) -> None:
    """The identity: with unconverted weights the layers alone lose nothing, whatever the family."""
    model, ids = tiny_model(name), tiny_ids(2, 24)
    plan = describe(model.config)
    teacher, pupil = Teacher(model, plan), student(shared(model), plan, 1.0, 1.0)
    for stage in ("layers", "model"):
        targets = teacher.targets(ids, stage)
        assert pupil(ids, targets=targets)["loss"].item() < 1e-8
    taken = [s.clone() for s in teacher.targets(ids, "layers")["states"]]
    taken[1] = taken[1] + torch.randn_like(taken[1])
    changed = pupil(ids, targets={**teacher.targets(ids, "layers"), "states": tuple(taken)})
    assert changed["loss"].item() > 1e-3


def test_a_reader_alone_reads_keys_of_its_owners_inputs() -> None:
    model, ids = tiny_model(), tiny_ids(1, 16)
    teacher = Teacher(model, describe(model.config))
    compiled = kvcompile.compile(shared(model), overrides=["policy=[cla]", "kernels=sdpa"])
    targets = teacher.targets(ids, "layers")
    base = kvcompile.compile(shared(model), overrides=["policy=[cla]", "kernels=sdpa"])
    assert [t.name for t in taps(base.kvcompile.graph.graph)] == [f"model.model.layers.{i}.self_attn" for i in range(4)]
    from kvcompile.heal.taps import attentions_alone

    alone = attentions_alone(compiled.kvcompile.graph)
    called = {str(n.target).split(".")[-1] for n in alone.graph.nodes if n.op == "call_module"}
    assert called == {"embed_tokens", "rotary_emb", "q_proj", "k_proj", "v_proj", "o_proj"}, "nothing else is computed"

    def run(states: Any) -> Any:
        cache = compiled.new_cache()
        cache.chunk(prompting=True, last=True)
        return alone(ids, None, torch.arange(16)[None], cache, slice(None), states)

    states = list(targets["states"])
    before = run(states)
    states[0] = states[0] + torch.randn_like(states[0])
    after = run(states)
    assert not torch.allclose(before[1], after[1]), "layer 1 reads the keys of layer 0"
    assert torch.allclose(before[2], after[2])


def test_only_what_is_trained_gets_gradients_and_the_original_stays() -> None:
    model = tiny_model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    pupil = student(shared(model), describe(model.config), 1.0, 1.0)
    for n, p in pupil.named_parameters():
        p.requires_grad_("self_attn" in n)
    pupil(tiny_ids(1, 8))["loss"].backward()
    assert {n for n, p in pupil.named_parameters() if p.grad is not None} == {n for n in before if "self_attn" in n}
