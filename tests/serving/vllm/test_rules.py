"""How many tokens of a prompt stay in vLLM: whole blocks freed, at least the plan's budget, by the length alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config

from kvcompile.adapters.architectures import describe
from kvcompile.serving.vllm.rules import PromptRule, chunk, last_chunk, rules
from kvcompile.stack import apply_stack, build_stack

TOKENS, BLOCKS = st.integers(1, 5000), st.sampled_from([16, 32, 128])


def planned(*names: str, layers: int = 6, classes: int = 3, **options: object) -> tuple[PromptRule | None, ...]:
    stack = build_stack(list(names), {names[-1]: options})
    return rules(apply_stack(describe(tiny_config("llama", num_hidden_layers=layers)), stack), classes)


@pytest.mark.parametrize("budget", [0.1, 0.25, 1.0, 200])
@given(tokens=TOKENS, block=BLOCKS)
def test_what_is_freed_are_whole_blocks_and_the_budget_stays(budget: float, tokens: int, block: int) -> None:
    (rule, *_) = planned("snapkv", budget=budget)
    assert rule is not None
    kept, gap = rule.kept(tokens, block), rule.gap(tokens, block)
    assert kept == tokens - gap * block  # so a token behind the prompt has its stock slot
    assert min(tokens, rule.target(tokens)) <= kept < rule.target(tokens) + block or kept == tokens


@given(tokens=TOKENS, block=BLOCKS)
def test_a_budget_of_all_frees_nothing_and_shares_every_block(tokens: int, block: int) -> None:
    (rule, *_) = planned("keydiff", budget=1.0)
    assert rule is not None
    assert rule.gap(tokens, block) == 0
    assert rule.reach(tokens, block) == tokens


@given(tokens=TOKENS, block=BLOCKS)
def test_blocks_that_will_be_overwritten_are_not_shared(tokens: int, block: int) -> None:
    (rule, *_) = planned("keydiff", budget=0.25)
    assert rule is not None
    first_written = tokens - rule.kept(tokens, block)
    assert rule.reach(tokens, block) == (first_written or tokens)


def test_layers_alike_are_one_class_and_those_left_whole_have_no_rule() -> None:
    every = planned("snapkv", skip_layers=[0, 5])
    assert every[0] is None
    assert every[5] is None
    assert len(set(every[1:5])) == 1


@given(tokens=TOKENS)
def test_classes_of_a_pyramid_fall_with_depth_and_share_the_budget(tokens: int) -> None:
    every = planned("pyramidkv", budget=0.25, layers=6, classes=3)
    targets = [rule.target(tokens) for rule in every if rule is not None]
    assert len(set(every)) == 3
    assert targets == sorted(targets, reverse=True)
    mean = every[0].selection.resolve(tokens)[0]  # type: ignore[union-attr]
    assert 0 <= sum(targets) - 6 * min(mean, tokens) < 6  # each class rounds up


@given(
    prompt=st.integers(1, 900),
    answer=st.integers(0, 200),
    last=st.integers(2, 40),
    budget=st.integers(40, 300),
    seed=st.integers(0, 99),
)
def test_chunks_end_at_the_prompt_and_leave_the_last_long_enough(
    prompt: int, answer: int, last: int, budget: int, seed: int
) -> None:
    """A prompt and the answer that a preempted request reads again, in steps with less room at random."""
    draw, start, ends = random.Random(seed), 0, []
    while start < prompt + answer:
        room = draw.choice([budget, draw.randint(1, budget)])
        read = chunk(start, min(room, prompt + answer - start), prompt, last)
        assert read <= room
        assert read or room < budget  # with all of its room a step never waits
        start += read
        ends += [(start - read, start)] if read else []
    begin, end = next((begin, end) for begin, end in ends if end >= prompt)
    assert end == prompt
    assert end - begin >= min(last, prompt)


def test_the_last_chunk_holds_the_queries_that_any_score_needs() -> None:
    assert last_chunk(planned("snapkv", window=24)) == 24
    assert last_chunk(planned("knorm")) == 2  # never one token, which a decode graph would swallow
    assert last_chunk((None, None)) == 1
