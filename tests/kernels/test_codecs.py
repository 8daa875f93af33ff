"""Stored numbers come back within half a step, in every format, whatever is in them; bytes are as promised."""

from __future__ import annotations

import pytest
import torch
from quantized import case, decoded_error

from kvcompile.kernels import reference, sdpa
from kvcompile.kernels.codecs import decode, encode, pack, unpack
from kvcompile.kernels.spec import KernelSpec, Part, plain
from kvcompile.plan.storage import Codec, Storage

FORMATS = [
    *(Codec(f"int{bits}", "channel", group) for bits in (8, 4, 2) for group in (8, 32)),
    *(Codec(f"int{bits}", "token", group) for bits in (8, 4, 2) for group in (0, 16)),
    Codec("float8", "token"),
    Codec("float8", "token", 16),
    Codec("float8", "channel", 8),
    *(Codec("nf4", "token", group) for group in (0, 16)),
    Codec("nf4", "channel", 8),
]


@pytest.mark.parametrize("codec", FORMATS, ids=lambda c: c.name)
def test_error_is_at_most_half_a_step(codec: Codec) -> None:
    x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)) * 3 + 1
    along = x.unflatten(1, (-1, codec.group)) if codec.axis == "channel" else x.unflatten(2, (-1, codec.group or 32))
    dim = 2 if codec.axis == "channel" else 3
    if codec.kind == "nf4":  # the nearest level, but for the scale's rounding to float16
        most = along.abs().amax(dim, keepdim=True)
        distances = torch.stack([(along - level * most).abs() for level in codec.format.levels])
        limit = distances.amin(0) + most * 2**-11
    elif codec.kind == "float8":  # 3 bits of mantissa, and subnormals below 2^-6 of 448
        limit = (along.abs() * 2**-4).maximum(along.abs().amax(dim, keepdim=True) * 2**-9 / 448 * 1.01)
    else:
        step = (along.amax(dim, keepdim=True) - along.amin(dim, keepdim=True)) / (2**codec.bits - 1)
        limit = (step / 2 * 1.01 + 4 * 2**-11).expand_as(along)  # scale and zero are rounded to float16
    assert bool((decoded_error(x, codec) <= limit.reshape(x.shape) * 1.001).all())


@pytest.mark.parametrize("codec", FORMATS, ids=lambda c: c.name)
def test_constant_and_zero_groups_come_back_exactly(codec: Codec) -> None:
    for value in (0.0, 1.5, -2.0):
        x = torch.full((32, 32), value)
        if codec.parameters == 1 and value:
            assert bool((decoded_error(x, codec) <= abs(value) * 2**-10).all())
        else:
            assert not decoded_error(x, codec).any()


@pytest.mark.parametrize("codec", FORMATS, ids=lambda c: c.name)
def test_bytes_are_those_of_the_tensors(codec: Codec) -> None:
    codes, scales = encode(torch.randn(64, 32), codec)
    assert scales is not None
    assert codec.nbytes(64, 32) == codes.numel() * codes.element_size() + scales.numel() * 2
    assert codes.shape == (64, codec.width(32))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packing_loses_nothing(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 3, 16), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == 16 * bits // 8
    assert torch.equal(unpack(packed, bits), codes)
    if bits == 4:
        assert int(packed[0, 0, 1]) == int(codes[0, 0, 1]) + 16 * int(codes[0, 0, 9])


def test_encoding_again_is_stable() -> None:
    """Per token, decoded numbers lie on the same grid, so a second encoding moves nothing by more than rounding."""
    codec = Codec("int4", "token")
    once = decode(*encode(torch.randn(9, 16), codec), codec)
    twice = decode(*encode(once, codec), codec)
    torch.testing.assert_close(twice, once, atol=2e-3, rtol=0)


def test_storage_says_what_is_encoded() -> None:
    kivi = Storage(Codec("int4", "channel", 32), Codec("int4", "token", 32), residual=64)
    assert (kivi.block, kivi.quantized) == (32, True)
    assert [kivi.encoded(n) for n in (0, 64, 95, 96, 127, 128)] == [0, 0, 0, 32, 32, 64]
    assert Storage(Codec("int8", "token"), Codec("int8", "token"), residual=4).encoded(10) == 6
    assert Storage().encoded(100) == 0


PARTS = [
    (Part("dense", Codec("int4", "channel", 8), Codec("int4", "token", 8)),),
    (Part("ragged", Codec("int8", "token"), Codec("int8", "token")), *plain("ragged", "float32")),
    (Part("paged", Codec("int2", "channel", 8), Codec("int4", "token"), 16), *plain("ragged", "float32")),
    (Part("paged", Codec("float32"), Codec("float32"), 4),),
    (
        Part("paged", Codec("int8", "channel", 8), Codec("int4", "token"), 8),
        Part("paged", Codec("int4", "channel", 8), Codec("int2", "token"), 8),
        *plain("dense", "float32"),
    ),
]


@pytest.mark.parametrize("parts", PARTS, ids=lambda p: "+".join(x.name for x in p))
@pytest.mark.parametrize("count", [1, 5])
def test_library_route_decodes_what_the_reference_decodes(parts: tuple[Part, ...], count: int) -> None:
    """No poisoned slack leaks in, and every layout and mixture gives what its decoded rows give."""
    spec = KernelSpec(parts, 3, 16, 16, 0.25)
    uniform = any(p.layout == "dense" for p in parts)
    lengths = [[32] * 4 if uniform else [40, 8, 0, 33] for _ in parts]
    if parts[-1].layout == "dense" and len(parts) > 1:
        lengths[-1] = [7] * 4
    made = case(spec, lengths, batch=2, heads=2, count=count)
    expected = reference.attend(made.queries, made.view, spec)
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(sdpa.attend(made.queries, made.view, spec), expected, atol=5e-6, rtol=5e-6)


def test_column_sums_are_attention_received() -> None:
    spec = KernelSpec(plain("ragged", "float32"), 2, 16, 16, 0.25, scores=True)
    made = case(spec, [[9, 4]], batch=1, heads=2)
    sums = torch.zeros(2, 9)
    reference.attend(made.queries, made.view, spec, sums)
    torch.testing.assert_close(sums.sum(1), torch.full((2,), 2.0))  # two query heads share each KV head
    assert not sums[1, 4:].any()


def test_sinks_stay_visible_under_a_window() -> None:
    spec = KernelSpec(plain("ragged", "float32"), 1, 16, 16, 0.25, sliding_window=3, sinks=2, scores=True)
    made = case(spec, [[12]], batch=1, heads=1)
    made.view.positions[:12] = torch.arange(12)
    made.queries.positions[:] = 11
    sums = torch.zeros(1, 12)
    reference.attend(made.queries, made.view, spec, sums)
    assert (sums[0] > 0).tolist() == [True, True] + [False] * 7 + [True] * 3
