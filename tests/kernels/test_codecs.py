"""Stored numbers come back within half a step, in every format, whatever is in them; bytes are as promised."""

from __future__ import annotations

import math
from dataclasses import replace

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
@pytest.mark.parametrize("variant", [{}, {"sink": True}, {"bias": True}, {"sink": True, "bias": True, "softcap": 2.0}])
def test_the_library_decodes_what_the_reference_decodes(parts: tuple[Part, ...], count: int, variant: dict) -> None:
    """No poisoned slack leaks in, and every layout and mixture gives what its decoded rows give."""
    spec = KernelSpec(parts, 3, 16, 16, 0.25, **variant)
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


@pytest.mark.parametrize("window", [None, 3])
def test_a_sink_weighs_in_and_is_dropped(window: int | None) -> None:
    """By the formula, entry by entry: exp(sink) is a term of the denominator that no value and no entry receives."""
    spec = KernelSpec(plain("ragged", "float32"), 2, 16, 16, 0.25, window, sink=True, scores=True)
    made = case(spec, [[12]], batch=1, heads=1)
    made.view.positions[:12] = torch.arange(12)
    made.queries.positions[:] = 11
    sums = torch.zeros(1, 12)
    out = reference.attend(made.queries, made.view, spec, sums)
    received = torch.zeros(12)
    for head, sink in enumerate(made.queries.sinks.tolist()):
        logits = (made.queries.states[0, head, 0] @ made.view.keys[:12].T * 0.25)[12 - window if window else 0 :]
        weights = logits.exp() / (logits.exp().sum() + math.exp(sink))
        received[-len(weights) :] += weights
        torch.testing.assert_close(out[0, head, 0], weights @ made.view.values[:12][-len(weights) :])
    torch.testing.assert_close(sums[0], received)
    assert float(sums.sum()) < 1.9


def test_a_bias_is_added_to_the_logit_of_its_entry() -> None:
    """log(3) makes an entry count three times."""
    spec = KernelSpec(plain("dense", "float32"), 2, 16, 16, 0.25, bias=True)
    made = case(spec, [[6]], batch=1, heads=1)
    made.view.bias.zero_()[..., 2] = math.log(3)
    x = made.view
    copies = [0, 1, 2, 2, 2, 3, 4, 5]
    same = replace(x, keys=x.keys[:, :, copies], values=x.values[:, :, copies], positions=x.positions[:, :, copies])
    want = reference.attend(made.queries, same, replace(spec, bias=False))
    torch.testing.assert_close(reference.attend(made.queries, made.view, spec), want)


def test_a_spec_gets_what_it_asks_for() -> None:
    for variant, what in (({"sink": True}, "a learned sink"), ({"bias": True}, "a bias of each entry")):
        spec = KernelSpec(plain("ragged", "float32"), 2, 16, 16, 0.25, **variant)
        made = case(replace(spec, sink=False, bias=False), [[9, 4]], batch=1, heads=2)
        for attend in (reference.attend, sdpa.attend):
            with pytest.raises(ValueError, match=what):
                attend(made.queries, made.view, spec)
