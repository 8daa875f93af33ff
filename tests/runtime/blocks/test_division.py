"""Where tokens stand in blocks: by counting, token by token."""

from __future__ import annotations

import torch

from kvcompile.plan.blocks import Blocks
from kvcompile.runtime.blocks.division import Division

BLOCKS = Blocks(length=4, split=1)


def test_tokens_of_blocks_come_from_what_waits_and_what_is_new() -> None:
    """Sequence 0 had 6 tokens (2 wait) and gets 7; sequence 1 had none and gets 5 behind two columns of padding."""
    valid = torch.tensor([[1] * 7, [0] * 2 + [1] * 5], dtype=torch.bool, device="cpu")
    division = Division(BLOCKS, [13, 5], 7, valid)
    assert division.completed.tolist() == [2, 1]
    read, real = division.blocks_read(), division.blocks_valid()
    new = 2 * 3  # rows of what waits come first, three a sequence
    assert read[0].tolist() == [[0, 1, new, new + 1], [new + 2, new + 3, new + 4, new + 5]]
    assert read[1, 0].tolist() == [new + 7 + column for column in (2, 3, 4, 5)]
    assert real is not None
    assert real.tolist() == [[True, True], [True, False]]
    waiting = division.waiting()
    assert (waiting[0, 0], waiting[1, 0]) == (new + 6, new + 7 + 6)


def test_a_token_inside_a_block_is_one_place_of_one_block() -> None:
    windows = Division(BLOCKS, [6, 11], 1, None).windows(torch.tensor([0], dtype=torch.int64, device="cpu"))
    assert windows.rows.tolist() == windows.current.tolist() == [0, 1]
    assert windows.places.tolist() == [[2 + 2], [2 + 3]]
    assert windows.inputs.tolist() == [[1 + 0], [1 + 1]]
    assert (windows.valid, windows.contexts.tolist(), windows.outputs.tolist()) == (None, [], [[0], [1]])


def test_a_token_that_completes_a_block_opens_the_next() -> None:
    """Beside one that does not, whose row is padded."""
    windows = Division(BLOCKS, [8, 7], 1, None).windows(torch.tensor([0], dtype=torch.int64, device="cpu"))
    assert windows.places[0].tolist() == [0, 1, 2]
    assert windows.places[1, 0] == 2 + 3
    assert windows.valid is not None
    assert windows.valid.tolist() == [[True] * 3, [True, False, False]]
    assert windows.contexts.tolist() == [1]  # the output of the one block that was completed
    assert windows.inputs[0].tolist() == [1, 2, 0]  # two prefixes, the start
    assert windows.inputs[1, 0] == 1 + 2 + 1
    assert windows.outputs.tolist() == [[2], [3]]


def test_only_blocks_of_wanted_logits_and_the_current_one_are_read() -> None:
    """Of 14 tokens in four blocks; logits of token 4 stand in the second, behind its first token."""
    division = Division(BLOCKS, [14], 14, None)
    windows = division.windows(torch.tensor([4], dtype=torch.int64, device="cpu"))
    assert windows.rows.tolist() == [0, 0]
    assert windows.contexts.tolist() == [1, 3]
    assert windows.current.tolist() == [1]
    assert windows.outputs.tolist() == [[3]]
    none = division.windows(torch.tensor([], dtype=torch.int64, device="cpu"))
    assert (none.rows.tolist(), none.outputs.shape) == ([0], (1, 0))
    every = division.windows(torch.arange(14, dtype=torch.int64, device="cpu"))
    assert every.contexts.tolist() == [0, 1, 2, 3]
    assert every.outputs.tolist() == [[3, 4, 5, 8, 9, 10, 11, 14, 15, 16, 17, 20, 21, 22]]
