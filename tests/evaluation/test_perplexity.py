"""Protects cached perplexity: the same number as one forward for a dense model, and every score read from the cache."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract_table import KIVI8, compiled
from tiny import tiny_ids, tiny_model

from kvcompile.compiler import assemble
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.perplexity import cached_log_likelihood, cached_log_likelihoods, cached_perplexity
from kvcompile.models.sharing import shared


def one_shot(model, window: torch.Tensor, context: int) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(window.unsqueeze(0)).logits[0]
    return F.cross_entropy(logits[context:-1], window[context + 1 :], reduction="none")


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_equals_a_one_shot_forward(name: str) -> None:
    model, ids = tiny_model(name), tiny_ids(1, 40)
    expected = one_shot(model, ids[0, :31], 20).mean().exp().item()
    assert cached_perplexity(model, ids[0, :31], 20, 10) == pytest.approx(expected, rel=1e-4)


def test_windows_are_pooled_from_both_ends_of_the_text() -> None:
    model, ids = tiny_model(), tiny_ids(1, 90)
    losses = torch.cat([one_shot(model, ids[0, at : at + 31], 20) for at in (0, 29, 58)])
    assert cached_perplexity(model, ids, 20, 10, windows=3) == pytest.approx(losses.mean().exp().item(), rel=1e-4)


def test_every_scored_token_is_predicted_by_one_query_over_the_cache() -> None:
    model, shapes = tiny_model(), []
    model.register_forward_pre_hook(
        lambda m, a, k: shapes.append((tuple(k["input_ids"].shape), k["past_key_values"] is not None)), with_kwargs=True
    )
    cached_perplexity(model, tiny_ids(1, 26), 20, 5)
    assert shapes == [((1, 20), False)] + [((1, 1), True)] * 5


@pytest.mark.parametrize("wrong", [{"context": 0}, {"tokens": 0}, {"windows": 0}, {"context": 36}])
def test_texts_too_short_and_empty_windows_are_refused(wrong: dict) -> None:
    with pytest.raises(KvcompileError):
        cached_perplexity(tiny_model(), tiny_ids(1, 40), **{"context": 20, "tokens": 4, **wrong})


STACK = {"snapkv": {"budget": 10, "window": 4, "kernel": 1, "sinks": 2}}


@torch.no_grad()
def naive(model: Any, ids: torch.Tensor, context: int) -> tuple[float, bool]:
    """Token by token over the cache of all but the last token of the context."""
    cache, total, greedy = model(ids[:, : context - 1]).past_key_values, 0.0, True
    for i in range(context - 1, ids.shape[1] - 1):
        logits = model(ids[:, i : i + 1], past_key_values=cache).logits[0, -1]
        total += logits.log_softmax(-1)[ids[0, i + 1]].item()
        greedy = greedy and logits.argmax() == ids[0, i + 1]
    return total, bool(greedy)


def test_log_likelihoods_are_read_through_the_compressed_cache() -> None:
    """Also of a continuation of one token, which a prefill would predict before anything is dropped."""
    dense, model, ids = tiny_model(), compiled(STACK, kernels="sdpa"), tiny_ids(1, 46)
    for end in (41, 46):
        whole = ids[:, :end]
        got = cached_log_likelihood(model, whole[0, :40], whole[0, 40:])
        assert got == pytest.approx(naive(model, whole, 40), abs=1e-4)
        losses = F.cross_entropy(dense(whole).logits[0, 39:-1], whole[0, 40:], reduction="sum")
        assert abs(got[0] + losses.item()) > 1e-2, "the uncompressed model's"
        same = cached_log_likelihood(dense, whole[0, :40], whole[0, 40:])
        assert same[0] == pytest.approx(-losses.item(), rel=1e-4)
    assert cached_log_likelihood(dense, ids[0], dense(ids).logits[0, -1:].argmax(-1))[1]
    with pytest.raises(KvcompileError, match="a token each"):
        cached_log_likelihood(model, ids[0, :0], ids[0])


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_continuations_of_one_context_share_its_cache(batch: int | None) -> None:
    """Each has the score that it has alone; the context is read once."""
    model, ids = compiled(STACK, kernels="sdpa"), tiny_ids(1, 60)[0]
    continuations = [ids[40:43], ids[43:44], ids[44:50], ids[50:52]]
    prompts: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda m, a, k: prompts.append(k["input_ids"].shape[1]) if k["input_ids"].shape[1] > 1 else None,
        with_kwargs=True,
    )
    got = cached_log_likelihoods(model, ids[:40], continuations, batch)
    hook.remove()
    assert prompts == [39]
    for (nats, greedy), ends in zip(got, continuations, strict=True):
        wanted = naive(model, torch.cat([ids[:40], ends])[None], 40)
        assert (nats, greedy) == (pytest.approx(wanted[0], abs=1e-4), wanted[1])


@pytest.mark.parametrize("stack", [STACK, KIVI8, {}], ids=["evicting", "encoding", "dense"])
def test_one_pass_over_a_text_is_told_of_once(stack: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Its logits are the uncompressed model's: only where that matters, and not for what generation asks."""
    model = assemble(shared(tiny_model()), finish(Config(stack=stack, kernels="sdpa")))
    ids = tiny_ids(1, 30)
    with caplog.at_level(logging.WARNING, "kvcompile"), torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, pad_token_id=0)
        cached_perplexity(model, ids, 20, 5)
        with torch.enable_grad():
            model(ids, labels=ids)
        assert not caplog.records
        model(ids)
        model(ids, labels=ids)
    assert len(caplog.records) == bool(stack)
