"""Codes in pages are what codes in a row are."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from kvcompile.kernels import reference
from kvcompile.kernels.layout import Queries
from kvcompile.kernels.spec import KernelSpec
from kvcompile.plan.storage import Codec
from kvcompile.stores.encoded.codes import Codes, Format, RaggedCodes
from kvcompile.stores.encoded.paged import PagedCodes

BATCH, HEADS, DIM = 2, 2, 8
FORMATS = {
    "kivi": Format(Codec("int4", "channel", 4), Codec("int4", "token", 4), torch.float32),
    "int8": Format(Codec("int8", "token"), Codec("int8", "token"), torch.float32),
    "fp8": Format(Codec("float8", "channel", 4), Codec("float8", "token"), torch.float32),
    "keys only": Format(Codec("int2", "channel", 8), Codec("float32"), torch.float32),
}
PAGE = 8


def codes(count: int, format: Format, g: torch.Generator, start: int = 0) -> Codes:
    keys, values = torch.randn(count, DIM, generator=g), torch.randn(count, DIM, generator=g)
    return Codes.of(keys, values, torch.arange(start, start + count, dtype=torch.int32), format)


def same(paged: PagedCodes, ragged: RaggedCodes) -> None:
    assert (paged.lengths, paged.batch, paged.heads) == (ragged.lengths, ragged.batch, ragged.heads)
    assert paged.nbytes() == ragged.nbytes()
    spec = KernelSpec((paged.part,), 1, DIM, DIM, 1.0)
    for r in range(len(ragged.lengths)):
        for start in (0, ragged.lengths[r] // 2 // paged.format.block * paged.format.block):
            for x, y in zip(paged.row(r, start), ragged.row(r, start), strict=True):
                assert torch.equal(x, y)
        read = reference.row(paged.segment(), spec, *divmod(r, HEADS), dtype=torch.float32)
        for x, y in zip(read, ragged.row(r), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_random_operations_like_ragged_codes(seed: int, name: str) -> None:
    format, rng, g = FORMATS[name], random.Random(seed), torch.Generator().manual_seed(seed)
    block, batch = format.block, BATCH
    like = codes(block, format, g)
    paged = PagedCodes.like(like, format, BATCH, HEADS, PAGE)
    ragged = RaggedCodes(like, format, BATCH, HEADS, [0] * BATCH * HEADS)
    forks = []
    for turn in range(20):
        op = "append" if turn == 0 else rng.choice(["append", "append", "take", "select", "fork"])
        if op == "append":
            counts = [block * rng.randint(0, 4) for _ in ragged.lengths]
            new = codes(sum(counts), format, g, 1000 * turn)
            paged.append(counts, new, 8), ragged.append(counts, new, 8)
        elif op == "take":
            indices = []
            for n in ragged.lengths:
                kept = torch.rand(n // block, generator=g) < 0.8
                indices.append((kept.nonzero() * block + torch.arange(block)).flatten())
            paged, ragged = paged.keep(indices, 8), ragged.keep(indices, 8)
        elif op == "select":
            chosen = torch.tensor([rng.randrange(batch) for _ in range(rng.randint(1, 3))])
            batch = len(chosen)
            paged.select(chosen), ragged.select(chosen)
        else:
            forks.append((copy.deepcopy(paged), copy.deepcopy(ragged)))
        same(paged, ragged)
    for fork in forks:
        same(*fork)


def test_a_fork_shares_codes_and_scales() -> None:
    format, g = FORMATS["kivi"], torch.Generator().manual_seed(0)
    one = PagedCodes.like(codes(4, format, g), format, 1, HEADS, PAGE)
    one.append([1000, 1000], codes(2000, format, g), 0)
    before = sum(x.numel() * x.element_size() for x in one.tensors())
    forks = [one.fork() for _ in range(5)]
    for fork in forks:
        fork.append([4, 4], codes(8, format, g), 0)
    after = sum(x.numel() * x.element_size() for x in one.tensors())
    assert sum(fork.nbytes() for fork in forks) > 4.9 * one.nbytes()
    assert after < 1.3 * before
    queries = Queries(torch.randn(1, HEADS, 1, DIM), torch.full((1, 1), 5000))
    spec = KernelSpec((one.part,), 1, DIM, DIM, 1.0)
    assert bool(reference.attend(queries, one.segment(), spec).isfinite().all())
