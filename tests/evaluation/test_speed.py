"""Protects the speed measurement: what is counted, in which order, and against what."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_ids, tiny_model

from kvcompile.errors import KvcompileError
from kvcompile.evaluation.speed import WARM_UP, cache_bytes, compare, measure
from kvcompile.plan.blocks import Blocks


class Paced:
    """A model whose forward takes a known time and notes its turns."""

    device = torch.device("cpu")

    def __init__(self, name: str, seconds: float, held: int, turns: list[str]) -> None:
        self.name, self.seconds, self.held, self.turns = name, seconds, held, turns

    def forward(self, input_ids, past_key_values, use_cache):
        self.turns.append(f"{self.name}{input_ids.shape[1]}")
        time.sleep(self.seconds * input_ids.shape[1])
        cache = past_key_values or SimpleNamespace(nbytes=lambda: self.held)
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4), past_key_values=cache)

    __call__ = forward


def test_models_take_turns_and_ratios_are_against_the_first() -> None:
    turns: list[str] = []
    models = {"slow": Paced("s", 0.02, 400, turns), "fast": Paced("f", 0.004, 100, turns)}
    got = compare(models, tiny_ids(1, 3), new_tokens=2, rounds=2)
    warm = [f"{m}{n}" for m in "sf" for n in [3] + [1] * WARM_UP]
    slow, fast = ["s3", "s1", "s1"], ["f3", "f1", "f1"]
    assert turns == warm + slow + fast + fast + slow  # none always comes after the other
    assert got.cache_ratio == {"slow": 1.0, "fast": 4.0}
    assert got.decode_ratio["slow"] == got.prefill_ratio["slow"] == 1.0
    assert got.decode_ratio["fast"] > 1.5
    assert got.prefill_ratio["fast"] > 1.5
    speed = got.speeds["slow"]
    assert speed.step_s >= speed.step_min_s >= 0.02
    assert speed.prefill_s >= 0.06
    assert speed.decode_tokens_s == pytest.approx(1 / speed.step_s)


def test_a_step_of_a_block_transformer_is_the_mean_over_a_block() -> None:
    """One step in four runs the block decoder: the median step would not have it."""

    class Blockwise(Paced):
        kvcompile = SimpleNamespace(plan=SimpleNamespace(blocks=Blocks(4, 2)))

        def forward(self, input_ids, past_key_values, use_cache):
            if len(self.turns) % 4 == 0:
                time.sleep(0.02)
            return super().forward(input_ids, past_key_values, use_cache)

        __call__ = forward

    for new_tokens in (2, 4, 9):
        speed = measure(Blockwise("b", 0.0, 100, []), tiny_ids(1, 3), new_tokens)
        assert 0.005 <= speed.step_s < 0.019, new_tokens


def test_a_transformers_cache_is_counted_by_its_tensors() -> None:
    model, ids = tiny_model(), tiny_ids(2, 24)
    got = measure(model, ids, new_tokens=3)
    assert got.cache_bytes == 4 * 2 * (2 * 2 * 24 * 16) * 4  # layers, keys and values, [B, H_kv, T, D], fp32
    assert (got.batch, got.context, got.new_tokens) == (2, 24, 3)
    assert got.peak_bytes >= 0


class Grower(Paced):
    """A model that takes memory for a moment, as attention does."""

    def forward(self, input_ids, past_key_values, use_cache):
        found = super().forward(input_ids, past_key_values, use_cache)
        self.piece = [torch.ones(2**18) for _ in range(32)]  # of 1 MiB each
        return found

    __call__ = forward


def test_memory_that_was_freed_before_counts_when_it_is_used_again() -> None:
    model = Grower("g", 0.0, 1, [])
    for _ in range(2):
        model.piece = None
        assert measure(model, tiny_ids(1, 3), new_tokens=1).peak_bytes > 24 * 2**20


def test_a_cache_that_counts_itself_is_believed() -> None:
    assert cache_bytes(SimpleNamespace(nbytes=lambda: 7)) == 7


@pytest.mark.parametrize("wrong", [{"new_tokens": 0}, {"rounds": 0}, {"ids": torch.zeros(3)}, {"models": {}}])
def test_empty_measurements_are_refused(wrong: dict) -> None:
    with pytest.raises(KvcompileError, match="speed"):
        compare(**{"models": {"m": None}, "ids": tiny_ids(1, 3), "new_tokens": 1, "rounds": 1, **wrong})
