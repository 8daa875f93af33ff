"""The places of a block: written again by each, never seen before that."""

from __future__ import annotations

import torch

from kvcompile.stores.local import LocalStore


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def at(places: list[list[int]]) -> torch.Tensor:
    return torch.tensor(places, dtype=torch.int64, device="cpu")


def test_a_query_sees_the_places_up_to_its_own() -> None:
    keys, values, queries = states(1, 2, 3, 8), states(1, 2, 3, 8, seed=1), states(1, 4, 3, 8, seed=2)
    store = LocalStore.empty(keys, values, 6)
    store.append(states(1, 2, 6, 8, seed=3) * 100, states(1, 2, 6, 8, seed=4), at([[*range(6)]]), 0)
    store.append(keys, values, at([[0, 1, 2]]), 0)  # the next block
    out = store.attend(queries, at([[0, 1, 2]]), 0.5)
    repeated = [x.repeat_interleave(2, 1) for x in (keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(queries, *repeated, is_causal=True, scale=0.5)
    torch.testing.assert_close(out, expected)
    assert store.lengths == [3, 3]
    assert store.nbytes() == 2 * 3 * 2 * 8 * 8


def test_rows_at_different_places_do_not_disturb_each_other() -> None:
    """Row 0 goes on at place 4; row 1 begins anew with three; row 2 gets nothing."""
    store = LocalStore.empty(states(3, 1, 4, 8), states(3, 1, 4, 8), 6)
    old = states(3, 1, 4, 8, seed=1)
    store.append(old, old, at([[0, 1, 2, 3]] * 3), 0)
    new = states(3, 1, 3, 8, seed=2)
    valid = torch.tensor([[True, False, False], [True] * 3, [False] * 3], dtype=torch.bool, device="cpu")
    store.append(new, new, at([[4, 5, 6], [0, 1, 2], [5, 6, 7]]), 0, valid)
    assert store.lengths == [5, 3, 4]
    assert torch.equal(store.rows()[0][0], torch.cat((old[0, 0], new[0, 0, :1])))
    assert torch.equal(store.rows()[1][0], new[1, 0])
    assert torch.equal(store.rows()[2][0], old[2, 0])
    store.select(at([[1, 1, 0]])[0])
    assert (store.lengths, store.batch) == ([3, 3, 5], 3)
