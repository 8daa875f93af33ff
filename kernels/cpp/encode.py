"""Rows of floats to codes and scales in C++, bit for bit what `codecs.encode` gives in a dozen torch calls."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels import codecs
from kvcompile.kernels.cpp import build, simd
from kvcompile.kernels.cpp.emit.stored import ELEMENTS, Stored, decimal, emitted, table
from kvcompile.kernels.cpp.emit.text import fill
from kvcompile.kernels.pointers import address, opaque
from kvcompile.plan.formats import Float, Table
from kvcompile.plan.storage import Codec

TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
SMALL = 1 << 15  # numbers below which one thread is faster than two
BLOCK = 16  # tokens that are encoded together where each has its own scales

SOURCE = """
    // Encode entries of $dim channels to $name, decoded by code * scale$plus_zero.
    typedef $input In;
    constexpr int D = $dim, WIDTH = $width;  // channels, stored elements of an entry
    constexpr int TOKENS = $tokens;  // entries of a task
    constexpr int GROUPS = $groups;  // numbers that share a scale are a group: those of a task, in whole vectors
    #define UNROLL _Pragma("GCC unroll 16")

    // Scales are rounded to float16 before anything is encoded, so that decoding uses the very same numbers.
    struct Numbers {
      alignas(64) float $extremes, scale[GROUPS]$wide_zeros;
      fp16 scales[GROUPS]$zeros;
    };
    KV_INLINE void settle(Numbers& n) {
      for (int i = 0; i < GROUPS; i += 16) {
        $round
        store(n.scales + i, s);
        s = load(n.scales + i);
        store(n.scale + i, if_less(zero(), s, s, set(1.0f)));
      }
    }

    $nearest
    static void encode(const In* x, $element* codes, fp16* scales, int count) {
      Numbers n = {};
      $measure
      settle(n);
      $keep
      for (int t = 0; t < count; t++)
        UNROLL for (int c = 0; c < $runs; c++) {
          $codes
        }
    }
    """

ENTRY = """
    extern "C" void encode_rows(const In* x, $element* codes, fp16* scales, int64_t tokens, int threads) {
    #pragma omp parallel for num_threads(threads)
      for (int64_t t = 0; t < tokens; t += TOKENS) {
        int count = (int)(tokens - t < TOKENS ? tokens - t : TOKENS);
        encode(x + t * D, codes + t * WIDTH, scales + $place, count);
      }
    }
    """

NEAREST = """
    // The number of borders between levels that lie below: the code of the nearest level
    static const float borders[] = {
      $borders
    };
    KV_INLINE U nearest(F x) {
      F below = zero();
      UNROLL for (int i = 0; i < $count; i++) below += if_less(set(borders[i]), x, set(1.0f), zero());
      return round_to_code(below, $count);
    }

    """

# between the least and the most, or up to the largest magnitude (float8 has a sign)
ROUND = {
    True: """
        F low = load(n.low + i);
        store(n.zeros + i, low);
        F z = load(n.zeros + i), s = (load(n.high + i) - z) / set($levels);
        store(n.zero + i, z);
        """,
    False: "F s = load(n.high + i) / set($levels);",
}

CHANNELS = """
    for (int c = 0; c < D; c += $lanes) {
      F y = load(x + c$count);
      F $first;
      for (int t = 1; t < count; t++) {
        y = load(x + t * D + c$count);
        $more
      }
      $store
    }
    """

TOKENS = """
    for (int i = 0; i < count * $groups; i++) {
      F y = load(x + i * $group$count);
      F $first;
      for (int c = $lanes; c < $group; c += $lanes) {
        y = load(x + i * $group + c$count);
        $more
      }
      $store
    }
    """

KEEP_TOKENS = """
    for (int t = 0; t < count; t++)
      for (int g = 0; g < $groups; g++) {
        scales[t * $numbers + g] = n.scales[t * $groups + g];
        $zero
      }
    """


@opaque
def encode(x: Tensor, codec: Codec) -> tuple[Tensor, Tensor | None]:
    """Same contract as `codecs.encode`, which also does what C++ is not here for (other devices, no compiler)."""
    if x.device.type != "cpu" or x.dtype not in TYPES or not emitted(codec) or not codec.scaled or not x.numel():
        return codecs.encode(x, codec)
    dim = x.shape[-1]
    run = _kernel(codec, dim, x.dtype)
    if run is None:
        return codecs.encode(x, codec)
    stored = Stored(codec, dim)
    rows = x.detach().contiguous()
    codes = torch.empty(*x.shape[:-1], stored.width, dtype=codecs.dtype_of(codec), device=x.device)
    shape = (*x.shape[:-1], codec.parameters, codec.groups(dim))
    if codec.axis == "channel":
        if x.shape[-2] % codec.group:
            raise KvcompileError("tokens are encoded in whole groups", f"{x.shape[-2]} tokens as {codec.name}")
        shape = (*x.shape[:-2], x.shape[-2] // codec.group, codec.parameters, dim)
    scales = torch.empty(shape, dtype=torch.float16, device=x.device)
    threads = torch.get_num_threads() if x.numel() > SMALL else 1
    run(address("rows", rows, x.dtype, x.shape), codes.data_ptr(), scales.data_ptr(), x.numel() // dim, threads)
    return codes, scales


@lru_cache(maxsize=256)
def _kernel(codec: Codec, dim: int, dtype: torch.dtype) -> Callable[..., Any] | None:
    if build.available():
        return None
    function: Any = build.load(simd.prelude() + source(codec, dim, TYPES[dtype]), "encode").encode_rows
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    function.restype = None
    return function  # type: ignore[no-any-return]


def source(codec: Codec, dim: int, dtype: str) -> str:
    """C++ text for entries of `dim` channels of a dtype, prelude excluded."""
    stored = Stored(codec, dim)
    place = f"t / TOKENS * {codec.parameters} * D" if codec.axis == "channel" else f"t * {stored.numbers}"
    return f"{body(codec, dim, dtype)}\n{fill(ENTRY, element=stored.element, place=place)}"


def body(codec: Codec, dim: int, dtype: str) -> str:
    """The text of `encode`: so many entries that lie one after the other, at most `BLOCK`."""
    stored = Stored(codec, dim)
    channel, zeros = codec.axis == "channel", stored.zeros
    levels = f"{2**codec.bits - 1}.0f" if zeros else f"{_largest(codec)}f"
    tokens, groups = (codec.group, dim) if channel else (BLOCK, BLOCK * codec.groups(dim))
    return fill(
        SOURCE,
        dim=dim,
        name=codec.name,
        plus_zero=" + zero" if zeros else "",
        input=ELEMENTS[dtype],
        width=stored.width,
        tokens=tokens,
        groups=(groups + 31) // 16 * 16,
        extremes="low[GROUPS], high[GROUPS]" if zeros else "high[GROUPS]",
        wide_zeros=", zero[GROUPS]" if zeros else "",
        zeros=", zeros[GROUPS]" if zeros else "",
        round=fill(ROUND[zeros], levels=levels),
        element=stored.element,
        nearest=_nearest(codec),
        measure=_measure(stored),
        keep=_keep(stored),
        runs=stored.runs,
        codes=_codes(stored),
    )


def _largest(codec: Codec) -> float:
    """The largest number that a code stands for, where groups have a scale alone."""
    format = codec.format
    if not isinstance(format, (Float, Table)):
        raise RuntimeError(f"groups of {codec.name} have more than a scale")
    return format.largest


def _nearest(codec: Codec) -> str:
    """What takes a number to its code, where codes are looked up in a table."""
    levels = table(codec)
    if levels is None:
        return ""
    borders = levels.borders
    return fill(NEAREST, borders=", ".join(map(decimal, borders)), count=len(borders))


def _measure(stored: Stored) -> str:
    """The least and the most of each group, or the largest magnitude."""
    channel = stored.codec.axis == "channel"
    group = stored.dim if channel else stored.codec.group or stored.dim
    lanes = max(n for n in range(1, 17) if group % n == 0)
    size = "max(y, zero() - y)"
    first, more = "low = y, high = y", "low = min(low, y), high = max(high, y);"
    if not stored.zeros:
        first, more = f"high = {size}", f"high = max(high, {size});"
    ends = [("low", "smallest", "INFINITY"), ("high", "largest", "-INFINITY")][0 if stored.zeros else 1 :]
    if channel:
        store = [f"store(n.{name} + c, {name});" for name, *_ in ends]
    elif lanes == 16:
        store = [f"n.{name}[i] = {fold}({name});" for name, fold, _ in ends]
    else:
        store = [f"n.{name}[i] = {fold}(keep({name}, {lanes}, {other}));" for name, fold, other in ends]
    return fill(
        CHANNELS if channel else TOKENS,
        lanes=lanes,
        count="" if lanes == 16 else f", {lanes}",
        groups=stored.codec.groups(stored.dim),
        group=group,
        first=first,
        more=more,
        store="\n".join(store),
    )


def _keep(stored: Stored) -> str:
    """Scales and zeros to where `layout` says."""
    if stored.codec.axis == "channel":
        zeros = ["memcpy(scales + D, n.zeros, D * sizeof(fp16));"] if stored.zeros else []
        return "\n".join(["memcpy(scales, n.scales, D * sizeof(fp16));", *zeros])
    groups = stored.codec.groups(stored.dim)
    zero = f"scales[t * {stored.numbers} + {groups} + g] = n.zeros[t * {groups} + g];" if stored.zeros else ""
    return fill(KEEP_TOKENS, groups=groups, numbers=stored.numbers, zero=zero)


def _codes(stored: Stored) -> str:
    """One run of stored elements: the codes of its pieces, packed."""
    count = "" if stored.lanes == 16 else f", {stored.lanes}"
    lines = []
    for i in range(stored.pieces):
        place = stored.channel(i, "c")
        if stored.codec.axis == "channel":
            scale, zero = f"load(n.scale + {place})", f"load(n.zero + {place})"
        else:
            groups = stored.codec.groups(stored.dim)
            group = f"t * {groups} + ({place}) / {stored.codec.group or stored.dim}"
            scale, zero = f"set(n.scale[{group}])", f"set(n.zero[{group}])"
        x = f"load(x + t * D + {place}{count})"
        lines.append(f"F y{i} = ({x} - {zero}) / {scale};" if stored.zeros else f"F y{i} = {x} / {scale};")
    to = f"codes + t * WIDTH + c * {stored.lanes}"
    bits, tables = stored.codec.bits, table(stored.codec)
    if not stored.zeros and not tables:
        most = f"set({_largest(stored.codec)}f)"
        return "\n".join([*lines, f"store({to}, max(min(y0, {most}), zero() - {most}){count});"])
    codes = [f"nearest(y{i})" if tables else f"round_to_code(y{i}, {2**bits - 1})" for i in range(stored.pieces)]
    packed = " | ".join(f"({code} << {i * bits})" if i else code for i, code in enumerate(codes))
    return "\n".join([*lines, f"store_bytes({to}, {packed}{count});"])
