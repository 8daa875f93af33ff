"""`store.view(chosen)` shows some entries of a row where they lie: attention over them is attention over a copy."""

from __future__ import annotations

import pytest
import torch
from choosing import BATCH, DIM, HEADS, STORES, choice, filled, gathered, within

from kvcompile.errors import KvcompileError
from kvcompile.kernels.cpp import build

stores = pytest.mark.parametrize("name", STORES)
backends = pytest.mark.parametrize(
    "backend",
    [
        "reference",
        "sdpa",
        pytest.param("cpp", marks=pytest.mark.skipif(build.available() is not None, reason="no C++ compiler here")),
    ],
)


@stores
@backends
@pytest.mark.parametrize("new", [1, 3])
def test_attention_to_a_part_is_attention_to_a_copy_of_it(name: str, backend: str, new: int) -> None:
    layer, step, queries = filled(name, backend, new)
    chosen = choice(layer, new)
    before = [x.clone() for row in layer.held.rows() for x in row]
    found = layer.attend(queries, step, 0, chosen)
    torch.testing.assert_close(found, gathered(layer, step, queries, chosen), atol=within(name), rtol=0)
    whole = [torch.arange(n) for n in layer.held.lengths]
    everything = gathered(layer, step, queries, whole)
    torch.testing.assert_close(layer.attend(queries, step, 0), everything, atol=within(name), rtol=0)
    assert not torch.allclose(found, everything, atol=1e-2)
    after = [x for row in layer.held.rows() for x in row]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@stores
def test_chosen_entries_are_not_copied(name: str) -> None:
    layer, _, _ = filled(name, "sdpa", 1)
    view = layer.held.view(choice(layer, 1))
    kept = {x.untyped_storage().data_ptr() for x in layer.held.tensors()}
    for part in getattr(view, "parts", (view,)):
        tensors = (part.keys, part.values, part.positions, part.key_scales, part.value_scales)
        assert {x.untyped_storage().data_ptr() for x in tensors if x is not None} <= kept


def test_a_table_chooses_as_many_of_every_row() -> None:
    layer, step, queries = filled("ragged", "sdpa", 1)
    table = torch.stack([torch.tensor([1, 5, n - 1]) for n in layer.held.lengths])
    found = layer.attend(queries, step, 0, table)
    torch.testing.assert_close(found, layer.attend(queries, step, 0, list(table)))
    torch.testing.assert_close(found, gathered(layer, step, queries, list(table)), atol=within("ragged"), rtol=0)


def test_a_dense_store_goes_on_after_a_choice() -> None:
    layer, step, queries = filled("dense", "sdpa", 1)
    layer.attend(queries, step, 0, choice(layer, 1))
    layer.append(*torch.randn(2, BATCH, HEADS, 30, DIM), torch.arange(51, 81).expand(BATCH, -1), None, 0)
    assert [row[2].tolist() for row in layer.held.rows()] == [list(range(81))] * (BATCH * HEADS)
    layer.keep([torch.arange(0, 80, 2)] * (BATCH * HEADS), 0)
    assert layer.held.rows()[-1][2].tolist() == list(range(0, 80, 2))


@pytest.mark.parametrize("name", ["channel", "channel paged"])
@pytest.mark.parametrize("wrong", [slice(0, 7), slice(4, 12), slice(0, 12)])
def test_tokens_that_share_scales_are_chosen_together(name: str, wrong: slice) -> None:
    layer, step, queries = filled(name, "sdpa", 1)
    chosen = choice(layer, 1)
    chosen[0] = torch.arange(100)[wrong]
    with pytest.raises(KvcompileError, match="only whole blocks of 8 can be chosen"):
        layer.attend(queries, step, 0, chosen)
