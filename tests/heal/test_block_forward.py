"""All blocks at once give what the definition gives token by token, and gradients reach every weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from blocks_reference import block_vector, logits_of, next_logits, run
from tiny import ARCHITECTURES, tiny_ids, tiny_model

from kvcompile.adapters.architectures import describe
from kvcompile.build import build
from kvcompile.heal.blocks.forward import BlockForward
from kvcompile.heal.blocks.student import block_student
from kvcompile.models.sharing import shared
from kvcompile.plan.blocks import Blocks
from kvcompile.structure.blocks import add_blocks

BLOCKS = Blocks(length=4, split=2)
KINDS = (BLOCKS, Blocks(3, 1, "mean", 1), Blocks(4, 3, "lookup"), Blocks(1, 2))
LLAMA_LIKE = ("llama", "qwen2", "qwen3", "olmo2")  # those whose layers the oracle can call


def pair(blocks: Blocks, name: str = "llama", dtype: str = "float64") -> tuple[Any, BlockForward]:
    """The plain model with random block modules, and the vectorised forward over the same weights."""
    model = tiny_model(name).to(getattr(torch, dtype))
    add_blocks(model, blocks)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "block_" in key:
                p.add_(0.1 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    return model, BlockForward(build(shared(model), describe(model.config, dtype), "sdpa"), blocks)


@pytest.mark.parametrize("blocks", KINDS)
@torch.no_grad()
def test_prompts_of_any_length_are_as_by_the_definition(blocks: Blocks) -> None:
    model, forward = pair(blocks)
    for count in range(1, 14):
        ids = tiny_ids(2, count, seed=count)
        logits, _ = forward(ids)
        for row in range(2):
            torch.testing.assert_close(logits[row], logits_of(model, blocks, ids[row]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LLAMA_LIKE)
@torch.no_grad()
def test_families_are_as_by_the_definition(name: str) -> None:
    model, forward = pair(BLOCKS, name)
    ids = tiny_ids(1, 11)
    torch.testing.assert_close(forward(ids)[0][0], logits_of(model, BLOCKS, ids[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_can_be_trained(name: str) -> None:
    model, forward = pair(BLOCKS, name, "float32")
    logits, states = forward(tiny_ids(2, 12), torch.tensor([0, 3], dtype=torch.int64, device="cpu"))
    logits.square().mean().backward()
    assert len(states) == 2
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]


@pytest.mark.parametrize("blocks", KINDS)
@torch.no_grad()
def test_padding_makes_the_first_block_shorter(blocks: Blocks) -> None:
    """By hand: its tokens follow the start; with zeros before them and their own mean it conditions the second."""
    model, forward = pair(blocks)
    base, length = model.model, blocks.length
    for pads in range(length):
        ids = tiny_ids(1, 9, seed=pads)[0]
        logits, _ = forward(torch.stack((ids, ids)), torch.tensor([pads, 0], dtype=torch.int64, device="cpu"))
        torch.testing.assert_close(logits[1], logits_of(model, blocks, ids), rtol=1e-9, atol=1e-9)
        short = length - pads
        for k in range(short - 1):
            torch.testing.assert_close(logits[0, k], next_logits(model, blocks, ids[: k + 1]), rtol=1e-9, atol=1e-9)
        if blocks.embedder == "lookup":
            rows = base.block_embedder(ids[:short]).flatten()
            first = torch.cat((rows.new_zeros(64 - len(rows)), rows))
        else:
            tokens = base.embed_tokens(ids[:short])
            filled = torch.cat((tokens.new_zeros(pads, 64), tokens * length / short))
            first = base.block_embedder(filled.flatten())
        for k in range(short - 1, 9):
            rest = ids[short : k + 1]
            complete = len(rest) // length
            vectors = [first, *(block_vector(model, blocks, rest[i * length :][:length]) for i in range(complete))]
            output = run(model, range(blocks.split), torch.stack(vectors))[-1]
            inputs = [*base.block_expansion(output).view(blocks.prefix, -1), base.block_bos]
            inputs += base.embed_tokens(rest[complete * length :])
            states = run(model, range(blocks.split, 4), torch.stack(inputs))
            expected = model.lm_head(base.norm(states[-1]))
            torch.testing.assert_close(logits[0, k], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_states_are_those_of_the_tokens_that_are_predicted_from() -> None:
    """With one token more the rows before stay, and the last upper layer's input is the one behind its logits."""
    _, forward = pair(BLOCKS)
    ids = tiny_ids(1, 10)
    _, fewer = forward(ids[:, :9])
    _, states = forward(ids)
    assert [s.shape for s in states] == [(1, 10, 64)] * 2
    for a, b in zip(fewer, states, strict=True):
        torch.testing.assert_close(a, b[:, :9])


@torch.no_grad()
def test_a_student_that_agrees_with_the_original_has_nothing_to_learn() -> None:
    """Logits, and hidden states of the upper layers but the first, each beside the original's layer of that number."""
    model = tiny_model()
    add_blocks(model, BLOCKS)
    pupil = block_student(shared(model), replace(describe(model.config), blocks=BLOCKS), 1.0, 1.0)
    ids = tiny_ids(2, 11)
    logits, (_, last) = pupil.blockwise(ids)
    lower = [torch.randn_like(last) for _ in range(3)]
    assert pupil(ids, targets={"logits": logits, "states": (*lower, last)})["loss"] < 1e-9
    for targets in (
        {"logits": logits.flip(1), "states": (*lower, last)},
        {"logits": logits, "states": (*lower, -last)},
    ):
        assert pupil(ids, targets=targets)["loss"] > 0.1
    padding = torch.tensor([2, 0], dtype=torch.int64, device="cpu")
    assert pupil(ids, targets={"logits": logits, "states": (*lower, last)}, padding=padding)["loss"] > 1e-3
