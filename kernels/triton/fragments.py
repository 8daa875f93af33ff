"""The pieces that generated attention kernels are composed of; each file of a kernel holds copies of those it uses.

Shapes inside a kernel: M query rows (token x query head of the group), N entries of one tile, C channels of one block.
Scores are `[M, N]`, keys lie as `[C, N]`, values as `[N, C]`. Scales are never multiplied into a tile of codes where
they can be folded into the small operand: per-channel scales of keys go into q, per-token scales of values into p.
All logarithms are base 2. A score that must not count is HIDDEN: finite, so that no difference of two scores is NaN.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1e30)  # the score of an entry that is not seen
FLOOR = tl.constexpr(-5e29)  # the running maximum before anything was seen: exp2(HIDDEN - FLOOR) is 0, not 1
LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(1073741824)  # the position of an entry that does not exist: after every query


@triton.jit
def share(n, split, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """Entries start : stop of one split of a part with n entries; splits are whole tiles."""
    step = tl.cdiv(tl.cdiv(n, SPLITS), TILE) * TILE
    return split * step, tl.minimum(split * step + step, n)


@triton.jit
def paged_entries(table, j, ok, PAGE: tl.constexpr):
    """Where entries j of a row lie in the pools, when a tile may cross pages: `[N]`."""
    page = tl.load(table + j // PAGE, mask=ok, other=0)
    return page.to(tl.int64) * PAGE + j % PAGE


@triton.jit
def page_start(table, j, PAGE: tl.constexpr):
    """Where entry j (the first of a tile that lies in one page) lies in the pools: a scalar."""
    return tl.load(table + j // PAGE).to(tl.int64) * PAGE + j % PAGE


@triton.jit
def first_after(positions, n, limit):
    """How many of n ascending positions are at most `limit`, by bisection."""
    low = n * 0
    high = n
    while low < high:
        middle = (low + high) // 2
        before = tl.load(positions + middle) <= limit
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def first_after_paged(positions, table, n, limit, PAGE: tl.constexpr):
    """`first_after` over a row in pages."""
    low = n * 0
    high = n
    while low < high:
        middle = (low + high) // 2
        before = tl.load(positions + page_start(table, middle, PAGE)) <= limit
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def query_block(queries, offset, real, FIRST: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Channels FIRST : FIRST + WIDTH of the queries at `offset [M]`, zeros up to WIDE: `[M, C]`."""
    c = tl.arange(0, WIDE)
    inside = real[:, None]
    if WIDTH < WIDE:
        inside = inside & (c < WIDTH)[None, :]
    return tl.load(queries + offset[:, None] + (FIRST + c)[None, :], mask=inside, other=0)


@triton.jit
def key_block(keys, entry, stride, ok, FIRST: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Stored elements FIRST : FIRST + WIDTH of the keys at `entry [N]`, as columns: `[C, N]`; zeros elsewhere."""
    c = tl.arange(0, WIDE)
    inside = ok[None, :]
    if WIDTH < WIDE:
        inside = inside & (c < WIDTH)[:, None]
    return tl.load(keys + entry[None, :] * stride + (FIRST + c)[:, None], mask=inside, other=0)


@triton.jit
def value_block(values, entry, stride, ok, FIRST: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Stored elements FIRST : FIRST + WIDTH of the values at `entry [N]`, as rows: `[N, C]`; zeros elsewhere."""
    c = tl.arange(0, WIDE)
    inside = ok[:, None]
    if WIDTH < WIDE:
        inside = inside & (c < WIDTH)[None, :]
    return tl.load(values + entry[:, None] * stride + (FIRST + c)[None, :], mask=inside, other=0)


@triton.jit
def unpacked(packed, PIECE: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):
    """Codes of piece PIECE of split-part packed bytes (lowest bits first), as numbers."""
    return ((packed >> (PIECE * BITS)) & ((1 << BITS) - 1)).to(TYPE)


@triton.jit
def e4m3(bits, TYPE: tl.constexpr):
    """float8 e4m3 from its bits on any device: shifted into a float16 the exponent is 8 too low, hence the 256."""
    wide = bits.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return (half.to(tl.float16, bitcast=True) * 256.0).to(TYPE)


@triton.jit
def token_numbers(scales, entry, ok, PER_TOKEN: tl.constexpr, AT: tl.constexpr):
    """Number AT of the PER_TOKEN scales and zeros of each entry: `[N]`, float32."""
    return tl.load(scales + entry * PER_TOKEN + AT, mask=ok, other=0).to(tl.float32)


@triton.jit
def channel_numbers(scales, AT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """WIDTH scales or zeros of one group of tokens from AT on, zeros up to WIDE: `[C]`, float32."""
    c = tl.arange(0, WIDE)
    return tl.load(scales + AT + c, mask=c < WIDTH, other=0).to(tl.float32)


@triton.jit
def spread_numbers(
    scales, group, ok, PER_GROUP: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr
):
    """`channel_numbers` where every entry has a group of its own, `group [N]`: `[N, C]`, float32."""
    c = tl.arange(0, WIDE)
    inside = ok[:, None] & (c < WIDTH)[None, :]
    return tl.load(scales + group[:, None] * PER_GROUP + (AT + c)[None, :], mask=inside, other=0).to(tl.float32)


@triton.jit
def scores(q, keys):
    """q . k: `[M, N]`, summed in float32."""
    return tl.dot(q, keys, input_precision="ieee")


@triton.jit
def channel_scores(q, codes, scale):
    """q . (codes * scale) with the scale of each channel folded into q."""
    folded = q.to(tl.float32) * scale[None, :]
    return tl.dot(folded.to(codes.dtype), codes, input_precision="ieee")


@triton.jit
def channel_offset(q, zero):
    """q . zero, what the zeros of the channels add to every score of a tile: `[M, 1]`."""
    return tl.sum(q.to(tl.float32) * zero[None, :], 1)[:, None]


@triton.jit
def softcapped(s, CAP: tl.constexpr):
    """CAP * tanh(s / CAP), without overflow for any s."""
    return CAP - 2.0 * CAP / (tl.exp2(tl.minimum(s * (2.0 / CAP * LOG2E), 100.0)) + 1.0)


@triton.jit
def softmax_step(s, top, total):
    """Online softmax: the new maximum, the new sum, the weights of this tile, and what earlier sums fade by."""
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - higher[:, None])
    fade = tl.exp2(top - higher)
    return higher, total * fade + tl.sum(p, 1), p, fade


@triton.jit
def distances(outputs, row, real, values, entry, stride, ok, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """|v - o|^2 of the values at `entry [N]` and the outputs at `row [M]`: `[M, N]`, WIDE channels at a time.

    Not |v|^2 - 2 v o + |o|^2: where o is near v, little would be left of it.
    """
    far = tl.zeros([row.shape[0], entry.shape[0]], tl.float32)
    for first in range(0, WIDTH, WIDE):
        c = first + tl.arange(0, WIDE)
        here = (c < WIDTH)[None, :]
        o = tl.load(outputs + row[:, None] * WIDTH + c[None, :], mask=real[:, None] & here, other=0)
        v = tl.load(values + entry[:, None] * stride + c[None, :], mask=ok[:, None] & here, other=0).to(tl.float32)
        apart = o[:, None, :] - v[None, :, :]
        far += tl.sum(apart * apart, 2)
    return far


@triton.jit
def accumulate(p, values, acc):
    """acc + p v."""
    return tl.dot(p.to(values.dtype), values, acc, input_precision="ieee")


@triton.jit
def token_accumulate(p, codes, scale, acc):
    """acc + p (codes * scale) with the scale of each token folded into p.

    Small scales would push small weights below what float16 holds, so the largest of the tile stays outside.
    """
    peak = tl.maximum(tl.max(scale, 0), 1e-30)
    folded = p * (scale / peak)[None, :]
    return acc + peak * tl.dot(folded.to(codes.dtype), codes, input_precision="ieee")


@triton.jit
def channel_accumulate(p, codes, scale, acc):
    """acc + (p codes) * scale, the scale of each channel after the product."""
    return acc + scale[None, :] * tl.dot(p.to(codes.dtype), codes, input_precision="ieee")


@triton.jit
def mean_of(acc, total):
    """acc / total, and zeros for rows that saw nothing."""
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def log_sum(top, total):
    """log2 of the sum of exp2(scores); HIDDEN for rows that saw nothing."""
    return tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), HIDDEN)


@triton.jit
def merge(mid, lse, out, merged, count, G: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr):
    """Results `mid [R, count * G, SPLITS, DIM]` of splits, weighted by their log-sum-exp `lse`, as one.

    Grid (count * G, R). Every weight is at most 1, so no sum overflows; a split that saw nothing weighs 0.
    """
    m = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    first = (row * count * G + m) * SPLITS
    split = tl.arange(0, triton.next_power_of_2(SPLITS))
    c = tl.arange(0, WIDE)
    logs = tl.load(lse + first + split, mask=split < SPLITS, other=HIDDEN)
    top = tl.max(logs, 0)
    weights = tl.where(logs > FLOOR, tl.exp2(logs - top), 0.0)
    total = tl.sum(weights, 0)
    inside = (split < SPLITS)[:, None] & (c < DIM)[None, :]
    parts = tl.load(mid + (first + split)[:, None] * DIM + c[None, :], mask=inside, other=0)
    mean = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    place = (row * G + m % G) * count + m // G
    tl.store(out + place * DIM + c, mean.to(out.dtype.element_ty), mask=c < DIM)
    whole = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), HIDDEN)
    tl.store(merged + row * count * G + m, whole)


@triton.jit
def inside(ok, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Which places of a block `[N, C]` are real: tokens that are `ok`, channels below WIDTH."""
    return ok[:, None] & (tl.arange(0, WIDE) < WIDTH)[None, :]


@triton.jit
def store_block(target, entry, stride, ok, FIRST: tl.constexpr, WIDTH: tl.constexpr, block):
    """Write `block [N, C]` to stored elements FIRST : FIRST + WIDTH of the entries at `entry [N]`."""
    c = tl.arange(0, block.shape[1])
    there = ok[:, None] & (c < WIDTH)[None, :]
    tl.store(target + entry[:, None] * stride + (FIRST + c)[None, :], block, mask=there)


@triton.jit
def affine(low, high, LEVELS: tl.constexpr):
    """Scale and zero of groups between low and high, rounded to float16 and back: what decoding will use."""
    zero = low.to(tl.float16).to(tl.float32)
    return tl.div_rn(high - zero, tl.full(high.shape, LEVELS, tl.float32)).to(tl.float16).to(tl.float32), zero


@triton.jit
def float_scale(high):
    """Scale that brings the largest magnitude to 448, the largest of e4m3, rounded to float16 and back."""
    return tl.div_rn(high, tl.full(high.shape, 448.0, tl.float32)).to(tl.float16).to(tl.float32)


@triton.jit
def half_even(x):
    """x rounded to an integer, halves to even, for |x| < 2^22: the addition leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantised(x, scale, zero, LEVELS: tl.constexpr):
    """Codes of x, uint8; a constant group has scale 0 and codes 0."""
    steps = tl.div_rn(x - zero, tl.broadcast_to(tl.where(scale > 0, scale, 1.0), x.shape))
    bounded = tl.minimum(tl.maximum(steps, -1.0), LEVELS + 1.0)
    return tl.minimum(tl.maximum(half_even(bounded), 0.0), LEVELS * 1.0).to(tl.uint8)


@triton.jit
def to_e4m3_bits(x):
    """Bits of x as float8 e4m3, |x| <= 448, rounded half to even in integers: the same on any device."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # 20 bits off the mantissa, bias 127 to 7
    tiny = half_even(tl.abs(x) * 512.0).to(tl.int32)  # below 2^-6 codes are multiples of 2^-9
    code = tl.where(size < 0x3C800000, tiny, normal)  # 2^-6
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def to_e4m3(x, scale):
    """Bits of x / scale as float8 e4m3; a group of zeros has scale 0."""
    steps = tl.div_rn(x, tl.broadcast_to(tl.where(scale > 0, scale, 1.0), x.shape))
    return to_e4m3_bits(tl.minimum(tl.maximum(steps, -448.0), 448.0))
