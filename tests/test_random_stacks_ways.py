"""A random stack gives the same by every way: another backend, saved and loaded, forked, with beams."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from random_stacks import (
    Case,
    cases,
    comparable,
    compiled,
    decoded,
    kept,
    off,
    prefilled,
    prompts,
    random_examples,
    run,
    tolerance,
)

from kvcompile.artifact import artifact


def everyone(case: Case) -> list[int]:
    return list(range(len(case.lengths)))


def held(cache: Any, case: Case) -> list[list[list[list[int]]]]:
    return [kept(cache, b, len(case.lengths)) for b in everyone(case)]


def backends_agree(model: Any, case: Case) -> None:
    """With the float64 reference; 16 bits may choose another token or expert where two are nearly as good."""
    (logits, cache), (expected, reference) = run(model, case), run(compiled(case, "reference"), case)
    same = held(cache, case) == held(reference, case)
    assert same or not case.exact
    if same and comparable(case, cache):
        assert off(logits, expected) < tolerance(case, cache)


def loads_as_saved(model: Any, case: Case) -> None:
    logits, cache = run(model, case)
    with tempfile.TemporaryDirectory() as folder:
        loaded = artifact.load(artifact.save(model, Path(folder, "artifact")))
    got, again = run(loaded, case)
    assert torch.equal(got, logits)
    assert held(again, case) == held(cache, case)
    assert loaded.kvcompile.plan == model.kvcompile.plan


def forks_go_their_own_way(model: Any, case: Case) -> None:
    _, cache = prefilled(model, case, everyone(case))
    other, third = cache.fork(), cache.fork()
    expected = decoded(model, case, everyone(case), cache)
    with torch.no_grad():
        _, mask = prompts(case, everyone(case))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        model(torch.full_like(mask[:, :1], 7), attention_mask=mask, past_key_values=other)
    assert torch.equal(decoded(model, case, everyone(case), third), expected)
    assert held(third, case) == held(cache, case)


def beams_run(model: Any, case: Case) -> None:
    """Each sequence of a left-padded batch gets the beams it gets alone, where sums are fine enough for that."""
    assume(case.padding == "left")
    ids, mask = prompts(case, everyone(case))
    options = {"max_new_tokens": case.new, "min_new_tokens": case.new, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        got = model.generate(ids, attention_mask=mask, num_beams=beams, num_return_sequences=beams, **options)
        assert got.shape == (beams * len(case.lengths), case.width + case.new)
        assert torch.equal(got[:, : case.width], ids.repeat_interleave(beams, 0))


WAYS = [backends_agree, backends_agree, loads_as_saved, forks_go_their_own_way, beams_run]


@random_examples
@given(cases(), st.sampled_from(WAYS))
def test_a_random_stack_gives_the_same_by_every_way(case: Case, way: Any) -> None:
    model = compiled(case)
    event(way.__name__ if model else "refused")
    if model is not None:
        way(model, case)
