"""Memory of caches: what is asked for, exactly, in huge pages where the system has them."""

from __future__ import annotations

import copy
import gc
import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvcompile.stores import hugepages
from kvcompile.stores.dense import DenseStore

huge = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are asked for on Linux")
ROWS = hugepages.LEAST // (64 * 2) + 37  # not a whole number of pages


def flags(x: Tensor) -> list[str]:
    """What the kernel knows of the memory under a tensor's middle."""
    found, inside = x.data_ptr() + x.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= found < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("nothing is mapped there")


@huge
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.float32])
def test_large_tensors_lie_in_huge_pages_and_hold_no_byte_more(dtype: torch.dtype) -> None:
    """Aligned, advised, of the right type and exactly as large as asked for."""
    like = torch.zeros(3, dtype=dtype)
    x = hugepages.empty(like, ROWS, 128)
    assert (x.dtype, x.shape, x.is_contiguous()) == (dtype, (ROWS, 128), True)
    assert x.data_ptr() % hugepages.HUGE == 0
    assert x.untyped_storage().nbytes() == ROWS * 128 * dtype.itemsize
    if not Path("/proc/self/smaps").exists():
        pytest.skip("no /proc here")
    assert "hg" in flags(x)


@huge
def test_the_memory_lives_as_long_as_a_view_of_it_does() -> None:
    """No tensor reads what has been given back."""
    x = hugepages.empty(torch.zeros(1), ROWS, 64)
    x.copy_(torch.arange(x.numel(), dtype=torch.float32).view_as(x))
    last, expected = x[-1], float(x[-1, -1])
    twin = copy.deepcopy(x)
    del x
    gc.collect()
    other = hugepages.empty(torch.zeros(1), ROWS, 64).fill_(-1)
    assert float(last[-1]) == expected == float(twin[-1, -1]) != float(other[-1, -1])


def test_small_tensors_are_plain_ones() -> None:
    """Nothing is rounded up to a huge page for a few bytes."""
    x = hugepages.empty(torch.zeros(1, dtype=torch.bfloat16), 4, 3, 5)
    assert (x.dtype, x.shape) == (torch.bfloat16, (4, 3, 5))
    assert hugepages.empty(torch.zeros(1), 0, 64).shape == (0, 64)


@huge
def test_a_system_without_huge_pages_gives_plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels built without them refuse the advice."""

    class Refusing(mmap.mmap):
        def madvise(self, *args: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert hugepages.empty(torch.zeros(1), ROWS, 64).fill_(1).sum() == ROWS * 64


def test_tensors_without_memory_stay_without() -> None:
    """Tracing and meta devices ask for shapes only."""
    x = hugepages.empty(torch.zeros(1, device="meta"), ROWS, 64)
    assert x.is_meta
    with torch._subclasses.fake_tensor.FakeTensorMode():
        fake = torch.zeros(1)
        assert type(hugepages.empty(fake, ROWS, 64)) is type(fake)


@huge
def test_stores_take_their_memory_here() -> None:
    """A dense cache of some megabytes is one that benefits."""
    store = DenseStore.empty(torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, 1, 64), ROWS)
    assert store.keys.data_ptr() % hugepages.HUGE == 0 == store.values.data_ptr() % hugepages.HUGE
