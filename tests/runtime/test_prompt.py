"""Chunks cut every sequence after the same real tokens as alone, and results go back where the tokens were."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.runtime.prompt import Prompt, Sight, ends_of_runs


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    """Padding anywhere: before, behind and between the real tokens of each sequence."""
    batch, count = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    row = st.lists(st.integers(0, 1), min_size=count, max_size=count)
    return torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))


@given(masks(), st.integers(0, 9), st.integers(1, 12), st.data())
@settings(deadline=None)
def test_chunks_cut_a_padded_sequence_as_they_cut_it_alone(
    mask: torch.Tensor, past: int, length: int, data: st.DataObject
) -> None:
    batch, count = mask.shape
    ids = torch.arange(batch * count).view(batch, count)
    whole = torch.cat((torch.zeros(batch, past, dtype=torch.long), mask), 1)
    prompt = Prompt(ids, torch.arange(count).unsqueeze(0), whole).aligned()
    columns = data.draw(st.lists(st.integers(0, count - 1)))
    holding = prompt.columns_holding(columns)
    assert prompt.mask is not None
    real, read = prompt.mask[:, past:] != 0, []
    for turn, chunk in enumerate(prompt.chunks(length)):
        at = slice(chunk.first, chunk.stop)
        for b in range(batch):
            tokens = ids[b][mask[b] != 0].tolist()
            assert prompt.ids[b, at][real[b, at]].tolist() == tokens[turn * length : (turn + 1) * length]
            assert chunk.coming[b] == len(tokens[(turn + 1) * length :])
        assert chunk.last == (chunk.stop == count)
        here = [i - chunk.first for i in holding if i in range(chunk.first, chunk.stop)]
        read.append(prompt.ids[:, at][:, here].unsqueeze(-1))
    found = prompt.restored(torch.cat(read, 1), holding, columns)
    assert torch.equal(found.squeeze(-1), ids[:, columns])


def test_a_prompt_without_padding_stays_as_it_is() -> None:
    ids = torch.arange(12).view(2, 6)
    prompt = Prompt(ids, torch.arange(6).unsqueeze(0), torch.ones(2, 8, dtype=torch.long))
    assert prompt.aligned() is prompt
    assert [(c.first, c.stop, c.last, c.coming) for c in prompt.chunks(4)] == [
        (0, 4, False, [2, 2]),
        (4, 6, True, [0, 0]),
    ]
    results = torch.randn(2, 3, 5)
    assert prompt.restored(results, [1, 3, 4], [1, 3, 4]) is results
    assert torch.equal(prompt.restored(results, [1, 3, 4], [4, 1, 1]), results[:, [2, 0, 0]])


@given(masks())
@settings(deadline=None)
def test_the_end_of_a_run_is_its_last_marked_column(marked: torch.Tensor) -> None:
    def end(row: list[int], at: int) -> int:
        while row[at] and at + 1 < len(row) and row[at + 1]:
            at += 1
        return at

    expected = [[end(row, at) for at in range(len(row))] for row in marked.tolist()]
    assert ends_of_runs(marked.bool()).tolist() == expected


def test_a_sight_is_in_positions_of_the_newest_tokens() -> None:
    sight = Sight(ends_of_runs(torch.tensor([[0, 1, 1, 0, 1, 1, 0]]).bool()))
    positions = torch.tensor([[13, 14, 15, 16]])  # of the last four columns
    assert sight.until(positions).tolist() == [[13, 15, 15, 16]]
