"""`paged` in a model: the same tokens as without it, and what forks, beams and repeated prompts share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_table import HEADS, KIVI8, LAYERS, Options, compiled, kept_positions, plan_of
from tiny import tiny_ids
from torch import Tensor

from kvcompile.errors import KvcompileError

PROMPT, PAGE = 60, 16
PAGED: Options = {"paged": {}}
STACKS: dict[str, Options] = {
    "alone": {},
    "adakv": {"adakv": {"decode_every": 4}},
    "compact": {"streaming": {"positions": "compact", "budget": 20, "decode_every": 3}},
    "kivi": KIVI8,
    "adakv, kivi": {"adakv": {"decode_every": 8}, **KIVI8},
}
every = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)


def generated(model: Any, ids: Tensor, new: int = 40, **options: Any) -> Any:
    torch.manual_seed(0)
    fixed = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0, "return_dict_in_generate": True}
    mask = options.pop("mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **fixed, **options)


def pools(cache: Any) -> list[Any]:
    """Whatever lies in pages: stores, or their codes."""
    stores = [layer.held for layer in cache.layers]
    return [x for store in stores for x in (store, getattr(store, "codes", None)) if hasattr(x, "pages")]


def pages(cache: Any) -> int:
    """Pages in use by this cache and all that share with it."""
    found = 0
    for store in pools(cache):
        with store.pages.pool.alone():
            found += store.pages.pool.used
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 4, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "beams returned", "samples"],
)
@every
def test_generates_what_the_unpaged_model_generates(stack: Options, options: dict[str, Any]) -> None:
    ids, mask = tiny_ids(2, PROMPT), torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :17] = 0
    if "streaming" in stack:
        mask[:] = 1
    expected = generated(compiled(stack), ids, mask=mask, **options)
    got = generated(compiled({**stack, **PAGED}), ids, mask=mask, **options)
    assert torch.equal(got.sequences, expected.sequences)
    paged, plain = got.past_key_values, expected.past_key_values
    assert kept_positions(paged) == kept_positions(plain)
    assert paged.nbytes() == plain.nbytes()
    assert all(store.pages.pool.page == PAGE for store in pools(paged))
    assert pools(paged) or "kivi" in stack, "nothing lies in pages"


def test_beams_share_the_prompt() -> None:
    prompt = 400
    options = {"num_beams": 4, "do_sample": False}
    cache = generated(compiled(PAGED), tiny_ids(1, prompt), 12, **options).past_key_values
    of_one = LAYERS * HEADS * (prompt // PAGE)
    assert cache.lengths()[0] == [prompt + 11] * 4 * HEADS
    assert pages(cache) <= 2 * of_one, "four copies of the prompt"


@every
def test_forks_go_their_own_ways(stack: Options) -> None:
    """Several continuations of one prompt, by turns, are what each would be alone."""
    model, ids = compiled({**stack, **PAGED}), tiny_ids(1, PROMPT)
    turns = [tiny_ids(1, 30, seed) for seed in (1, 2, 3)]

    def start() -> Any:
        cache = model.new_cache()
        model(ids, past_key_values=cache)
        return cache

    def follow(cache: Any, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model(tokens, past_key_values=cache).logits

    with torch.no_grad():
        first = start()
        forks = [first, first.fork(), first.fork()]
        alone = [start() for _ in turns]
        for chunk in (slice(0, 1), slice(1, 2), slice(2, 13), *(slice(t, t + 1) for t in range(13, 30))):
            for fork, single, tokens in zip(forks, alone, turns, strict=True):
                assert torch.equal(follow(fork, tokens[:, chunk]), follow(single, tokens[:, chunk]))
    for fork, single in zip(forks, alone, strict=True):
        assert (fork.seen, fork.tick, fork.lengths()) == (single.seen, single.tick, single.lengths())
        assert fork.plan is model.kvcompile.plan
        for one, other in zip(fork.layers, single.layers, strict=True):
            for row, same in zip(one.held.rows(), other.held.rows(), strict=True):
                assert all(torch.equal(x, y) for x, y in zip(row, same, strict=True))


@pytest.mark.parametrize("stack", [{}, KIVI8], ids=["plain", "kivi"])
def test_forks_of_a_long_prompt_cost_a_few_pages(stack: Options) -> None:
    model, ids = compiled({**stack, **PAGED}), tiny_ids(1, 500)
    with torch.no_grad():
        cache = model(ids).past_key_values
        before, size = pages(cache), cache.allocated()
        forks = [cache.fork() for _ in range(8)]
        for i, fork in enumerate(forks):
            model(tiny_ids(1, 1, i), past_key_values=fork)
    assert all(fork.seen == [501] for fork in forks)
    assert cache.seen == [500]
    assert pages(cache) - before <= 8 * LAYERS * HEADS * 2, "more than the open page and the next one, for each row"
    assert cache.allocated() < 1.7 * size
    del fork, forks
    assert pages(cache) <= before


def test_a_session_forks_a_prompt_for_generate() -> None:
    model, ids = compiled({"adakv": {}, **PAGED}), tiny_ids(1, PROMPT)
    cache = model.new_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    questions = [torch.cat((ids, tiny_ids(1, 5, seed)), 1) for seed in (1, 2)]
    answers = [generated(model, q, 20, do_sample=False, past_key_values=cache.fork()).sequences for q in questions]
    again = [generated(model, q, 20, do_sample=False, past_key_values=cache.fork()).sequences for q in questions]
    assert all(torch.equal(x, y) for x, y in zip(answers, again, strict=True))
    assert not torch.equal(answers[0][:, PROMPT + 5 :], answers[1][:, PROMPT + 5 :])
    assert cache.seen == [PROMPT]


def test_sequences_of_a_batch_share_a_common_beginning() -> None:
    """Prefill it once, repeat it, go on with padded rests: full pages are there once."""
    model, ids = compiled(PAGED), tiny_ids(1, 10 * PAGE)
    rests, mask = tiny_ids(3, 9, 1), torch.ones(3, 10 * PAGE + 9, dtype=torch.long)
    mask[1, 10 * PAGE : 10 * PAGE + 4] = 0
    with torch.no_grad():
        cache = model(ids).past_key_values
        cache.batch_repeat_interleave(3)
        at = (mask.cumsum(1) - 1)[:, -9:]
        batch = model(rests, attention_mask=mask, position_ids=at, past_key_values=cache).logits
        for b, pads in enumerate((0, 4, 0)):
            alone = model(torch.cat((ids, rests[b : b + 1, pads:]), 1)).logits[:, -(9 - pads) :]
            torch.testing.assert_close(batch[b : b + 1, pads:], alone, atol=1e-4, rtol=1e-4)
    assert pages(cache) == LAYERS * HEADS * (10 + 3)


def test_without_pages_a_fork_is_a_copy() -> None:
    model, ids = compiled({"adakv": {}}), tiny_ids(2, PROMPT)
    with torch.no_grad():
        cache = model(ids).past_key_values
        fork = cache.fork()
        model(tiny_ids(2, 3, 1), past_key_values=fork)
    assert (cache.seen, fork.seen) == ([PROMPT] * 2, [PROMPT + 3] * 2)
    assert fork.plan is cache.plan
    assert fork.kernels.specs is cache.kernels.specs


def test_sliding_layers_lie_in_pages_too_and_hand_them_back() -> None:
    cache = generated(compiled(PAGED, "gemma2"), tiny_ids(1, PROMPT), 200, do_sample=False).past_key_values
    for p, layer in zip(cache.plan.layers, cache.layers, strict=True):
        store = layer.held
        assert store.pages.pool.used <= HEADS * (max(store.lengths) // PAGE + 2)
        assert max(store.lengths) < 100 if p.sliding_window else max(store.lengths) == PROMPT + 199


def test_a_page_holds_whole_groups() -> None:
    assert {p.storage.page for p in plan_of({"kivi": {}, **PAGED}).layers} == {32}
    assert {p.storage.page for p in plan_of({**KIVI8, **PAGED}).layers} == {16}
    with pytest.raises(KvcompileError, match="pages of 16, groups of 32"):
        plan_of({**PAGED, "kivi": {}})
    with pytest.raises(KvcompileError, match="page must be 1 to 4,096 tokens"):
        plan_of({"paged": {"page": 0}})


def test_the_plan_and_its_kernels_say_so() -> None:
    model = compiled({"adakv": {}, **PAGED})
    assert [s.name for s in model.new_cache().kernels.expected(0)] == ["paged16-float32-g2-d16"] * 2
    quantized = compiled({"adakv": {}, **KIVI8, **PAGED}).new_cache().kernels.expected(0)
    assert [s.name for s in quantized] == [
        f"paged16-int8c4_int8t4+{residual}-float32-g2-d16" for residual in ("dense", "ragged")
    ]
    plan = plan_of({"paged": {"skip_layers": [1]}})
    assert [p.storage.page for p in plan.layers] == [16, 0, 16, 16]
