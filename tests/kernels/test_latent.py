"""Rows whose values are the end of their keys (MLA): every backend reads them as if values lay apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvcompile.kernels import reference, sdpa
from kvcompile.kernels.cpp import backend as cpp
from kvcompile.kernels.cpp import build
from kvcompile.kernels.layout import DenseView, PagedView, Queries, RaggedView
from kvcompile.kernels.spec import KernelSpec, Part, plain
from kvcompile.plan.storage import Codec

WIDE, VALUE, GROUP, ROWS, HELD = 40, 24, 9, 2, 90  # rows of 16 + 24 numbers, one for nine heads, in two sequences


def spec(layout: str, dtype: str, **options) -> KernelSpec:
    parts = (Part("paged", Codec(dtype), Codec(dtype), 7),) if layout == "paged" else plain(layout, dtype)
    return KernelSpec(parts, GROUP, WIDE, VALUE, 0.2, latent=True, **options)


def view(layout: str, dtype: torch.dtype, lengths: list[int]) -> DenseView | RaggedView | PagedView:
    """Rows of these lengths; their values are a view of their keys, and NaN lies between them."""
    draw = torch.Generator().manual_seed(5)
    room = HELD + 5
    keys = torch.full((ROWS, 1, room, WIDE), float("nan"), dtype=dtype)
    for b, n in enumerate(lengths):
        keys[b, :, :n] = torch.randn(n, WIDE, generator=draw).to(dtype)
    at = torch.arange(room).expand(ROWS, 1, room).int()
    if layout == "dense":
        held = keys[:, :, :HELD]
        return DenseView(held, held[..., WIDE - VALUE :], at[:, :, :HELD])
    flat, starts, counts = keys.flatten(0, 2), [0, room], torch.tensor(lengths)
    if layout == "ragged":
        begins = torch.tensor(starts)
        values = flat[:, WIDE - VALUE :]
        return RaggedView(flat, values, at.flatten(), starts, lengths, ROWS, 1, begins, begins + counts)
    pages = -(-room // 7)
    padded = torch.nn.functional.pad(keys[:, 0], (0, 0, 0, pages * 7 - room)).flatten(0, 1)
    positions = torch.nn.functional.pad(at[:, 0], (0, pages * 7 - room)).flatten()
    table = torch.arange(ROWS * pages, dtype=torch.int32).view(ROWS, pages)
    return PagedView(padded, padded[:, WIDE - VALUE :], positions, table, lengths, ROWS, 1, 7, counts)


def queries(lengths: list[int], count: int, dtype: torch.dtype) -> Queries:
    draw = torch.Generator().manual_seed(6)
    states = torch.randn(ROWS, GROUP, count, WIDE, generator=draw).to(dtype)
    return Queries(states, torch.tensor(lengths).unsqueeze(1) - count + torch.arange(count))


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("layout", ["dense", "ragged", "paged"])
def test_values_inside_keys_are_read_in_place(layout: str, count: int, window: int | None) -> None:
    lengths = [HELD, HELD] if layout == "dense" else [HELD, 31]
    held, asked = view(layout, torch.float32, lengths), queries(lengths, count, torch.float32)
    mine = spec(layout, "float32", sliding_window=window)
    assert mine.name.endswith("-latent")
    apart = replace(held, values=held.values.contiguous())
    expected = reference.attend(asked, apart, replace(mine, latent=False))
    assert expected.shape == (ROWS, GROUP, count, VALUE)
    assert torch.equal(reference.attend(asked, held, mine), expected)
    torch.testing.assert_close(sdpa.attend(asked, held, mine), expected, atol=2e-6, rtol=2e-6)
    if build.available() is None and (window is None) == (layout != "paged"):  # every layout compiles once
        assert cpp.supports(mine, torch.float32)
        torch.testing.assert_close(cpp.attend(asked, held, mine), expected, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_whole_prompt_of_rows(softcap: float | None) -> None:
    held = view("dense", torch.float32, [HELD, HELD])
    asked, mine = queries([HELD, HELD], HELD, torch.float32), spec("dense", "float32", softcap=softcap)
    expected = reference.attend(asked, held, mine)
    torch.testing.assert_close(sdpa.attend(asked, held, mine), expected, atol=2e-6, rtol=2e-6)
    if build.available() is None and softcap is None:
        torch.testing.assert_close(cpp.attend(asked, held, mine), expected, atol=3e-6, rtol=3e-6)


@pytest.mark.skipif(build.available() is not None, reason="no C++ compiler here")
def test_half_precision_rows() -> None:
    held, asked = view("ragged", torch.bfloat16, [HELD, 31]), queries([HELD, 31], 1, torch.bfloat16)
    mine = spec("ragged", "bfloat16")
    expected = reference.attend(asked, held, mine)
    torch.testing.assert_close(cpp.attend(asked, held, mine), expected, atol=1e-2, rtol=1e-2)
