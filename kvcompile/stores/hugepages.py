"""Memory for what a cache holds: in huge pages where the system gives them."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

HUGE = 1 << 21  # bytes of a huge page
LEAST = 2 * HUGE


def empty(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor of `shape` with the dtype and device of `like`.

    Where pages are 4 KiB, a kernel that streams a long row, or jumps from page to page of a pool, waits for addresses
    to be looked up. On Linux, tensors of 4 MiB and more on the CPU therefore begin at a huge page and ask for such
    pages (`MADV_HUGEPAGE`). That is a wish: a system without them gives ordinary ones.
    """
    size = prod(shape) * like.element_size()
    if size < LEAST or not hasattr(mmap, "MADV_HUGEPAGE") or type(like) is not Tensor or not like.is_cpu:
        return like.new_empty(shape)
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without them
        return like.new_empty(shape)
    begin = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % HUGE
    return torch.frombuffer(memory, dtype=torch.uint8, offset=begin, count=size).view(like.dtype).view(shape)
