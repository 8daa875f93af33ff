"""Kernels over weights in few bits: against whole numbers in float64, on every path, a row whatever is beside it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels.cpp import build, lower
from kvcompile.kernels.cpp.layer import few_bits, run
from kvcompile.kernels.layers import MOST_ROWS, AfterAttention, BeforeAttention, Linear, Norm, Part
from kvcompile.kernels.names import WEIGHTS
from kvcompile.kernels.reference.packed import GROUP, Packed, PackedLinear, pack, rounded, unpack

pytestmark = pytest.mark.skipif(build.available() is not None, reason=f"no compiler: {build.available()}")

X86 = platform.machine() in ("x86_64", "AMD64")
PATHS = {"own": (), **({"avx2": ("-march=haswell",), "portable": ("-march=x86-64",)} if X86 else {})}
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels for a CPU with fewer instructions."""
    if request.param != "own" and build.toolchain().simd not in ("AVX-512", "AVX2"):
        pytest.skip("this CPU has no AVX2")
    few_bits._library.cache_clear()
    monkeypatch.setattr(build, "load", partial(build.load, flags=PATHS[request.param]))
    yield request.param
    few_bits._library.cache_clear()


def exact(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """The product of the rounded rows, in float64."""
    codes, scales = rounded(x.flatten(0, -2))
    rows = (codes.double().unflatten(-1, (-1, GROUP)) * scales.double().unsqueeze(-1)).flatten(-2)
    y = F.linear(rows, unpack(packed, torch.float64), None if bias is None else bias.double())
    return y.unflatten(0, x.shape[:-1])


def check(y: Tensor, true: Tensor, inner: int) -> None:
    bound = ROUNDING[y.dtype] * true.abs() + 4e-6 * inner**0.5
    assert (y.double() - true).abs().sub(bound).max() <= 0


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, MOST_ROWS),
    groups=st.integers(1, 9),
    features=st.integers(1, 120),
    bias=st.booleans(),
    format=st.sampled_from(list(WEIGHTS)),
    dtype=st.sampled_from(list(ROUNDING)),
)
def test_any_size(m: int, groups: int, features: int, bias: bool, format: str, dtype: torch.dtype) -> None:
    x, packed = torch.randn(m, 1, 32 * groups).to(dtype), pack(torch.randn(features, 32 * groups).to(dtype), format)
    b = torch.randn(features).to(dtype) if bias else None
    check(few_bits.product(x, packed, b), exact(x, packed, b), 32 * groups)
    assert torch.equal(few_bits.floats(packed), unpack(packed, dtype))


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("format", WEIGHTS)
def test_every_path_of_this_cpu(path: str, format: str) -> None:
    """Also the largest codes of all, where sums of 16 bits would be too narrow."""
    for weight, x in (
        (torch.randn(45, 160), torch.randn(7, 160)),
        (torch.ones(16, 64), torch.ones(5, 64)),
        (-torch.ones(16, 64), torch.ones(2, 64)),
    ):
        packed = pack(weight, format)
        check(few_bits.product(x, packed, None), exact(x, packed, None), weight.shape[1])
        assert torch.equal(few_bits.floats(packed), unpack(packed, torch.float32))


@pytest.mark.parametrize("format", WEIGHTS)
def test_infinities_and_nan_stay_in_their_row(format: str) -> None:
    x, packed = torch.randn(6, 96), pack(torch.randn(40, 96), format)
    clean = few_bits.product(x, packed, None)
    x[1, 95], x[4, 3] = float("nan"), float("inf")
    y = few_bits.product(x, packed, None)
    assert not y[[1, 4]].isfinite().any()
    assert torch.equal(y[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


class Layer:
    """Random halves of a layer with weights in few bits, and the same with their values in float64."""

    def __init__(self, format: str, dtype: torch.dtype) -> None:
        self.format, self.dtype, self.generator = format, dtype, torch.Generator().manual_seed(0)

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=self.generator)).to(self.dtype)

    def linear(self, features: int, inner: int, bias: bool = True) -> Linear:
        weight = pack(self.random(features, inner, scale=inner**-0.5), self.format)
        return Linear(weight, self.random(features) if bias else None)

    def before(self) -> BeforeAttention:
        norm = Norm("rms", self.random(96), None, 1e-5)
        parts = (Part(self.linear(102, 96), None, False), Part(self.linear(34, 96, False), None, False))
        return BeforeAttention(norm, parts, 34)

    def after(self) -> AfterAttention:
        norm = Norm("rms", self.random(96), None, 1e-5)
        sides = [self.linear(160, 96, False) for _ in range(2)]
        return AfterAttention(self.linear(96, 64), norm, sides[0], self.linear(96, 160), "silu", gate=sides[1])


def linear(layer: Linear, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Packed)
    return F.linear(x, unpack(weight, torch.float64), None if bias is None else bias.double())


def normed(norm: Norm, x: Tensor) -> Tensor:
    assert norm.weight is not None
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("format", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_halves_of_a_layer(path: str, format: str, dtype: torch.dtype) -> None:
    """Against float64 that rounds nothing: one error in a hundred is what 8 bits for the rows cost."""
    some = Layer(format, dtype)
    before, after = some.before(), some.after()
    for rows in (1, 6, MOST_ROWS):
        x, attended = some.random(rows, 1, 96), some.random(rows, 1, 64)
        parts = run.Before(before, (False, False))(x, None, None)
        z = normed(before.norm, x.double())
        for got, part in zip(parts, before.parts, strict=False):
            near(got, linear(part.linear, z).unflatten(-1, (-1, 34)).transpose(1, 2))
        s = x.double() + linear(after.output, attended.double())
        z = normed(after.norm, s)
        assert after.gate is not None
        h = F.silu(linear(after.gate, z)) * linear(after.up, z)
        near(run.After(after)(attended, x), s + linear(after.down, h))


def near(got: Tensor | None, true: Tensor) -> None:
    assert got is not None
    error = (got.double() - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)
    assert error.max() < 0.015


@pytest.mark.parametrize("format", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(
    format: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, whatever their number, and whatever the threads."""
    some = Layer(format, dtype)
    before, after, head = some.before(), some.after(), some.linear(300, 96)
    x, attended = some.random(MOST_ROWS, 1, 96), some.random(MOST_ROWS, 1, 64)
    parts: list[Callable[[Any], Tensor]] = [
        lambda i: torch.cat([y.flatten(1) for y in run.Before(before, (False,) * 2)(x[i], None, None)[:2]], 1),
        lambda i: run.After(after)(attended[i], x[i]).flatten(1),
        lambda i: few_bits.product(x[i], head.weight, head.bias).flatten(1),
    ]
    for part in parts:
        alone = torch.cat([part(slice(i, i + 1)) for i in range(MOST_ROWS)])
        for threads in (1, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            for rows in (2, 3, 4, 5, 9, MOST_ROWS):
                assert torch.equal(part(slice(0, rows)), alone[:rows]), (rows, threads)


def test_few_rows_read_codes_and_many_read_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gradients, autocast and other dtypes take the module's own forward."""
    module = PackedLinear(pack(torch.randn(50, 64), "int8"), torch.randn(50))
    assert lower.lower(module) == 1
    assert lower.lowered(module)
    calls: list[str] = []
    for name in ("product", "floats"):
        real = getattr(few_bits, name)
        monkeypatch.setattr(few_bits, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    expected = partial(F.linear, weight=module.weight, bias=module.bias)
    with torch.no_grad():
        for rows, called in ((1, "product"), (MOST_ROWS, "product"), (MOST_ROWS + 1, "floats"), (0, "floats")):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(module(x), expected(x), rtol=0.05, atol=0.3)
            assert calls.pop() == called
        x = torch.randn(MOST_ROWS + 1, 64)
        assert torch.equal(module(x), expected(x))
        calls.clear()
        half = torch.randn(2, 64, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="dtype"):
            module(half)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
    x = torch.randn(1, 64, requires_grad=True)
    module(x).sum().backward()
    assert torch.allclose(x.grad, module.weight.sum(0)[None], atol=1e-4)  # type: ignore[arg-type]
    assert calls == ["floats"] * calls.count("floats")


def test_nothing_unlike_enters() -> None:
    packed = pack(torch.randn(20, 64), "int8")
    with pytest.raises(KvcompileError, match="rows"):
        few_bits.product(torch.randn(2, 64, dtype=torch.bfloat16), packed, None)
    short = Packed("int8", (40, 64), packed.codes, packed.scales, None, torch.float32)
    with pytest.raises(KvcompileError, match="the weight of a linear layer"):
        few_bits.floats(short)
    wrong = Packed("int8", (20, 64), packed.codes, packed.scales.float(), None, torch.float32)
    with pytest.raises(KvcompileError, match="scales"):
        few_bits.floats(wrong)
