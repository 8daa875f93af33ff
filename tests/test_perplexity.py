"""Protects cached perplexity: the same number as one forward for a dense model, and every score read from the cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_ids, tiny_model

from kvcompile.errors import KvcompileError
from kvcompile.perplexity import cached_perplexity


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
