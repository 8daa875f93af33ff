"""Whole numbers under generated C++: every path this CPU can run gives what torch gives, and reads no byte too many."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor
from vectors import PATHS, built, run, unreadable

from kvcompile.kernels.cpp import build

pytestmark = pytest.mark.skipif(build.available() is not None, reason=f"no compiler: {build.available()}")

PARTS = (5, 16, 10, 3)  # bytes of a row that `four` takes
HALVES = (32, 16, 20, 24, 7)  # and that `zipped` takes
BODY = """
#define FOUR(n) \\
  extern "C" void four##n(const uint8_t* p, uint16_t* y, int s) { put(y, four<n>(p, p + s, p + 2 * s, p + 3 * s)); }
#define ZIPPED(n) \\
  extern "C" void zipped##n(const uint8_t* p, uint16_t* y, int s) { put(y, zipped<n>(p, p + s)); }
static void put(uint16_t* y, C x) { memcpy(y, &x, sizeof x); }
extern "C" void fields(const uint16_t* p, uint16_t* y, int) {
  C x = read<C>(p);
  for (int bits = 2; bits <= 8; bits *= 2)
    for (int at = 0; at < 16; at += bits, y += 32) put(y, field(x, at, bits));
}
extern "C" void dots(const int16_t* p, int32_t* y, int) {
  I sum = bits_as<I>(read<U>(p + 64));
  sum = dot(sum, read<C>(p), read<C>(p + 32));
  memcpy(y, &sum, sizeof sum);
}
extern "C" void spread(const int16_t* p, uint16_t* y, int) { put(y, four(p)); put(y + 32, two(p)); }
extern "C" void wholes(const float* p, float* y, int) {
  F x[3] = {load(p), load(p + 16), load(p + 32)};
  int16_t apart[48], rest[16];
  y[48] = to_whole<32767>(x, apart);
  store_whole<false>(rest, whole(load(p) * set(100.0f)));
  for (int i = 0; i < 48; i++) y[i] = apart[i];
  for (int i = 0; i < 16; i++) y[49 + i] = rest[i];
}
extern "C" void products(const int16_t* p, int16_t* y, int) { scaled(p, p + 32, y); }
extern "C" void zips(const float* p, float* y, int n) { store_zipped(y, load(p), load(p + 16), n); }
""" + "".join([f"FOUR({n})\n" for n in PARTS] + [f"ZIPPED({n})\n" for n in HALVES])


@pytest.fixture(scope="module", params=PATHS)
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return built(request.param, BODY, "test-codes")


def shorts(count: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**15) + 1, 2**15, (count,), generator=torch.Generator().manual_seed(seed)).short()


def test_fields_of_every_width(library: ctypes.CDLL) -> None:
    x = shorts(32)
    got = run(library, "fields", x, 32 * 14, torch.int16).view(14, 32)
    wide = x.int() & 0xFFFF
    expected = [(wide >> at) & (2**bits - 1) for bits in (2, 4, 8) for at in range(0, 16, bits)]
    assert torch.equal(got.int() & 0xFFFF, torch.stack(expected))


def test_products_of_pairs_are_added_up(library: ctypes.CDLL) -> None:
    x = shorts(96)
    x[:32] = x[:32].remainder(256)  # codes
    got = run(library, "dots", x, 16, torch.int32)
    start = x[64:].view(torch.int32)
    expected = start.long() + (x[:32].long() * x[32:64].long()).view(16, 2).sum(1)
    assert torch.equal(got.long(), (expected + 2**31).remainder(2**32) - 2**31)


def test_numbers_for_every_block_and_every_lane(library: ctypes.CDLL) -> None:
    x = shorts(8)
    got = run(library, "spread", x, 64, torch.int16)
    assert torch.equal(got, torch.cat((x.repeat(4), x[:2].repeat(16))))


@pytest.mark.parametrize("n", PARTS)
def test_four_rows_in_blocks(library: ctypes.CDLL, n: int) -> None:
    x = torch.arange(1, 4 * 21 + 1, dtype=torch.uint8)
    got = run(library, f"four{n}", x, 32, torch.int16, 21).view(torch.uint8).view(4, 16)
    expected = torch.zeros(4, 16, dtype=torch.uint8)
    expected[:, :n] = x.view(4, 21)[:, :n]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("n", HALVES)
def test_two_rows_zipped(library: ctypes.CDLL, n: int) -> None:
    x = torch.arange(1, 2 * 37 + 1, dtype=torch.uint8)
    got = run(library, f"zipped{n}", x, 32, torch.int16, 37).view(torch.uint8).view(16, 2, 2)
    expected = torch.zeros(2, 32, dtype=torch.uint8)
    expected[:, :n] = x.view(2, 37)[:, :n]
    assert torch.equal(got, expected.view(2, 16, 2).transpose(0, 1))


def test_nothing_behind_a_row_is_touched(library: ctypes.CDLL) -> None:
    """The last row ends where a page of memory does, and the next page cannot be read."""
    y = torch.empty(32, dtype=torch.int16)
    with unreadable() as end:
        for name, sizes, rows in (("four", PARTS, 4), ("zipped", HALVES, 2)):
            for n in sizes:
                getattr(library, f"{name}{n}")(ctypes.c_void_p(end - rows * n), ctypes.c_void_p(y.data_ptr()), n)
                assert not y.any(), (name, n)


def test_floats_as_whole_numbers_of_one_step(library: ctypes.CDLL) -> None:
    x = torch.randn(48, generator=torch.Generator().manual_seed(1))
    got = run(library, "wholes", x, 65, torch.float32)
    step = x.abs().max() / 32767
    torch.testing.assert_close(got[48], step, rtol=1e-6, atol=0)
    apart = got[:48].view(3, 2, 8).transpose(1, 2).reshape(48)  # even places came first
    assert float((apart * step - x).abs().max()) <= float(step) * 0.51
    assert float(apart.abs().max()) == 32767
    assert torch.equal(got[49:], (x[:16] * 100).round())


@pytest.mark.parametrize(("wrong", "step"), [("nan", "nan"), ("inf", "nan"), ("0", "0")])
def test_the_step_tells_what_no_whole_number_can(library: ctypes.CDLL, wrong: str, step: str) -> None:
    x = torch.zeros(48)
    x[17] = float(wrong)
    got = run(library, "wholes", x, 65, torch.float32)
    torch.testing.assert_close(got[48], torch.tensor(float(step)), equal_nan=True)


def test_products_in_sixteen_bits_are_rounded(library: ctypes.CDLL) -> None:
    x = shorts(64)
    got = run(library, "products", x, 32, torch.int16)
    assert torch.equal(got.int(), (x[:32].int() * x[32:].int() + 2**14) >> 15)


def test_two_vectors_zipped(library: ctypes.CDLL) -> None:
    x = torch.arange(32.0)
    for n in (1, 5, 20, 32):
        got = run(library, "zips", x, 32, torch.float32, n)
        assert torch.equal(got[:n], x.view(2, 16).T.reshape(32)[:n])
        assert torch.equal(got[n:], torch.full((32 - n,), 7.0))
