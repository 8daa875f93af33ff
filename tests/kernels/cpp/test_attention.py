"""The generated C++ kernels compute what the float64 reference specifies, for any layout, format and shape."""

from __future__ import annotations

import ctypes
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels import layout, reference, sdpa
from kvcompile.kernels.cpp import backend, build, simd
from kvcompile.kernels.dispatch import serving
from kvcompile.kernels.spec import KernelSpec, Part, plain
from kvcompile.plan.storage import Codec

sys.path.insert(0, str(Path(__file__).parent.parent))

from quantized import Quantized, case, poison

pytestmark = pytest.mark.skipif(build.available() is not None, reason="no C++ compiler here")

# Relative RMS of all outputs. float32: sums of some hundred products in another order, 2^x to 2.5 ulp, and with
# soft-cap tanh's error times the cap. 16 bits: the result is rounded once, 2^-12 and 2^-9 at most.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
# sum p * code and sum p * zero are summed apart: numbers of about 4 leave a mean of 0.03, seven bits are lost
ENCODED = 2e-5
# queries and weights are rounded to 16 bits before they meet whole numbers: 2^-16 of the largest, an eighth of which is
# typical, against sums from which two bits cancel
WHOLE = 4e-4

FLOAT, HALF, BRAIN, EIGHT = (Codec(k) for k in ("float32", "float16", "bfloat16", "float8"))
KIVI4 = Codec("int4", "channel", 32), Codec("int4", "token", 32)


def spec(*parts: tuple, group: int = 3, dim: int = 64, value_dim: int | None = None, **options) -> KernelSpec:
    made = tuple(Part(layout, key, value, *page) for layout, key, value, *page in parts)
    return KernelSpec(made, group, dim, value_dim or dim, dim**-0.5, **options)


SPECS = [
    spec(("dense", FLOAT, FLOAT)),
    spec(("ragged", FLOAT, FLOAT), group=4, dim=128),
    spec(("paged", FLOAT, FLOAT, 16), sliding_window=50, sink=True),
    spec(("ragged", BRAIN, BRAIN), group=8, dim=80, softcap=3.0),
    spec(("paged", HALF, BRAIN, 7), group=1, dim=96, value_dim=64, sliding_window=9, scores=True),
    spec(("dense", EIGHT, HALF), group=2, dim=256),
    spec(("ragged", *KIVI4), ("ragged", FLOAT, FLOAT), scores=True),
    spec(("paged", *KIVI4, 32), ("dense", BRAIN, BRAIN), group=4, dim=128, sliding_window=70),
    spec(("dense", Codec("int8", "token"), Codec("int8", "token")), group=5, softcap=2.0, scores=True),
    spec(
        ("ragged", Codec("int8", "channel", 5), Codec("int8", "channel", 10)), ("ragged", FLOAT, HALF), group=2, dim=12
    ),
    spec(("paged", Codec("int2", "token"), Codec("int2", "token"), 5), group=6, dim=80, value_dim=96),
    spec(("ragged", Codec("int4", "token", 16), Codec("int2", "channel", 32)), ("paged", FLOAT, FLOAT, 1), dim=80),
    spec(("ragged", Codec("float8", "channel", 16), Codec("float8", "token", 16)), ("ragged", FLOAT, FLOAT), group=1),
    spec(("ragged", Codec("int8", "channel", 32), KIVI4[1]), ("ragged", *KIVI4), ("dense", FLOAT, FLOAT), group=7),
    # pages of whole tiles and more: a tile ends where its page does, wherever a window begins
    spec(("paged", FLOAT, FLOAT, 64), sliding_window=50, sink=True, scores=True),
    spec(("paged", *KIVI4, 128), ("dense", FLOAT, FLOAT), sliding_window=300, scores=True),
    spec(("paged", Codec("int8", "token"), Codec("int4", "token", 16), 80), ("paged", HALF, HALF, 16), group=4),
    # groups of channels for keys too, and whole numbers in runs that no register fits
    spec(("paged", Codec("int8", "token", 32), Codec("int4", "token", 32), 16), ("ragged", FLOAT, FLOAT), dim=128),
    spec(("ragged", Codec("int4", "token", 20), Codec("int2", "token", 40)), group=5, dim=80, scores=True),
    # codes that stand for the levels of a table, in every layout and with every axis of scales
    spec(("ragged", Codec("nf4", "token", 64), Codec("nf4", "token", 64)), ("ragged", FLOAT, FLOAT), group=4, dim=128),
    spec(("paged", Codec("nf4", "token", 16), Codec("nf4", "token", 16), 5), group=2, dim=80, scores=True),
    spec(("dense", Codec("nf4", "channel", 32), Codec("nf4", "channel", 16)), dim=12, value_dim=96, softcap=2.0),
    spec(("paged", Codec("nf4", "token"), KIVI4[1], 64), ("dense", BRAIN, BRAIN), sliding_window=70),
    spec(
        ("dense", FLOAT, FLOAT), group=33, dim=5, value_dim=16, sliding_window=20, sink=True, softcap=1.5, scores=True
    ),
]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """All kernels of this file, two compilers at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(lambda s: backend._kernel(s[0], torch.float32, s[1]).run, [(s, m) for s in SPECS for m in (0, 1)])
        )


def error(got: Tensor, expected: Tensor) -> float:
    """RMS of the difference relative to that of what was expected."""
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def check(one: KernelSpec, lengths: list[list[int]], batch: int, heads: int, **options) -> None:
    made = case(one, lengths, batch, heads, **options)
    longest = max(map(sum, zip(*lengths, strict=True))) + 80
    sums = [torch.ones(batch * heads, longest) if one.scores else None for _ in range(2)]
    got = backend.attend(made.queries, made.view, one, sums[0])
    expected = reference.attend(made.queries, made.view, one, sums[1])
    assert got.dtype == made.queries.states.dtype
    assert bool(got.isfinite().all())
    codecs = [codec for p in one.parts for codec in (p.key, p.value) if codec.scaled]
    whole = made.queries.states.shape[2] == 1 and any(c.kind != "float8" for c in codecs)
    quantized = WHOLE if whole else ENCODED if codecs else 0.0
    assert error(got, expected) < max(quantized, TOLERANCE[got.dtype])
    if one.scores:
        assert error(sums[0], sums[1]) < max(quantized, TOLERANCE[torch.float32])


@pytest.mark.parametrize("one", SPECS, ids=lambda s: s.name)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 3), heads=st.integers(1, 3), seed=st.integers(0, 999))
def test_decode_step(one: KernelSpec, data, batch: int, heads: int, seed: int) -> None:
    length = st.integers(0, 40) | st.integers(41, 700) | st.sampled_from([1, 63, 64, 65, 511, 512, 513, 1024, 1025])
    lengths = []
    for part in one.parts:
        rows = batch * heads
        lengths.append(
            [data.draw(length)] * rows if part.layout == "dense" else [data.draw(length) for _ in range(rows)]
        )
    check(one, lengths, batch, heads, seed=seed)


@pytest.mark.parametrize("one", SPECS, ids=lambda s: s.name)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 2), heads=st.integers(1, 2), seed=st.integers(0, 999))
def test_several_new_tokens(one: KernelSpec, data, batch: int, heads: int, seed: int) -> None:
    """Causal by true positions, with history and without, padded or not."""
    count = data.draw(st.sampled_from([2, 3, 16, 17, 33, 70]))
    length = st.integers(0, 40) | st.sampled_from([63, 64, 65, 300])
    dense = any(p.layout == "dense" for p in one.parts)
    valid = None
    if not dense and data.draw(st.booleans()):
        real = data.draw(st.lists(st.integers(1, count), min_size=batch, max_size=batch))
        left = data.draw(st.booleans())
        valid = torch.arange(count).expand(batch, -1) < torch.tensor(real).unsqueeze(1)
        valid = valid.flip(1) if left else valid
    lengths = []
    for part in one.parts:
        rows = batch * heads
        lengths.append(
            [data.draw(length)] * rows if part.layout == "dense" else [data.draw(length) for _ in range(rows)]
        )
    check(one, lengths, batch, heads, seed=seed, count=count, valid=valid)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("one", SPECS, ids=lambda s: s.name)
def test_a_chunk_over_a_long_history(one: KernelSpec, padding: str) -> None:
    """Many tiles of entries and several blocks of queries; a sequence of the batch may get padding alone."""
    count, batch, heads = 90, 3, 1
    dense = any(p.layout == "dense" for p in one.parts)
    if dense and padding != "none":
        pytest.skip("a dense layer has no padding")
    valid = None
    if padding != "none":
        valid = torch.arange(count).expand(batch, -1) < torch.tensor([[count], [0], [37]])
        valid = valid.flip(1) if padding == "left" else valid
    lengths = [[1200, 1200, 1200] if p.layout == "dense" else [1200, 640, 33] for p in one.parts]
    check(one, lengths, batch, heads, seed=7, count=count, valid=valid)


COMBINED = [
    replace(SPECS[6], sliding_window=130, sink=True, softcap=2.0, scores=False),
    replace(SPECS[11], sliding_window=40, softcap=3.0),
    replace(SPECS[12], sliding_window=200, softcap=2.0, scores=True),
]


@pytest.mark.parametrize("one", COMBINED, ids=lambda s: s.name)
def test_a_chunk_over_codes_under_a_window_and_a_soft_cap(one: KernelSpec) -> None:
    """The window begins in one part and ends in another, or leaves a whole part behind."""
    for new in (2, 65):
        for lengths in ([[96, 0, 320, 32]] * 2, [[32, 640, 64, 0], [70, 100, 300, 9]]):
            check(one, lengths, 2, 2, seed=new, count=new)
            padded = torch.arange(new).expand(2, -1) >= torch.tensor([[0], [new // 2]])
            check(one, lengths, 2, 2, seed=new, count=new, valid=padded)


def added(one: KernelSpec, made: Quantized, width: int) -> list[Tensor]:
    """Column sums of a case by the kernel that reads no values, and by the reference."""
    sums = [torch.full((4, width), 0.5) for _ in range(2)]
    reference.attend(made.queries, made.view, one, sums[1])
    for segment in layout.parts(made.view):
        for unread in (segment.values, segment.value_scales):
            if unread is not None:
                poison(unread)
    backend.column_sums(made.queries, made.view, one, sums[0])
    return sums


@pytest.mark.parametrize("place", [1, 4, 6, 15, 17])
def test_column_sums_without_values(place: int) -> None:
    """Causal inside the window of queries, over several blocks of them, with padding and without; values are NaN."""
    one = replace(SPECS[place], scores=True)
    dense = any(p.layout == "dense" for p in one.parts)
    for count, lengths in ((1, [64, 70, 3, 0]), (7, [300, 41, 640, 65]), (33, [128] * 4)):
        rows = [[lengths[0]] * 4 if p.layout == "dense" else lengths for p in one.parts]
        for valid in (None, torch.arange(count).expand(2, -1) >= torch.tensor([[0], [count // 2]])):
            if dense and valid is not None:
                continue
            made = case(one, rows, 2, 2, seed=count, count=count, valid=valid)
            quantized = any(p.key.scaled for p in one.parts)
            assert error(*added(one, made, sum(map(max, rows)) + 80)) < (ENCODED if quantized else 3e-6)
    text = backend.source(one, torch.float32, True, False)
    assert text == backend.source(replace(one), torch.float32, True, False)
    for absent in ("decoded_values", "tile.value_", "value_numbers", "out_token", "attend_chunk", "b.sum", "finish"):
        assert absent not in text, absent


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86")
@pytest.mark.parametrize(
    ("place", "flag"),
    [
        (6, "-march=haswell"),
        (11, "-march=x86-64"),
        (19, "-march=haswell"),
        (20, "-march=haswell"),
        (20, "-march=x86-64"),
    ],
)
def test_other_vectors(place: int, flag: str) -> None:
    """AVX2 and plain vector code take the same way through the same text."""
    one = SPECS[place]
    made = case(one, [[160, 32, 700, 64]] * len(one.parts), 2, 2, count=1)
    several = case(one, [[160, 32, 96, 64]] * len(one.parts), 2, 2, count=19)
    for many, kind, asked in ((False, backend.Step, made), (True, backend.Chunk, several)):
        kernel = kind(one, torch.float32)
        text = simd.prelude() + backend.source(one, torch.float32, many)
        function = getattr(build.load(text, "attend-flags", (flag,)), "attend_chunk" if many else "attend_step")
        function.argtypes, function.restype = (ctypes.c_char_p,), None
        kernel.__dict__["run"] = function
        sums = [torch.zeros(4, 2000) for _ in range(2)]
        expected = reference.attend(asked.queries, asked.view, one, sums[1] if one.scores else None)
        limit = ENCODED if many else WHOLE
        assert error(kernel(asked.queries, asked.view, sums[0]), expected) < limit
        assert error(*sums) < limit


def test_a_whole_prompt_over_plain_floats_is_for_sdpa() -> None:
    one = SPECS[0]
    made = case(one, [[40] * 4], 2, 2, count=40)
    assert torch.equal(backend.attend(made.queries, made.view, one), sdpa.attend(made.queries, made.view, one))


@pytest.mark.parametrize("dim", [64, 256, 1056])
@pytest.mark.parametrize(("kind", "numbers"), [("int8", (1 / 255, 0.0)), ("nf4", (1.0,))])
def test_sums_of_the_largest_codes_fit(kind: str, numbers: tuple[float, ...], dim: int) -> None:
    """Bytes of 255 against a query of equal channels and weights of equal entries: what 32 bits must hold."""
    codec, shape = Codec(kind, "token"), (1, 1, 192, len(numbers), 1)
    one = KernelSpec((Part("dense", codec, codec),), 1, dim, dim, 1 / dim)
    codes = torch.full((1, 1, 192, codec.width(dim)), 255, dtype=torch.uint8)
    codes[:, :, 96:] = 0  # logits far below the others, unless those went beyond
    scales = torch.tensor(numbers).half().view(1, 1, 1, -1, 1).expand(shape).contiguous()
    view = layout.DenseView(codes, codes, torch.arange(192).int().view(1, 1, -1), scales, scales)
    queries = layout.Queries(torch.full((1, 1, 1, dim), 7.0), torch.tensor([[191]]))
    assert error(backend.attend(queries, view, one), reference.attend(queries, view, one)) < ENCODED


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (Codec("int4", "token", 32), KIVI4[1]),
        KIVI4,
        (FLOAT, KIVI4[1]),
        (Codec("nf4", "token", 32), Codec("nf4", "token", 32)),
        (Codec("nf4", "channel", 32), FLOAT),
    ],
    ids=lambda c: c.name,
)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(key: Codec, value: Codec, wrong: float) -> None:
    """A query that holds NaN or infinity gives NaN, and nobody's zeros; other heads keep what they had."""
    one = spec(("ragged", key, value))
    made = case(one, [[64, 96]], 1, 2)
    sound = backend.attend(made.queries, made.view, one)
    made.queries.states[0, 1, 0, 5] = wrong
    got = backend.attend(made.queries, made.view, one)
    assert bool(got[0, 1].isnan().all())
    others = [0, 2, 3, 4, 5]
    assert torch.equal(got[0, others], sound[0, others])


def test_an_entry_that_is_no_number_is_not_summed_as_one() -> None:
    """Weights of one entry alone are NaN: whole numbers cannot say so, their step does."""
    codec = Codec("nf4", "token", 32)
    made = case(spec(("ragged", codec, codec)), [[64, 96]], 1, 2)
    made.view.key_scales[made.view.starts[0] + 5] = float("nan")
    got = backend.attend(made.queries, made.view, made.spec)
    assert bool(got[0, :3].isnan().all())
    assert bool(got[0, 3:].isfinite().all())


def test_float64_is_refused_and_the_library_attends_instead() -> None:
    made = case(SPECS[0], [[40] * 4], 2, 2)
    wide = replace(made.queries, states=made.queries.states.double())
    view = replace(made.view, keys=made.view.keys.double(), values=made.view.values.double())
    double = replace(made.spec, parts=plain("dense", "float64"))
    expected = reference.attend(wide, view, double)
    assert error(serving(backend.CPP, double, torch.float64).attend(wide, view, double), expected) < 1e-12
    with pytest.raises(KvcompileError, match=r"kernels=cpp has no kernel for dense-float64.*float64"):
        backend.attend(wide, view, double)


def test_threads_share_one_kernel() -> None:
    """Each thread's calls have scratch of their own, whatever the others do meanwhile."""
    one = replace(SPECS[6], scale=0.1)  # built here, by whoever comes first
    made = [case(one, [[64 * i, 32, 96, 700], [10, 300, 30, i]], 2, 2, seed=i) for i in range(1, 5)]
    expected = [reference.attend(c.queries, c.view, one, torch.zeros(4, 900)) for c in made]

    def run(i: int) -> float:
        worst = 0.0
        for _ in range(20):
            got = backend.attend(made[i].queries, made[i].view, one, torch.zeros(4, 900))
            worst = max(worst, error(got, expected[i]))
        return worst

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(run, range(4))) < WHOLE
    assert sum(key[0] == one for key in backend._kernels) == 1


def test_rows_without_a_new_token_are_zero() -> None:
    one = SPECS[6]
    valid = torch.tensor([[True], [False]])
    made = case(one, [[64, 32, 96, 0], [10, 20, 30, 3]], 2, 2, valid=valid)
    sums = torch.zeros(4, 200)
    got = backend.attend(made.queries, made.view, one, sums)
    assert not got[1].any()
    assert not sums[2:].any()
    assert error(got[0], reference.attend(made.queries, made.view, one, torch.zeros(4, 200))[0]) < WHOLE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_of_16_bits(dtype: torch.dtype) -> None:
    check(replace(SPECS[3]), [[300, 5, 64, 700]], 2, 2, dtype=dtype)


def test_queries_may_lie_anywhere() -> None:
    """What a projection and a transpose give: strides of their own, heads side by side."""
    made = case(SPECS[0], [[90] * 6], 2, 3)
    there = made.queries.states.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    apart = torch.zeros(2, 1, 9, 70)[:, :, :, :64].transpose(1, 2).copy_(made.queries.states)
    for states in (there, apart):
        assert not states.is_contiguous()
        got = backend.attend(replace(made.queries, states=states), made.view, made.spec)
        assert torch.equal(got, backend.attend(made.queries, made.view, made.spec))


def test_no_result_depends_on_batch_or_threads() -> None:
    """To the bit: rows are cut into pieces by their own length alone."""
    lengths = [1, 70, 513, 1300, 64, 2000]
    made = case(SPECS[1], [lengths], 3, 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = backend.attend(made.queries, made.view, made.spec)
        torch.set_num_threads(1)
        single = backend.attend(made.queries, made.view, made.spec)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, single)
    view = made.view
    for b in range(3):
        rows = slice(2 * b, 2 * b + 2)
        alone = replace(
            view,
            starts=view.starts[rows],
            lengths=view.lengths[rows],
            begins=view.begins[rows],
            ends=view.ends[rows],
            batch=1,
        )
        queries = replace(
            made.queries, states=made.queries.states[b : b + 1], positions=made.queries.positions[b : b + 1]
        )
        assert torch.equal(together[b : b + 1], backend.attend(queries, alone, made.spec))


def test_source_is_deterministic_and_has_no_dead_branch() -> None:
    for one in SPECS:
        for many in (False, True):
            text = backend.source(one, torch.float32, many)
            assert text == backend.source(replace(one), torch.float32, many)
            assert ("tanh" in text) == bool(one.softcap)
            assert ("positions" in text) == (many or bool(one.sliding_window))
            assert ("sinks" in text) == one.sink
            assert ("sums_row" in text) == one.scores
            assert ("tile.value_" in text) == any(p.value.axis == "token" for p in one.parts)
            assert ("table" in text) == any(p.layout == "paged" for p in one.parts)


def test_a_page_is_looked_up_once_a_tile() -> None:
    """Not once for each entry, each time that it or the next tile's is read: that took half as long again."""
    for page in (16, 64):
        for codec in (FLOAT, Codec("int8", "token")):
            text = backend.source(spec(("paged", codec, codec, page)), torch.float32)
            tile = text[text.index("KV_INLINE void open") : text.index("template <int R>")]
            assert text.count("pool(row.table") == (2 if page == 64 else 0)
            assert tile.count("row.table") == (2 if page == 64 else 1)
            assert text.count("row.table") == tile.count("row.table")
