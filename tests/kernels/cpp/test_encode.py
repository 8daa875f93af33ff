"""Encoding in C++ gives the very codes and scales that the torch codecs give."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.kernels import codecs
from kvcompile.kernels.cpp import build
from kvcompile.kernels.cpp import encode as generated
from kvcompile.plan.storage import Codec

pytestmark = pytest.mark.skipif(build.available() is not None, reason="no C++ compiler here")

FORMATS = [
    (Codec("int4", "channel", 32), 64),
    (Codec("int4", "token", 32), 64),
    (Codec("int8", "token"), 64),
    (Codec("int8", "channel", 5), 12),
    (Codec("int2", "token"), 80),
    (Codec("int2", "channel", 16), 80),
    (Codec("int4", "token", 16), 80),
    (Codec("int2", "token", 32), 128),
    (Codec("float8", "token"), 64),
    (Codec("float8", "channel", 16), 96),
    (Codec("float8", "token", 16), 64),
    (Codec("nf4", "token", 64), 128),
    (Codec("nf4", "token", 20), 80),
    (Codec("nf4", "channel", 16), 12),
]
TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda f: generated._kernel(*f, torch.float32), FORMATS))


def check(x: torch.Tensor, codec: Codec) -> None:
    codes, scales = generated.encode(x, codec)
    expected, numbers = codecs.encode(x, codec)
    assert codes.dtype == expected.dtype
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, numbers)


@pytest.mark.parametrize(("codec", "dim"), FORMATS, ids=lambda x: getattr(x, "name", x))
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_bit_for_bit(codec: Codec, dim: int, data, seed: int) -> None:
    """Ordinary numbers, tiny and large ones, constants, ties between two codes."""
    g = torch.Generator().manual_seed(seed)
    unit = codec.group if codec.axis == "channel" else 1
    n = unit * data.draw(st.integers(1, 40))
    shape = data.draw(st.sampled_from([(n, dim), (2, 3, n, dim)]))
    x = torch.randn(shape, generator=g) * data.draw(st.sampled_from([1e-7, 1e-3, 1.0, 300.0]))
    x = x + data.draw(st.sampled_from([0.0, 5.0, -1000.0]))
    kind = data.draw(st.sampled_from(["any", "constant", "zeros", "grid"]))
    if kind == "constant":
        x = x[..., :1, :1].expand(shape)
    elif kind == "zeros":
        x = x * (torch.rand(shape, generator=g) > 0.9)
    elif kind == "grid":
        x = (x * 2).round() / 2
    check(x, codec)


@pytest.mark.parametrize("dtype", TYPES[1:])
@pytest.mark.parametrize("codec", [FORMATS[0][0], FORMATS[2][0], FORMATS[8][0]], ids=lambda c: c.name)
def test_16_bit_inputs(dtype: torch.dtype, codec: Codec) -> None:
    check(torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).to(dtype), codec)


def test_inputs_may_lie_anywhere() -> None:
    x = torch.randn(64, 4, 64).transpose(0, 1)
    check(x, FORMATS[0][0])
    check(x[:, 5:37, :], FORMATS[0][0])


def test_what_cpp_does_not_encode_torch_does() -> None:
    for x, codec in (
        (torch.randn(4, 64), Codec("bfloat16")),
        (torch.randn(4, 64, dtype=torch.float64), Codec("int8", "token")),
        (torch.randn(0, 64), Codec("int8", "token")),
    ):
        for mine, theirs in zip(generated.encode(x, codec), codecs.encode(x, codec), strict=True):
            assert mine is theirs is None or torch.equal(mine, theirs)
