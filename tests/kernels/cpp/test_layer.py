"""Both halves of a decoder layer in C++: against float64, of any size, a row whatever stands beside it."""

from __future__ import annotations

import platform
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels.cpp import build
from kvcompile.kernels.cpp.layer import run
from kvcompile.kernels.cpp.layer.source import AfterSpec, BeforeSpec
from kvcompile.kernels.layers import ACTIVATIONS, MOST_ROWS, NORMS, AfterAttention, BeforeAttention, Linear, Norm, Part

pytestmark = pytest.mark.skipif(build.available() is not None, reason=f"no compiler: {build.available()}")

DTYPES = [torch.float32, torch.bfloat16]
# Results are rounded once; what enters a product (and in bfloat16 is rounded before) is of unit size, and so are sums.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2**-5}
CURVES = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}
X86 = platform.machine() in ("x86_64", "AMD64")


def among_nan(values: Tensor) -> Tensor:
    """The same numbers between others that nobody may read."""
    room = torch.full((values.numel() + 64,), float("nan"), dtype=values.dtype, device=values.device)
    room[32:-32] = values.flatten()
    return room[32:-32].view_as(values)


class Sizes:
    """Random weights of one layer, by a seed."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float32)
        return among_nan((scale * values).to(self.dtype))

    def linear(self, features: int, inner: int, bias: bool = True) -> Linear:
        return Linear(self.random(features, inner, scale=inner**-0.5), self.random(features) if bias else None)

    def norm(self, kind: str, width: int) -> Norm:
        return Norm(kind, self.random(width), self.random(width) if kind == "layer" else None, 1e-5)

    def before(self, kind: str, head_norm: str | None, inner: int, head: int, bias: bool) -> BeforeAttention:
        norms = [None if head_norm is None else self.norm(head_norm, head) for _ in range(2)]
        parts = (
            Part(self.linear(3 * head, inner, bias), norms[0], True),
            Part(self.linear(2 * head, inner, bias), norms[1], True),
            Part(self.linear(2 * head, inner, not bias), None, False),
        )
        return BeforeAttention(self.norm(kind, inner), parts, head)

    def after(
        self, kind: str, activation: str, gated: bool, behind: bool, sizes: tuple[int, int, int]
    ) -> AfterAttention:
        hidden, inner, attended = sizes
        return AfterAttention(
            output=self.linear(hidden, attended, gated),
            norm=self.norm(kind, hidden),
            up=self.linear(inner, hidden, not gated),
            down=self.linear(hidden, inner),
            activation=activation,
            gate=self.linear(inner, hidden) if gated else None,
            output_norm=self.norm(kind, hidden) if behind else None,
            down_norm=self.norm(kind, hidden) if behind else None,
            factor=0.5 if behind else 1.0,
        )


def exact_norm(norm: Norm | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    weight = norm.weight.double()  # type: ignore[union-attr]
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, norm.bias.double(), norm.eps)  # type: ignore[union-attr]
    z = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    return z * (weight + 1 if norm.kind == "rms_plus_one" else weight)


def exact_linear(linear: Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.double(), None if linear.bias is None else linear.bias.double())


def exact_before(layer: BeforeAttention, x: Tensor, cos: Tensor, sin: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(turned, plain) of each part, `[B, H, 1, D]`."""
    results = []
    z, half = exact_norm(layer.norm, x.double()), cos.shape[-1] // 2
    for part in layer.parts:
        plain = exact_norm(part.norm, exact_linear(part.linear, z).unflatten(-1, (-1, layer.head_dim))).transpose(1, 2)
        turned = plain
        if part.turned:
            a, b, rest = plain[..., :half], plain[..., half : 2 * half], plain[..., 2 * half :]
            c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
            turned = torch.cat((a * c[..., :half] - b * s[..., :half], b * c[..., half:] + a * s[..., half:], rest), -1)
        results.append((turned, plain))
    return results


def exact_after(layer: AfterAttention, attended: Tensor, x: Tensor) -> Tensor:
    added = exact_norm(layer.output_norm, exact_linear(layer.output, attended.double()))
    s = x.double() + layer.factor * added
    z, act = exact_norm(layer.norm, s), CURVES[layer.activation]
    up = exact_linear(layer.up, z)
    h = act(up) if layer.gate is None else act(exact_linear(layer.gate, z)) * up
    return s + layer.factor * exact_norm(layer.down_norm, exact_linear(layer.down, h))


def close(got: Tensor, true: Tensor) -> None:
    """Up to rounding, of numbers as large as a row's are."""
    bound = ROUNDING[got.dtype] * (true.abs() + true.square().mean(-1, keepdim=True).sqrt() + 1)
    assert (got.double() - true).abs().sub(bound).max() <= 0


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, MOST_ROWS),
    inner=st.integers(2, 90),
    half=st.integers(1, 20),
    rest=st.integers(0, 17),
    kind=st.sampled_from(["rms", "layer"]),
    head_norm=st.sampled_from([None, "rms"]),
    shared=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_queries_keys_and_values_of_any_size(
    rows: int, inner: int, half: int, rest: int, kind: str, head_norm: str | None, shared: bool, dtype: torch.dtype
) -> None:
    """shared: all sequences stand at one position, as when `position_ids` has one row."""
    sizes = Sizes(dtype, rows)
    layer = sizes.before(kind, head_norm, inner, 2 * half + rest, shared)
    x = sizes.random(rows, 1, inner)
    cos, sin = torch.randn(2, 1 if shared else rows, 1, 2 * half)
    results = run.Before(layer, (True, False, False))(x, cos, sin)
    true = exact_before(layer, x, cos, sin)
    assert results[4] is None
    assert results[5] is None
    for got, (turned, _) in zip(results, true, strict=False):
        close(got, turned)
    close(results[3], true[0][1])


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, MOST_ROWS),
    sizes=st.tuples(st.integers(2, 90), st.integers(1, 90), st.integers(1, 90)),
    activation=st.sampled_from(["silu", "relu"]),
    behind=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_what_follows_attention_of_any_size(
    rows: int, sizes: tuple[int, int, int], activation: str, behind: bool, dtype: torch.dtype
) -> None:
    some = Sizes(dtype, rows)
    layer = some.after("rms", activation, activation == "silu", behind, sizes)
    attended, x = some.random(rows, 1, sizes[2]), some.random(rows, 1, sizes[0])
    close(run.After(layer)(attended, x), exact_after(layer, attended, x))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_formula(kind: str, activation: str) -> None:
    """Also where numbers are large, and an exponential would overflow."""
    some = Sizes(torch.float32)
    layer = some.after(kind, activation, activation != "gelu", False, (70, 50, 33))
    for scale in (1.0, 100.0):
        attended, x = some.random(5, 1, 33, scale=scale), some.random(5, 1, 70, scale=scale)
        close(run.After(layer)(attended, x), exact_after(layer, attended, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, whatever their number, NaN among them, and whatever the threads."""
    some = Sizes(dtype)
    before, after = some.before("rms", "rms", 300, 34, True), some.after("rms", "silu", True, False, (300, 410, 102))
    x, attended = some.random(MOST_ROWS, 1, 300), some.random(MOST_ROWS, 1, 102)
    cos, sin = torch.randn(2, MOST_ROWS, 1, 34)
    halves: list[Any] = [
        lambda i: torch.cat([y.flatten(1) for y in run.Before(before, (False,) * 3)(x[i], cos[i], sin[i])[:3]], 1),
        lambda i: run.After(after)(attended[i], x[i]).flatten(1),
    ]
    for half in halves:
        alone = torch.cat([half(slice(i, i + 1)) for i in range(MOST_ROWS)])
        for rows in (2, 3, 4, 7, 8, 9, 23, MOST_ROWS):
            assert torch.equal(half(slice(0, rows)), alone[:rows]), rows
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for half in halves:
        wide = half(slice(0, MOST_ROWS))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        assert torch.equal(half(slice(0, MOST_ROWS)), wide)
        x[5], attended[5] = float("nan"), float("nan")
        poisoned = half(slice(0, MOST_ROWS))
        assert poisoned[5].isnan().all()
        assert torch.equal(poisoned[6:], wide[6:])
        assert torch.equal(poisoned[:5], wide[:5])
        x[5], attended[5] = 0.0, 0.0


@pytest.mark.parametrize("flags", [("-march=haswell",), ("-march=x86-64",)] if X86 else [])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_path_of_this_cpu(flags: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if build.toolchain().simd not in ("AVX-512", "AVX2"):
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setattr(build, "load", partial(build.load, flags=flags))
    some = Sizes(dtype)
    layer, x, attended = (
        some.after("rms", "silu", True, False, (70, 50, 33)),
        *map(some.random, (9, 9), (1, 1), (70, 33)),
    )
    close(run.After(layer)(attended, x), exact_after(layer, attended, x))
    before = some.before("rms", "rms", 70, 18, True)
    cos, sin = torch.randn(2, 9, 1, 12)
    for got, (turned, _) in zip(
        run.Before(before, (False,) * 3)(x, cos, sin), exact_before(before, x, cos, sin), strict=False
    ):
        close(got, turned)


def test_texts_follow_from_the_spec_alone() -> None:
    one, other = (Sizes(torch.bfloat16, seed).before("rms", None, 20 + seed, 10, True) for seed in (1, 2))
    assert BeforeSpec.of(one) == BeforeSpec.of(other)
    assert BeforeSpec.of(one).text() == BeforeSpec.of(other).text()
    layer = Sizes(torch.float32).after("layer", "gelu", False, True, (12, 13, 14))
    assert "constexpr Formula NORM = LAYER;" in AfterSpec.of(layer).text()
    assert AfterSpec.of(layer).text() == AfterSpec.of(layer).text()


def test_nothing_unlike_enters() -> None:
    some = Sizes(torch.float32)
    layer = some.after("rms", "silu", True, False, (8, 8, 8))
    kernel, x = run.After(layer), some.random(2, 1, 8)
    for attended in (x.double(), x[:1], x[..., :4], x.expand(2, 2, 8)):
        with pytest.raises(KvcompileError, match="attended values"):
            kernel(attended, x)
    with pytest.raises(KvcompileError, match="the MLP's output"):
        run.After(AfterAttention(layer.output, layer.norm, layer.up, some.linear(8, 9), "silu"))
    before = some.before("rms", None, 8, 4, True)
    with pytest.raises(KvcompileError, match="cos"):
        run.Before(before, (False,) * 3)(x, torch.ones(3, 1, 4), torch.ones(3, 1, 4))
