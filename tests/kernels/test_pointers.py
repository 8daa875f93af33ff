"""No kernel gets an address of memory that is not what it reads: another dtype, shape, order or device is an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from misread import DIM, FLAT, HELD, TABLE, WRONG, at

from kvcompile.errors import KvcompileError
from kvcompile.kernels.compact import Arrays
from kvcompile.kernels.cpp import build, encode
from kvcompile.kernels.dispatch import CPP
from kvcompile.kernels.layout import Queries
from kvcompile.kernels.pointers import address
from kvcompile.kernels.spec import KernelSpec, plain
from kvcompile.plan.storage import Codec

pytestmark = pytest.mark.skipif(bool(build.available()), reason="no compiler")


@pytest.mark.parametrize("many", [False, True], ids=["one token", "several"])
@pytest.mark.parametrize("name", WRONG)
def test_attention_refuses_what_it_would_misread(name: str, many: bool) -> None:
    asked, view, sums = WRONG[name]
    if many:
        asked = Queries(asked.states.expand(-1, -1, 2, -1), asked.positions.expand(-1, 2), sinks=asked.sinks)
    layout = type(view).__name__.removesuffix("View").lower()
    part = replace(plain(layout, "float32")[0], page=4 if layout == "paged" else 0)
    spec = KernelSpec((part,), 2, DIM, DIM, 0.25, scores=True, sink=True)
    with pytest.raises(KvcompileError, match="a kernel reads"):
        CPP.attend(asked, view, spec, sums)
    if many and name not in ("fewer values", "values column by column"):  # which no sum reads
        with pytest.raises(KvcompileError, match="a kernel reads"):
            CPP.column_sums(asked, view, spec, sums)


def test_compaction_refuses_what_it_would_misread() -> None:
    source, target, kept = Arrays((FLAT,), starts=torch.tensor([0, HELD])), Arrays((FLAT.view(1, 2, HELD, DIM),)), at(4)
    for wrong in (
        (replace(source, starts=at(2, dtype=torch.int32)), target, kept),
        (replace(source, starts=at(1)), target, kept),
        (Arrays((FLAT,), table=TABLE.long(), page=4), target, kept),
        (source, target, kept.int()),
        (source, target, kept[1:]),
        (source, Arrays((target.tensors[0].to("meta"),)), kept),
    ):
        with pytest.raises(KvcompileError, match="a kernel reads"):
            CPP.compact(*wrong, [2, 2])


def test_encoding_refuses_a_part_of_a_group() -> None:
    with pytest.raises(KvcompileError, match="whole groups"):
        encode.encode(torch.ones(1, 5, 32), Codec("int8", "channel", 4))


def test_of_a_dimension_of_one_any_stride_will_do() -> None:
    x = torch.ones(4, 1, DIM).as_strided((4, 1, DIM), (DIM, 3, 1))
    assert address("x", x, torch.float32, (4, 1, DIM), (DIM, DIM, 1)) == x.data_ptr()
