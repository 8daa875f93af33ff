"""Run by test_interpreter.py in a process of its own: whether Triton interprets is decided when it is imported."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels import reference
from kvcompile.kernels.backend import Backend
from kvcompile.kernels.choose import ChooseSpec
from kvcompile.kernels.codecs import encode
from kvcompile.kernels.compact import Arrays
from kvcompile.kernels.demote import Rule
from kvcompile.kernels.dispatch import REFERENCE, SDPA, TRITON, choose, describe, serving
from kvcompile.kernels.layout import DenseView, MixedView, Queries, View, parts
from kvcompile.kernels.reference.ghost import GhostSpec
from kvcompile.kernels.selfcheck import check as selfcheck
from kvcompile.kernels.selfcheck.trust import trusted
from kvcompile.kernels.spec import KernelSpec, Part, plain
from kvcompile.kernels.triton import backend, launch, tuning
from kvcompile.kernels.triton import fragments as f
from kvcompile.kernels.triton.entries.encode import append
from kvcompile.kernels.triton.entries.ghost import ghost_scores
from kvcompile.kernels.triton.launch import interpreted
from kvcompile.kernels.triton.tuning import Choice
from kvcompile.plan.storage import Codec, Storage
from kvcompile.runtime.layer import LayerCache
from kvcompile.stores.encoded.tier import Received
from kvcompile.stores.encoded.tiered import TieredStore
from kvcompile.stores.factory import opened, tiered

sys.path[:0] = [str(p) for p in list(Path(__file__).parents)[:3]]
from choices import SPECS, check_near  # noqa: E402
from choices import case as choosing  # noqa: E402
from choices import check as check_choice  # noqa: E402
from choosing import STORES, choice, filled, gathered, within  # noqa: E402
from ghosts import PLACES  # noqa: E402
from ghosts import SPECS as GHOSTS  # noqa: E402
from ghosts import case as scoring  # noqa: E402
from ghosts import check as check_scores  # noqa: E402
from misread import DIM, FLAT, HELD, TABLE, WRONG  # noqa: E402
from moves import FEW, check  # noqa: E402
from moves import case as moving  # noqa: E402
from quantized import case  # noqa: E402
from sample import FLOATS, QUANTIZED, Sample, samples  # noqa: E402
from working import STORAGES, plan_of, worked  # noqa: E402

# Relative RMS error of the result. The interpreter computes everything in float32 (its bfloat16 arithmetic is wrong),
# so what is left is float32 summation in another order, and one rounding of the result: 2^-12 RMS-wise for float16;
# bfloat16 results are cut off, not rounded, by the interpreter, which costs 2^-8.
TOLERANCE = {"float32": 2e-6, "float16": 4e-4, "bfloat16": 8e-3}
SAMPLES = samples(48)


def close(got: Tensor, want: Tensor, dtype: str) -> None:
    assert bool(got.isfinite().all())
    error = (got.double() - want.double()).square().mean().sqrt()
    assert error <= TOLERANCE[dtype] * want.double().square().mean().sqrt() + 1e-12


def forced(monkeypatch: pytest.MonkeyPatch, choice: Choice) -> None:
    monkeypatch.setattr(tuning, "choose", lambda *_: choice)


def test_the_interpreter_is_on() -> None:
    assert interpreted()


def test_the_sample_covers_every_codec_and_feature() -> None:
    specs = [s.spec for s in SAMPLES]
    every = [p for s in specs for p in s.parts]
    assert {p.key for p in every} >= {*QUANTIZED, *FLOATS}
    assert {p.value for p in every} >= {*QUANTIZED, *FLOATS}
    assert {p.layout for p in every} == {"dense", "ragged", "paged"}
    assert {len(s.parts) for s in specs} == {1, 2, 3}
    assert {s.head_dim for s in specs} == {64, 80, 96, 128, 256}
    for feature in ("sliding_window", "sink", "softcap", "scores"):
        assert {bool(getattr(s, feature)) for s in specs} == {True, False}
    assert any(s.head_dim != s.value_dim for s in specs)
    assert {s.padded for s in SAMPLES} == {True, False}
    assert {s.choice.splits for s in SAMPLES} == {1, 2, 3, 8}


@pytest.mark.parametrize("s", SAMPLES, ids=lambda s: f"{s.spec.name}-x{s.count}-{s.dtype}-s{s.choice.splits}")
def test_kernels_agree_with_the_reference(s: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """No slack, no page past the end and no other row leaks in: all of them hold NaN or garbage."""
    forced(monkeypatch, s.choice)
    valid = None
    if s.padded:
        valid = torch.ones(s.batch, s.count, dtype=torch.bool)
        valid[0, :2] = False
        valid[-1, -1] = False
    made = case(s.spec, s.lengths, s.batch, s.heads, count=s.count, valid=valid, dtype=getattr(torch, s.dtype))
    width = sum(max(p) for p in s.lengths) + 64
    sums = torch.full((s.batch * s.heads, width), 0.5) if s.spec.scores else None
    wanted = None if sums is None else sums.clone()
    want = reference.attend(made.queries, made.view, s.spec, wanted)
    got = backend.attend(made.queries, made.view, s.spec, sums)
    assert got.dtype == want.dtype
    close(got, want, s.dtype)
    if sums is not None:
        torch.testing.assert_close(sums, wanted, atol=1e-5, rtol=1e-5)
    if valid is not None:
        assert not got[~valid[:, None, :, None].expand_as(got)].any(), "padding gives zeros"


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("scores", [False, True])
def test_a_row_without_anything_visible_gives_zeros(splits: int, scores: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, Choice(16, 16, 4, 2, splits))
    spec = KernelSpec(plain("ragged", "float32"), 2, 64, 64, 0.125, sliding_window=8, scores=scores)
    made = case(spec, [[40, 40]], batch=2, heads=1)
    made.queries.positions[0] = 1000  # everything has left its window
    sums = torch.zeros(2, 41)
    out = backend.attend(made.queries, made.view, spec, sums if scores else None)
    assert not out[0].any()
    assert not sums[0].any()
    close(out[1], reference.attend(made.queries, made.view, spec)[1] if not scores else out[1], "float32")


def test_large_scores_neither_overflow_nor_lose_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, Choice(16, 16, 4, 2, 4))
    spec = KernelSpec(plain("ragged", "float32"), 2, 64, 64, 40.0)
    made = case(spec, [[100]], batch=1, heads=1)
    close(backend.attend(made.queries, made.view, spec), reference.attend(made.queries, made.view, spec), "float32")


def test_queries_may_lie_transposed_and_positions_be_shared() -> None:
    spec = KernelSpec(plain("dense", "float32"), 3, 64, 64, 0.125, sliding_window=9)
    made = case(spec, [[20] * 4], batch=2, heads=2, count=2)
    view = replace(made.view, positions=made.view.positions[:, :1].contiguous())
    view.positions[:] = torch.arange(20)
    made.queries.positions[:] = torch.tensor([18, 19])
    states = made.queries.states.transpose(1, 2).contiguous().transpose(1, 2)
    queries = Queries(states, made.queries.positions)
    close(backend.attend(queries, view, spec), reference.attend(queries, view, spec), "float32")


def test_a_prompt_over_itself_is_left_to_the_library() -> None:
    spec = KernelSpec(plain("dense", "float32"), 2, 64, 64, 0.125)
    made = case(spec, [[5, 5]], batch=1, heads=2, count=5)
    made.view.positions[:] = torch.arange(5)
    made.queries.positions[:] = torch.arange(5)
    close(backend.attend(made.queries, made.view, spec), reference.attend(made.queries, made.view, spec), "float32")


@pytest.mark.parametrize(
    "parts", [plain("paged", "float32"), (Part("ragged", *[Codec("int8", "token")] * 2), *plain("ragged", "float32"))]
)
def test_window_scores_are_column_sums_of_the_last_queries(
    parts: tuple[Part, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(monkeypatch, Choice(32, 16, 4, 2, 2))
    parts = tuple(replace(p, page=16) if p.layout == "paged" else p for p in parts)
    spec = KernelSpec(parts, 3, 64, 64, 0.125, sliding_window=48, scores=True)
    made = case(spec, [[70, 33], [20, 9]][: len(parts)], batch=1, heads=2, count=8)
    last = Queries(made.queries.states[:, :, -6:], made.queries.positions[:, -6:])
    want, got = torch.zeros(2, 120), torch.zeros(2, 120)
    reference.attend(last, made.view, spec, want)
    backend.column_sums(last, made.view, spec, got)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_latents_go_block_by_block_with_the_default_cut(layout: str, count: int) -> None:
    """Rows of 512 numbers whose last 384 are the values: blocks of 256 and 192, values read in place."""
    spec = KernelSpec(plain(layout, "float32"), 20, 512, 384, 0.1, latent=True)
    made = case(replace(spec, latent=False), [[37, 37] if layout == "dense" else [37, 18]], 2, 1, count=count)
    view = replace(made.view, values=made.view.keys[..., 128:])
    want = reference.attend(made.queries, view, spec)
    close(backend.attend(made.queries, view, spec), want, "float32")


FORMATS = [*QUANTIZED, *FLOATS, Codec("int4", "channel", 48)]


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("codec", FORMATS, ids=lambda c: c.name)
def test_encoding_is_bit_equal_to_the_codec(codec: Codec, dim: int) -> None:
    x = torch.randn(96, dim, generator=torch.Generator().manual_seed(0)) * 3 + 1
    x[:16], x[20:40, 3], x[60], x[70:] = 1.5, 0.0, 0.0, x[70:] * 1e-4  # constant groups, zeros, subnormal scales
    want, numbers = encode(x, codec)
    at = torch.arange(96).view(-1, 48).flip(0).flatten() + 48
    step = codec.group if codec.axis == "channel" else 1
    codes = torch.zeros(192, want.shape[1], dtype=want.dtype)
    scales = None if numbers is None else torch.full((192 // step, *numbers.shape[1:]), 7.0, dtype=torch.float16)
    append(x, codec, codes, scales, at)
    if codec.kind == "bfloat16":  # the interpreter cuts bfloat16 off where devices round
        torch.testing.assert_close(codes[at].float(), want.float(), atol=0, rtol=2**-7)
    else:
        assert torch.equal(codes[at].view(torch.uint8), want.view(torch.uint8))
    others = torch.ones(192, dtype=torch.bool)
    others[at] = False
    assert not codes.view(torch.uint8)[others].any(), "entries beside the new ones stay as they are"
    if scales is not None and numbers is not None:
        assert torch.equal(scales[at[::step] // step], numbers)
        assert bool((scales[others[::step]] == 7).all())


def test_a_partial_group_is_refused() -> None:
    with pytest.raises(KvcompileError, match="whole groups"):
        append(torch.zeros(9, 64), Codec("int4", "channel", 8), torch.zeros(9, 32).byte(), None, torch.arange(9))


@pytest.mark.parametrize(("name", "way"), FEW, ids=lambda x: x if isinstance(x, str) else "-".join(filter(None, x)))
def test_compaction_moves_the_bytes_that_torch_moves(name: str, way: tuple[str, str]) -> None:
    check(backend.compact, moving(name, way, 1, longest=40))


@pytest.mark.parametrize("way", [("dense", "ragged"), ("ragged", ""), ("paged", "")], ids="-".join)
def test_compaction_of_many_blocks_and_stretches(way: tuple[str, str]) -> None:
    """Rows longer than a block, entries wider than what a program moves in place."""
    for name in ("bfloat16", "latent"):
        check(backend.compact, moving(name, way, 0, longest=600))


@pytest.mark.parametrize("name", ["plain", "paged", "channel", "paged token"])
def test_stores_hold_what_they_hold_with_torch(name: str) -> None:
    """Prompts, evictions and encodings of a whole layer."""
    plan = plan_of(STORAGES[name])
    mine = worked(LayerCache(plan, compactor=TRITON.compact), 1, turns=20)
    for a, b in zip(mine, worked(LayerCache(plan), 1, turns=20), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", STORES)
def test_chosen_entries_are_read_where_they_lie(name: str) -> None:
    layer, step, queries = filled(name, "triton", 3)
    chosen = choice(layer, 3)
    found = layer.attend(queries, step, 0, chosen)
    torch.testing.assert_close(found, gathered(layer, step, queries, chosen), atol=within(name), rtol=0)


@triton.jit
def _elementwise(x, out, bits, values, n, WHAT: tl.constexpr):
    i = tl.arange(0, 256)
    if WHAT == "cap":
        tl.store(out + i, f.softcapped(tl.load(x + i), 5.0))
    elif WHAT == "even":
        tl.store(out + i, f.half_even(tl.load(x + i)))
    elif WHAT == "decode":
        tl.store(out + i, f.e4m3(tl.load(bits + i), tl.float32))
    elif WHAT == "first":
        tl.store(out + i, f.first_after(values, n, 10) * 1.0)


def elementwise(what: str, x: Tensor | None = None, values: Tensor | None = None, n: int = 0) -> Tensor:
    out = torch.zeros(256)
    bits = torch.arange(256, dtype=torch.uint8)
    values = torch.zeros(1, dtype=torch.int32) if values is None else values
    _elementwise[(1,)](torch.zeros(256) if x is None else x, out, bits, values, n, what)
    return out


def test_softcap_holds_at_the_ends() -> None:
    x = torch.cat((torch.linspace(-20, 20, 254), torch.tensor([-3e4, 3e4])))
    torch.testing.assert_close(elementwise("cap", x), 5 * torch.tanh(x / 5), atol=2e-6, rtol=1e-6)


def test_halves_round_to_even() -> None:
    x = torch.arange(-128, 128) / 2
    assert torch.equal(elementwise("even", x), x.round())


def test_every_float8_is_read() -> None:
    want = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = ~want.isnan()
    assert int(numbers.sum()) == 254
    assert torch.equal(elementwise("decode")[numbers], want[numbers])


@pytest.mark.parametrize(("positions", "want"), [([], 0), ([10], 1), ([11], 0), ([3, 9, 10, 11, 40], 3), ([1, 2], 2)])
def test_bisection_finds_the_first_later_position(positions: list[int], want: int) -> None:
    held = torch.tensor([*positions, -7], dtype=torch.int32)
    assert elementwise("first", values=held, n=len(positions))[0] == want


class Attention(torch.nn.Module):
    def __init__(self, spec: KernelSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, at: Tensor) -> Tensor:
        return backend.attend(Queries(q, at), DenseView(keys, values, positions), self.spec) * 2.0


def test_a_graph_sees_one_node() -> None:
    spec = KernelSpec(plain("dense", "float32"), 2, 64, 64, 0.125)
    made = case(spec, [[20, 20]], batch=1, heads=2)
    arguments = (made.queries.states, made.view.keys, made.view.values, made.view.positions, made.queries.positions)
    assert choose("triton") is TRITON  # makes the operator known
    program = torch.export.export(Attention(spec), arguments)
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert [n.target for n in calls].count(torch.ops.kvcompile_triton.attend.default) == 1
    assert len(calls) == 2, "the operator and the doubling"
    close(program.module()(*arguments), 2 * reference.attend(made.queries, made.view, spec), "float32")


def test_torch_compile_does_not_break_at_it() -> None:
    spec = KernelSpec(plain("dense", "float32"), 2, 64, 64, 0.125)
    made = case(spec, [[20, 20]], batch=1, heads=2)
    arguments = (made.queries.states, made.view.keys, made.view.values, made.view.positions, made.queries.positions)
    assert choose("triton") is TRITON
    whole = torch.compile(Attention(spec), backend="eager", fullgraph=True)
    close(whole(*arguments), 2 * reference.attend(made.queries, made.view, spec), "float32")


@pytest.mark.parametrize("s", SAMPLES[:16], ids=lambda s: s.spec.name)
def test_a_spec_survives_as_text(s: Sample) -> None:
    from kvcompile.kernels.triton.ops import read

    for spec in (s.spec, replace(s.spec, latent=True)):
        assert read(backend.written(spec)) == spec


def test_the_operator_keeps_its_contract() -> None:
    """Schema, mutation of `sums` and the fake kernel agree with what runs."""
    spec = KernelSpec(plain("ragged", "float32"), 2, 64, 64, 0.125, scores=True)
    made = case(spec, [[20, 9]], batch=1, heads=2)
    states, at, held, longest = backend.operands(made.queries, made.view)
    arguments = (states, at, held, torch.zeros(2, 30), backend.written(spec), longest)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.kvcompile_triton.attend.default, arguments, test_utils=checks)


def test_scores_need_a_place() -> None:
    spec = KernelSpec(plain("dense", "float32"), 2, 64, 64, 0.125, scores=True)
    made = case(spec, [[20, 20]], batch=1, heads=2)
    with pytest.raises(KvcompileError, match="scores"):
        backend.attend(made.queries, made.view, spec)


def test_a_selection_is_scored_by_the_window_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a layer and chunk, for both scores of zigzag; soft-cap and sliding layers; codes and their residual."""
    from tiny import tiny_ids, tiny_model

    from kvcompile.adapters.architectures import describe
    from kvcompile.compiler import compile_plan
    from kvcompile.kernels.triton import launch
    from kvcompile.stack import apply_stack, build_stack

    stack = {"snapkv": {"window": 6, "kernel": 3, "budget": 0.9}, "zigzag": {"window": 6, "scope": "head"}}
    stack |= {"kivi": {"bits": 8, "group": 8, "residual": 8}}
    launches: list[str] = []
    columns = launch.columns

    def counted(call: launch.Call, *rest: Tensor | None) -> None:
        launches.append(call.spec.name)
        columns(call, *rest)

    monkeypatch.setattr(launch, "columns", counted)
    kept = []
    for kernels in ("reference", "triton"):
        model = tiny_model("gemma2", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
        plan = replace(describe(model.config), prefill_chunk=20)
        built = compile_plan(model, apply_stack(plan, build_stack(list(stack), stack)), kernels)
        assert not launches
        with torch.no_grad():
            cache = built(tiny_ids(2, 37)).past_key_values
        kept.append([at.tolist() for layer in cache.layers for _, _, at in layer.held.rows()])
    assert len(launches) == 2 * 2
    assert all("-cap" in name for name in launches)
    assert {"+" in name for name in launches} == {True, False}
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_selection_is_scored_by_the_ghost_kernels(name: str) -> None:
    """Soft-cap or learned sinks, a layer with a sliding window, chunked prompts: what the reference keeps is kept."""
    from tiny import tiny_ids, tiny_model

    from kvcompile.adapters.architectures import describe
    from kvcompile.compiler import compile_plan
    from kvcompile.stack import apply_stack, build_stack

    stack = {"ghost": {"chunk": 16, "band": 3, "shift": 40, "recent": 2, "budget": 0.4}, "global_topk": {}}
    kept = []
    for kernels in ("reference", "triton"):
        model = tiny_model(name, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
        plan = replace(describe(model.config), prefill_chunk=20)
        built = compile_plan(model, apply_stack(plan, build_stack(list(stack), stack)), kernels)
        with torch.no_grad():
            cache = built(tiny_ids(2, 37)).past_key_values
        kept.append([at.tolist() for layer in cache.layers for _, _, at in layer.held.rows()])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_whole_model_runs_on_it(name: str) -> None:
    """Soft-cap or sinks, sliding layers, left padding, a quantised cache and its residual; prefill and decoding."""
    from tiny import tiny_ids, tiny_model

    from kvcompile.adapters.architectures import describe
    from kvcompile.compiler import compile_plan
    from kvcompile.policies.kivi import KIVI

    ids = tiny_ids(2, 21)
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = 0, 0
    logits = []
    for kernels in ("reference", "triton"):
        model = tiny_model(name)
        built = compile_plan(model, KIVI(bits=8, group=8, residual=8).apply(describe(model.config)), kernels)
        options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        logits.append(torch.stack(built.generate(ids, attention_mask=mask, **options).logits))
    torch.testing.assert_close(logits[1][0], logits[0][0], atol=1e-4, rtol=1e-4)
    # a value between two codes may be rounded to the other one: 1e-3 of logits that reach 3
    torch.testing.assert_close(logits[1][1:], logits[0][1:], atol=5e-3, rtol=0)


@pytest.mark.parametrize("many", [False, True], ids=["one token", "several"])
@pytest.mark.parametrize("name", sorted(WRONG.keys() - {"sinks of half width", "another device"}))
def test_no_kernel_is_launched_on_what_it_would_misread(name: str, many: bool) -> None:
    """The same as `kernels=cpp` refuses; but sinks are cast, and for tensors of two devices torch launches nothing."""
    asked, view, sums = WRONG[name]
    if many:
        asked = Queries(asked.states.expand(-1, -1, 2, -1), asked.positions.expand(-1, 2), sinks=asked.sinks)
    layout = type(view).__name__.removesuffix("View").lower()
    part = replace(plain(layout, "float32")[0], page=4 if layout == "paged" else 0)
    spec = KernelSpec((part,), 2, DIM, DIM, 0.25, scores=True, sink=True)
    with pytest.raises(KvcompileError, match="a kernel reads"):
        backend.attend(asked, view, spec, sums)


@pytest.mark.parametrize("one", SPECS, ids=lambda spec: spec.name)
def test_the_best_groups_are_chosen(one: ChooseSpec) -> None:
    """By scores of the generated kernel; what lies in the room behind the groups of a row is NaN."""
    for seed in range(6):
        check_choice(backend.choose, choosing(one, seed))
    check_near(backend.choose, choosing(one, 1, most=100, whole=False), 1e-4)


def test_nothing_is_scored_that_would_be_misread() -> None:
    one = choosing(SPECS[0], 0)
    x = one.table.representatives
    for wrong in (x.half(), x[..., :-1].contiguous(), x[1:], x.transpose(0, 1).contiguous().transpose(0, 1)):
        with pytest.raises(KvcompileError, match="a kernel reads"):
            replace(one, table=replace(one.table, representatives=wrong)).by(TRITON.choose)


def test_no_compaction_is_launched_on_what_it_would_misread() -> None:
    kept = torch.zeros(4, dtype=torch.int64)
    source, target = Arrays((FLAT,), starts=torch.tensor([0, HELD])), Arrays((FLAT.view(1, 2, HELD, DIM),))
    for wrong in (
        (replace(source, starts=torch.zeros(2, dtype=torch.int32)), target, kept),
        (replace(source, starts=kept[:1]), target, kept),
        (Arrays((FLAT,), table=TABLE.long(), page=4), target, kept),
        (source, target, kept.int()),
        (source, target, kept[1:]),
        (source, Arrays((target.tensors[0].to("meta"),)), kept),
    ):
        with pytest.raises(KvcompileError, match="a kernel reads"):
            TRITON.compact(*wrong, [2, 2])


def tiers(by: Backend) -> TieredStore:
    """Two rows of 40 entries, 12 and 20 of them high, whose attention is counted, and a token that has just come."""
    g, (int8, int4, int2) = torch.Generator().manual_seed(2), (Codec(f"int{bits}", "token") for bits in (8, 4, 2))
    keys, values = torch.randn(2, 1, 2, 41, 64, generator=g)
    positions, old, new = torch.arange(41).unsqueeze(0), slice(40), slice(40, 41)
    store = opened(keys, values, None, 4, Storage(int8, int4, low=(int4, int2)), encoder=by.encode)
    store = tiered(store.append(keys[:, :, old], values[:, :, old], positions[:, old], 4, None, by.compact))
    order = [torch.randperm(40, generator=g) for _ in range(2)]
    high, low = ([at.sort().values for at in (order[0][a], order[1][b])] for a, b in HIGH_AND_LOW)
    store.divide(high, low, [Received(torch.rand(40, generator=g), torch.zeros(40)) for _ in range(2)], 4, by.compact)
    return store.append(keys[:, :, new], values[:, :, new], positions[:, new], 4, None, by.compact)


HIGH_AND_LOW = ((slice(12), slice(20)), (slice(12, None), slice(20, None)))


def test_two_tiers_and_a_new_token_under_one_softmax() -> None:
    """Then the token goes into its tier, and what it pushes out is encoded again, to the reference's bytes."""
    queries = Queries(torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(3)), torch.tensor([[40]]))
    stores, outs, sums = [], [], torch.zeros(2, 2, 41)
    for by, received in zip((TRITON, REFERENCE), sums, strict=True):
        stores.append(tiers(by))
        spec = KernelSpec(stores[-1].parts, 2, 64, 64, 0.125, scores=True)
        outs.append(by.attend(queries, stores[-1].view(), spec, received))
    close(outs[0], outs[1], "float32")
    torch.testing.assert_close(sums[0], sums[1], atol=1e-5, rtol=1e-5)
    seen = torch.full((2,), 41.0)
    for by, store in zip((TRITON, REFERENCE), stores, strict=True):
        store.demote(sums[1], Rule(seen, 1e9 / seen, 0 / seen, recent=8, sinks=0, group=2), 4, by.compact, by.demote)
        assert store.low == [29, 21]
    for a, b in zip(stores[0].rows(), stores[1].rows(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_check_trusts_what_is_right_and_leaves_what_is_slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `kernels=auto` does on a GPU. Interpreted, every kernel is slow; one that misreads a scale is not right."""
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(selfcheck, "TIMED_ON_CPU", selfcheck.Shape(8, batch=1, heads=1))
    monkeypatch.setattr(selfcheck, "CALLS", 1)
    int8 = Codec("int8", "token")
    spec = KernelSpec((Part("ragged", int8, int8), *plain("ragged", "float32")), 2, 32, 32, 0.2)
    auto = trusted(TRITON, torch.device("cpu"))
    assert serving(auto, spec, torch.float32) is SDPA
    assert "sdpa (triton: not faster than the library here" in describe(auto, spec, torch.float32)

    def misread(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
        codes, rest = parts(view)
        return backend.attend(queries, MixedView((replace(codes, key_scales=codes.value_scales), rest)), spec, sums)

    wrong = trusted(replace(TRITON, attend=misread), torch.device("cpu"))
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "another"))
    with pytest.warns(UserWarning, match=r"the triton kernel ragged-int8t.* differs from the reference"):
        assert serving(wrong, spec, torch.float32) is SDPA


@pytest.mark.parametrize("spec", GHOSTS, ids=lambda spec: spec.name)
def test_ghost_scores_are_changes_of_the_output(spec: GhostSpec) -> None:
    for place in PLACES[1::2]:
        check_scores(TRITON.ghost, scoring(spec, *place), 2e-4)


def test_ghosts_of_16_bits_see_what_little_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one entry has nearly all the weight its own is 1, rounded or not: 1 - p is what the others weigh."""
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    c = scoring(replace(GHOSTS[0], dtype="float16"), 21, 40)
    c.ghosts.copy_(c.keys.unsqueeze(1) * 1.5)
    check_scores(ghost_scores, c, 0.02)


def test_no_ghosts_are_launched_on_what_they_would_misread() -> None:
    c = scoring(GHOSTS[0])
    for wrong in (
        replace(c, ghosts=c.ghosts[:, :, 1:]),
        replace(c, keys=c.keys.half()),
        replace(c, values=c.values[:1]),
        replace(c, sinks=(c.sinks[0][:1], c.sinks[1])),
        replace(c, queries=c.queries.transpose(2, 3).contiguous().transpose(2, 3)),
    ):
        with pytest.raises(KvcompileError, match="a kernel reads"):
            wrong.by(TRITON.ghost)
