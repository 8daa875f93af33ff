"""Compaction in torch: the oracle of the generated kernels, against one entry at a time."""

from __future__ import annotations

import pytest
import torch
from moves import CASES, case, check

from kvcompile.errors import KvcompileError
from kvcompile.kernels import dispatch
from kvcompile.kernels.compact import Arrays, compact
from kvcompile.kernels.cpp import compact as cpp
from kvcompile.kernels.triton import backend as triton


@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(filter(None, x)))
def test_every_layout_and_format(name: str, way: tuple[str, str]) -> None:
    for seed in range(6):
        check(compact, case(name, way, seed))


def test_each_backend_has_its_own_and_no_other() -> None:
    movers = {backend.name: backend.compact for backend in dispatch.BUILT_IN}
    assert movers == {"cpp": cpp.compact, "triton": triton.compact, "sdpa": compact, "reference": compact}


def test_entries_of_another_size_are_refused() -> None:
    mine, other = (Arrays((torch.zeros(4, n),), starts=torch.zeros(1, dtype=torch.long)) for n in (8, 9))
    with pytest.raises(KvcompileError, match="keeps bytes as they are"):
        compact(mine, other, torch.arange(2), [2])


def test_arrays_with_gaps_are_refused() -> None:
    mine, other = (
        Arrays((x,), starts=torch.zeros(1, dtype=torch.long)) for x in (torch.zeros(4, 8), torch.zeros(8, 4).T)
    )
    for source, target in ((mine, other), (other, mine)):
        with pytest.raises(KvcompileError, match="contiguous"):
            compact(source, target, torch.arange(2), [2])


def test_gradients_pass() -> None:
    keys = torch.randn(1, 2, 5, 3, requires_grad=True)
    made = torch.zeros(1, 2, 2, 3)
    compact(Arrays((keys,)), Arrays((made,)), torch.tensor([1, 4, 0, 1]), [2, 2])
    made.sum().backward()
    assert keys.grad is not None
    assert keys.grad[0, :, :, 0].tolist() == [[0, 1, 0, 0, 1], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize("compactor", [compact, cpp.compact], ids=["torch", "cpp"])
def test_a_pool_without_pages_has_nothing_to_move(compactor) -> None:
    pool = Arrays((torch.zeros(0, 8),), table=torch.zeros(2, 1, dtype=torch.int32), page=16)
    compactor(pool, pool, torch.zeros(0, dtype=torch.long), [0, 0])
