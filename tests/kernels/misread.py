"""Views, queries and sums of which one tensor is not what a kernel reads: another dtype, shape, order or device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.layout import DenseView, PagedView, Queries, RaggedView

HELD, DIM = 8, 16


def at(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


DENSE = DenseView(torch.ones(1, 2, HELD, DIM), torch.ones(1, 2, HELD, DIM), at(1, 1, HELD, dtype=torch.int32))
FLAT = torch.ones(2 * HELD, DIM)
RAGGED = RaggedView(
    FLAT,
    FLAT,
    at(2 * HELD, dtype=torch.int32),
    [0, HELD],
    [HELD, HELD],
    1,
    2,
    torch.tensor([0, HELD]),
    torch.tensor([HELD, 2 * HELD]),
)
TABLE = torch.arange(4, dtype=torch.int32).view(2, 2)
PAGED = PagedView(FLAT, FLAT, at(2 * HELD, dtype=torch.int32), TABLE, [HELD, HELD], 1, 2, 4, at(2) + HELD)
ASKED = Queries(torch.ones(1, 4, 1, DIM), at(1, 1) + HELD, sinks=torch.zeros(4))
SUMS = torch.zeros(2, HELD)

# what is asked, what is held, what sums are added to; each with one tensor that is not what the kernel reads
WRONG: dict[str, tuple[Any, Any, Any]] = {
    "sums of half width": (ASKED, RAGGED, SUMS.bfloat16()),
    "sums of twice the width": (ASKED, DENSE, SUMS.double()),
    "sums for fewer entries": (ASKED, DENSE, SUMS[:, 1:]),
    "sums of fewer rows": (ASKED, PAGED, SUMS[1:]),
    "sums column by column": (ASKED, DENSE, torch.zeros(HELD, 2).T),
    "queries of another size": (replace(ASKED, states=torch.ones(1, 4, 1, DIM // 2)), DENSE, SUMS),
    "sinks of half width": (replace(ASKED, sinks=torch.zeros(4).half()), DENSE, SUMS),
    "a sink for each KV head": (replace(ASKED, sinks=torch.zeros(2)), RAGGED, SUMS),
    "keys of half width": (ASKED, replace(DENSE, keys=DENSE.keys.half()), SUMS),
    "fewer values": (ASKED, replace(DENSE, values=DENSE.values[:, :, 1:]), SUMS),
    "values column by column": (ASKED, replace(RAGGED, values=torch.ones(DIM, 2 * HELD).T), SUMS),
    "borders of half width": (ASKED, replace(RAGGED, begins=RAGGED.begins.int()), SUMS),
    "fewer borders": (ASKED, replace(RAGGED, ends=RAGGED.ends[1:]), SUMS),
    "a table of twice the width": (ASKED, replace(PAGED, table=TABLE.long()), SUMS),
    "a table of fewer rows": (ASKED, replace(PAGED, table=TABLE[1:]), SUMS),
    "another device": (ASKED, replace(DENSE, keys=DENSE.keys.to("meta")), SUMS),
}
