"""The vectors under generated C++: every path this CPU can run gives what torch gives, and reads nothing past a row."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from vectors import PATHS, built, run, unreadable

from kvcompile.kernels.cpp import build

pytestmark = pytest.mark.skipif(build.available() is not None, reason=f"no compiler: {build.available()}")

TYPES = {
    "float": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "int8_t": torch.int8,
    "uint8_t": torch.uint8,
}
MAPS = {  # each takes sixteen floats at a time
    "exp2s": "exp2_negative(x)",
    "tanhs": "tanh(x)",
    "kept": "keep(x, 5, -1e30f)",
    "larger": "max(x, set(0.25f))",
    "smaller": "min(x, set(0.25f))",
}
BODY = """
#define EACH(T)                                                                                    \\
  extern "C" void load_##T(const T* p, float* y, int n) {                                          \\
    for (int i = 0; i < n; i += 16) store(y + i, load(p + i));                                     \\
  }                                                                                                \\
  extern "C" void part_##T(const T* p, float* y, int n) { store(y, load(p, n)); }
EACH(float) EACH(bf16) EACH(fp16) EACH(e4m3) EACH(int8_t) EACH(uint8_t)
extern "C" void store_bf16(const float* p, bf16* y, int n) {
  for (int i = 0; i < n; i += 16) store(y + i, load(p + i));
}
extern "C" void store_fp16(const float* p, fp16* y, int n) {
  for (int i = 0; i < n; i += 16) store(y + i, load(p + i));
}
extern "C" void store_part(const float* p, float* y, int n) { store(y, load(p), n); }
extern "C" void fields(const uint8_t* p, float* y) {
  store(y, load_field<0, 4>(p)); store(y + 16, load_field<4, 4>(p));
  store(y + 32, load_field<0, 2>(p)); store(y + 48, load_field<6, 2>(p));
}
extern "C" void sums(const float* p, float* y) {
  F x[16];
  for (int i = 0; i < 16; i++) x[i] = load(p + 16 * i);
  store(y, sum16(quad(x[0], x[4], x[8], x[12]), quad(x[1], x[5], x[9], x[13]), quad(x[2], x[6], x[10], x[14]),
                 quad(x[3], x[7], x[11], x[15])));
  V4 four = sum4(x[0], x[1], x[2], x[3]);
  for (int i = 0; i < 4; i++) y[16 + i] = four[i];
  for (int i = 0; i < 16; i++) { y[20 + i] = sum(x[i]); y[36 + i] = largest(x[i]); }
}
""" + "".join(
    f'extern "C" void {name}(const float* p, float* y, int n) {{ for (int i = 0; i < n; i += 16) '
    f"{{ F x = load(p + i); store(y + i, {code}); }} }}\n"
    for name, code in MAPS.items()
)


@pytest.fixture(scope="module", params=PATHS)
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return built(request.param, BODY, "test-simd")


def every_value(name: str) -> torch.Tensor:
    """All bit patterns of a type of 8 or 16 bits; a wide range of floats for float."""
    if name == "float":
        return torch.cat(
            [torch.linspace(-3, 3, 4096), torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0] * 4)]
        )
    wide = TYPES[name].itemsize == 2
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16) if wide else torch.arange(256).to(torch.uint8)
    return bits.view(TYPES[name])


@pytest.mark.parametrize("name", TYPES)
def test_every_value_loads_exactly(library: ctypes.CDLL, name: str) -> None:
    x = every_value(name)
    torch.testing.assert_close(
        run(library, f"load_{name}", x, len(x), count=len(x)), x.float(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("name", TYPES)
def test_a_part_is_loaded_and_the_rest_is_zero(library: ctypes.CDLL, name: str) -> None:
    x = torch.arange(1, 17).to(TYPES[name])
    for n in range(17):
        expected = torch.where(torch.arange(16) < n, x.float(), torch.zeros(()))
        assert torch.equal(run(library, f"part_{name}", x, 16, count=n), expected), n


def test_a_part_touches_nothing_behind_it(library: ctypes.CDLL) -> None:
    """The row ends where a page of memory does, and the next page cannot be read."""
    y = torch.empty(16)
    with unreadable() as end:
        for name, dtype in TYPES.items():
            for n in (1, 7, 15):
                start = end - n * dtype.itemsize
                getattr(library, f"part_{name}")(ctypes.c_void_p(start), ctypes.c_void_p(y.data_ptr()), n)
                assert not y.any(), (name, n)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_stores_round_like_torch(library: ctypes.CDLL, name: str) -> None:
    exact = every_value(name).float()
    between = torch.nextafter(exact, torch.tensor(float("inf")))
    ties = (exact[:-1] + exact[1:]) / 2
    x = torch.cat([exact, between, ties, torch.tensor([1e-30, -1e-8, 65519.9, 65520.0, 3e38, -3.4e38])])
    x = torch.cat([x, torch.zeros(-len(x) % 16)])
    got = run(library, f"store_{name}", x, len(x), TYPES[name], count=len(x))
    torch.testing.assert_close(got, x.to(TYPES[name]), rtol=0, atol=0, equal_nan=True)


def test_a_part_is_stored(library: ctypes.CDLL) -> None:
    x = torch.randn(16)
    for n in range(17):
        assert torch.equal(
            run(library, "store_part", x, 16, count=n), torch.where(torch.arange(16) < n, x, torch.tensor(7.0))
        )


def test_fields_of_packed_bytes(library: ctypes.CDLL) -> None:
    x = torch.randint(0, 256, (16,), dtype=torch.uint8)
    wide = x.int()
    expected = torch.cat([wide & 15, wide >> 4, wide & 3, wide >> 6]).float()
    assert torch.equal(run(library, "fields", x, 64), expected)


def test_sums_across_lanes(library: ctypes.CDLL) -> None:
    x = torch.randn(16, 16)
    y = run(library, "sums", x, 52)
    expected = x.sum(1)
    for got, true in ((y[:16], expected), (y[16:20], expected[:4]), (y[20:36], expected)):
        torch.testing.assert_close(got, true, rtol=0, atol=4e-6)  # sums of 16 in another order
    assert torch.equal(y[36:], x.amax(1))


def test_exp2_is_good_to_a_few_ulp(library: ctypes.CDLL) -> None:
    x = torch.cat([torch.linspace(-126, 0, 1 << 16), -torch.logspace(-12, 0, 1 << 12), torch.zeros(16)])
    got, true = run(library, "exp2s", x, len(x), count=len(x)).double().numpy(), np.exp2(x.double().numpy())
    ulp = np.spacing(true.astype(np.float32)).astype(np.float64)
    assert (np.abs(got - true) / ulp).max() <= 2.5  # 2 with fused multiply and add
    assert got[-1] == 1.0, "a row of one entry must weigh exactly one"


def test_exp2_of_a_masked_logit_is_zero(library: ctypes.CDLL) -> None:
    x = torch.tensor([-1e30, -1e4, -127.6, float("-inf")] * 4)
    assert not run(library, "exp2s", x, 16, count=16).any()


def test_tanh_is_good_to_four_ulp(library: ctypes.CDLL) -> None:
    x = torch.cat([torch.linspace(-12, 12, 1 << 16), torch.logspace(-12, 2, 1 << 12), torch.tensor([-1e30, 1e30] * 8)])
    got, true = run(library, "tanhs", x, len(x), count=len(x)).double().numpy(), np.tanh(x.double().numpy())
    ulp = np.spacing(np.abs(true).astype(np.float32)).astype(np.float64)
    assert (np.abs(got - true) / ulp).max() <= 4


def test_masks_and_bounds(library: ctypes.CDLL) -> None:
    x = torch.randn(16)
    assert torch.equal(run(library, "kept", x, 16, count=16), torch.where(torch.arange(16) < 5, x, torch.tensor(-1e30)))
    assert torch.equal(run(library, "larger", x, 16, count=16), x.clamp_min(0.25))
    assert torch.equal(run(library, "smaller", x, 16, count=16), x.clamp_max(0.25))
