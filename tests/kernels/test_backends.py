"""Every backend computes the attention that the float64 reference specifies, whatever the layout and the shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels import dispatch, names, reference, sdpa
from kvcompile.kernels.backend import Backend
from kvcompile.kernels.dispatch import BUILT_IN, CPP, REFERENCE, SDPA, choose, describe, named, serving, why
from kvcompile.kernels.layout import DenseView, Queries, RaggedView
from kvcompile.kernels.spec import KernelSpec, Part, plain
from kvcompile.plan import extensions
from kvcompile.plan.storage import Codec

# fp32: sums of some 50 products in another order. 16 bits: one rounding of each weight and of the result (2^-11
# and 2^-8 relative), and of the logits where soft-cap goes by matmul; logits here stay below about 4.
HERE = ["cpp", "reference", "sdpa"]  # that one needs a GPU or the interpreter: tests/kernels/triton

TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}


class Case:
    """Random rows with gaps in their positions (evicted entries), then the new tokens of each sequence."""

    def __init__(
        self,
        seed: int,
        history: list[int],
        new: list[int],
        heads: int = 2,
        group: int = 1,
        dim: int = 8,
        value_dim: int = 8,
        window: int | None = None,
        softcap: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`history[row]` entries held before, `new[b]` new tokens of sequence b (left-padded to the longest)."""
        self.g = torch.Generator().manual_seed(seed)
        self.batch, self.heads, self.dtype = len(new), heads, dtype
        self.count = max(new)
        name = str(dtype).removeprefix("torch.")
        self.spec = KernelSpec(plain("ragged", name), group, dim, value_dim, dim**-0.5, window, softcap=softcap)
        seen = [int(max(history[b * heads : (b + 1) * heads]) * 1.5) for b in range(self.batch)]
        self.valid = torch.zeros(self.batch, self.count, dtype=torch.bool)
        self.at = torch.full((self.batch, self.count), -1)
        for b, n in enumerate(new):
            self.valid[b, self.count - n :] = True
            self.at[b] = seen[b] + self.valid[b].long().cumsum(0) - 1
        self.states = self.random(self.batch, heads * group, self.count, dim)
        self.rows = []
        for i, held in enumerate(history):
            b = i // heads
            old = torch.randperm(max(seen[b], 1), generator=self.g)[:held].sort().values
            positions = torch.cat((old, self.at[b][self.valid[b]])).int()
            self.rows.append((self.random(len(positions), dim), self.random(len(positions), value_dim), positions))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.g).to(self.dtype)

    def queries(self, contiguous: bool = True) -> Queries:
        states = self.states if contiguous else self.states.transpose(1, 2).contiguous().transpose(1, 2)
        return Queries(states, self.at, None if bool(self.valid.all()) else self.valid)

    def ragged(self, slack: int = 3) -> RaggedView:
        """Rows back to back with `slack` entries of NaN behind each."""
        starts, parts = [], []
        at = 0
        for keys, values, positions in self.rows:
            starts.append(at)
            at += len(positions) + slack
            nan = float("nan")
            parts.append(
                (
                    torch.cat((keys, keys.new_full((slack, keys.shape[1]), nan))),
                    torch.cat((values, values.new_full((slack, values.shape[1]), nan))),
                    torch.cat((positions, positions.new_full((slack,), -7))),
                )
            )
        keys, values, positions = (torch.cat(x) for x in zip(*parts, strict=True))
        lengths = [len(p) for _, _, p in self.rows]
        begins = torch.tensor(starts)
        ends = begins + torch.tensor(lengths)
        return RaggedView(keys, values, positions, starts, lengths, self.batch, self.heads, begins, ends)

    def dense(self, slack: int = 3) -> DenseView:
        """Rows of one length as slices of a larger buffer whose end is NaN."""
        n = len(self.rows[0][2])

        def stack(place: int, fill: float) -> Tensor:
            rows = torch.stack([r[place] for r in self.rows]).unflatten(0, (self.batch, self.heads))
            room = rows.new_full((self.batch, self.heads, n + slack, *rows.shape[3:]), fill)
            room[:, :, :n] = rows
            return room[:, :, :n]

        return DenseView(stack(0, float("nan")), stack(1, float("nan")), stack(2, -7))


def naive(case: Case) -> Tensor:
    """The formula, token by token, in float64: what the reference itself is checked with."""
    spec = case.spec
    width = case.rows[0][1].shape[1]
    out = torch.zeros(case.batch, case.heads * spec.group, case.count, width, dtype=torch.float64)
    for b in range(case.batch):
        for h in range(case.heads * spec.group):
            keys, values, held = case.rows[b * case.heads + h // spec.group]
            for t in range(case.count):
                if not case.valid[b, t]:
                    continue
                weights, total = [], 0.0
                for j in range(len(held)):
                    ago = int(case.at[b, t]) - int(held[j])
                    if ago < 0 or (spec.sliding_window and ago >= spec.sliding_window):
                        weights.append(0.0)
                        continue
                    logit = float(case.states[b, h, t].double() @ keys[j].double()) * spec.scale
                    if spec.softcap:
                        logit = spec.softcap * math.tanh(logit / spec.softcap)
                    weights.append(math.exp(logit))
                    total += weights[-1]
                out[b, h, t] = torch.tensor(weights, dtype=torch.float64) @ values.double() / total
    return out


def agree(case: Case, got: Tensor, expected: Tensor) -> None:
    """At the real tokens; whatever a backend writes at padding must at least be a number."""
    real = case.valid[:, None, :, None].expand_as(got)
    assert got.dtype == case.dtype
    assert bool(got.isfinite().all())
    limit = TOLERANCE[case.dtype]
    torch.testing.assert_close(got[real].double(), expected[real].double(), atol=limit, rtol=limit)


common = {
    "seed": st.integers(0, 2**16),
    "heads": st.integers(1, 2),
    "group": st.sampled_from([1, 3, 4, 8]),
    "dims": st.sampled_from([(8, 8), (16, 8), (5, 12)]),
    "window": st.sampled_from([None, 1, 4, 9]),
    "softcap": st.sampled_from([None, 2.0]),
    "dtype": st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
    "block": st.sampled_from([1, 3, 512]),
    "contiguous": st.booleans(),
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(history=st.integers(0, 20), new=st.integers(1, 13), batch=st.integers(1, 3), **common)
@example(0, 1, 1, 0, 1, 1, (8, 8), None, None, torch.float32, 512, True).via("one token ever")
def test_dense_layout(history, new, batch, seed, heads, group, dims, window, softcap, dtype, block, contiguous) -> None:
    case = Case(seed, [history] * (batch * heads), [new] * batch, heads, group, *dims, window, softcap, dtype)
    view = case.dense()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "QUERY_BLOCK", block)
        spec = replace(case.spec, parts=plain("dense", dtype))
        got = sdpa.attend(case.queries(contiguous), view, spec)
    agree(case, got, reference.attend(case.queries(), view, spec))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 3), **common)
def test_ragged_layout(data, batch, seed, heads, group, dims, window, softcap, dtype, block, contiguous) -> None:
    history = data.draw(st.lists(st.integers(0, 20), min_size=batch * heads, max_size=batch * heads))
    new = data.draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch).filter(any))
    # a sequence without a new token must hold something already: rows are never empty once a sequence has begun
    new = [max(n, 1) if not min(history[b * heads : (b + 1) * heads]) else n for b, n in enumerate(new)]
    case = Case(seed, history, new, heads, group, *dims, window, softcap, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "QUERY_BLOCK", block)
        got = sdpa.attend(case.queries(contiguous), case.ragged(), case.spec)
    agree(case, got, reference.attend(case.queries(), case.ragged(), case.spec))


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("history", "new"), [([0] * 4, [5, 3]), ([7, 2, 9, 4], [1, 1]), ([7, 2, 9, 4], [4, 0])])
def test_backends_follow_the_formula(name: str, softcap: float | None, window: int | None, history, new) -> None:
    """The oracle is no oracle unless something simpler agrees with it."""
    case = Case(3, history, new, heads=2, group=3, window=window, softcap=softcap)
    agree(case, named(name).attend(case.queries(), case.ragged(), case.spec), naive(case))


@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_window_hides_old_entries_of_a_short_row(layout: str) -> None:
    """After an eviction fewer entries than the window may be held, and some of them may still have left it."""
    case = Case(0, [4, 4], [1], heads=2, window=3)
    for _, _, positions in case.rows:
        positions.copy_(torch.tensor([0, 1, 2, 9, 10]))
    case.at[:] = 10
    far = Case(0, [4, 4], [1], heads=2, window=6)
    far.rows, far.at = case.rows, case.at
    for one in (case, far):
        view = one.ragged() if layout == "ragged" else one.dense()
        agree(one, sdpa.attend(one.queries(), view, one.spec), naive(one))


def test_positions_may_be_shared_by_heads() -> None:
    case = Case(1, [6, 6], [4], heads=2)
    case.rows[1][2].copy_(case.rows[0][2])
    view = case.dense()
    shared = DenseView(view.keys, view.values, view.positions[:, :1])
    spec = replace(case.spec, parts=plain("dense", "float32"))
    for name in HERE:
        attend = named(name).attend
        assert torch.equal(attend(case.queries(), shared, spec), attend(case.queries(), view, spec))


def test_long_prefill_never_holds_a_square_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "QUERY_BLOCK", 4)
    sizes = []
    whole = sdpa._mask
    monkeypatch.setattr(sdpa, "_mask", lambda *a: sizes.append((m := whole(*a)).shape[2]) or m)
    case = Case(0, [3, 3], [21], heads=2)
    sdpa.attend(case.queries(), case.dense(), case.spec)
    assert max(sizes) <= 4
    assert sum(sizes) == 21


def test_batch_of_sequences_is_each_sequence_alone() -> None:
    """To the bit: what a neighbour holds, or pads, changes nothing."""
    case = Case(5, [7, 7, 0, 0, 12, 12], [2, 5, 1], heads=2, group=4)
    together = sdpa.attend(case.queries(), case.ragged(), case.spec)
    for b in range(3):
        real = case.valid[b]
        view = replace(
            case.ragged(),
            starts=case.ragged().starts[2 * b : 2 * b + 2],
            lengths=case.ragged().lengths[2 * b : 2 * b + 2],
            begins=case.ragged().begins[2 * b : 2 * b + 2],
            ends=case.ragged().ends[2 * b : 2 * b + 2],
            batch=1,
        )
        alone = sdpa.attend(Queries(case.states[b : b + 1, :, real], case.at[b : b + 1, real]), view, case.spec)
        assert torch.equal(together[b : b + 1, :, real], alone)


def test_choice_of_backend() -> None:
    assert choose("auto") in BUILT_IN
    assert choose("reference") is REFERENCE
    with pytest.raises(KvcompileError, match="auto, cpp, triton, sdpa, reference, got 'cuda'"):
        choose("cuda")


def test_auto_says_why_it_falls_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a compiler `auto` is the library and says so; `cpp` is refused with the way out."""
    assert choose("auto", "meta") is SDPA
    assert why("meta") == "no kernels are generated for meta"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert choose("auto") is SDPA
    assert why() == "no c++ or g++ or clang++ on the path"
    with pytest.raises(KvcompileError, match="install"):
        choose("cpp")
    with pytest.raises(KvcompileError, match="runs on a CPU, got a model on meta"):
        choose("cpp", "meta")


def test_who_attends_where_a_backend_cannot() -> None:
    one = KernelSpec(plain("dense", "float32"), 3, 64, 64, 0.125)
    wide, summed = replace(one, parts=plain("dense", "float64")), replace(one, scores=True)
    biased = replace(one, bias=True)
    assert serving(CPP, one, torch.float32) is CPP
    assert serving(CPP, wide, torch.float64) is SDPA
    assert serving(CPP, biased, torch.float32) is SDPA
    assert serving(CPP, one, torch.float32, gradients=True) is SDPA
    assert serving(REFERENCE, one, torch.float32, gradients=True) is REFERENCE
    assert serving(SDPA, summed, torch.float32) is REFERENCE
    assert describe(CPP, one, torch.float32) == "cpp"
    assert describe(CPP, wide, torch.float64) == "sdpa (cpp has no kernel for it in float64)"
    assert describe(CPP, biased, torch.float32) == "sdpa (cpp has no kernel for it in float32)"
    assert describe(REFERENCE, one, torch.float32) == "reference"


def test_spec_names_tell_kernels_apart() -> None:
    base = KernelSpec(plain("dense", "float32"), 3, 64, 64, 0.125)
    quantized = Part("ragged", Codec("int4", "channel", 32), Codec("int4", "token", 32))
    others = [
        replace(base, parts=plain("ragged", "float32")),
        replace(base, parts=plain("dense", "bfloat16")),
        replace(base, parts=(quantized, *base.parts)),
        replace(base, parts=(replace(quantized, layout="paged", page=16),)),
        replace(base, parts=(replace(quantized, layout="paged", page=32),)),
        replace(base, parts=(replace(quantized, value=quantized.key),)),
        replace(base, value_dim=32),
        replace(base, scores=True),
        replace(base, sink=True),
        replace(base, bias=True),
        replace(base, group=4),
        replace(base, head_dim=32),
        replace(base, sliding_window=16),
        replace(base, softcap=5.0),
        replace(base, softcap=50.0),
    ]
    assert len({s.name for s in (base, *others)}) == 1 + len(others)
    assert hash(base) == hash(replace(base))


MINE = Backend("mine", reference.attend)


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes entry points of other packages; what is loaded may be an error."""

    def install(name: str, loaded: Any) -> None:
        def load() -> Any:
            if isinstance(loaded, Exception):
                raise loaded
            return loaded

        entry = SimpleNamespace(name=name, value=f"elsewhere:{name}", load=load)
        for module in (extensions, names):
            monkeypatch.setattr(module, "entry_points", lambda group: [entry] if group == names.GROUP else [])
        dispatch.backends.cache_clear()

    yield install
    dispatch.backends.cache_clear()


def test_a_backend_of_another_package_is_chosen_by_name(plug: Callable[..., None]) -> None:
    plug("mine", MINE)
    assert choose("mine") is MINE
    assert choose("auto") in BUILT_IN
    with pytest.raises(KvcompileError, match="auto, cpp, triton, sdpa, reference, mine, got 'cuda'"):
        choose("cuda")


@pytest.mark.parametrize(
    ("name", "loaded", "message"),
    [
        ("other", MINE, "must be a Backend of that name"),
        ("mine", reference.attend, "must be a Backend of that name"),
        ("mine", ImportError("no such module"), "does not load, got no such module"),
        ("sdpa", replace(MINE, name="sdpa"), "backend 'sdpa' is there twice"),
    ],
)
def test_broken_backends_are_one_line(plug: Callable[..., None], name: str, loaded: Any, message: str) -> None:
    plug(name, loaded)
    with pytest.raises(KvcompileError, match=message):
        choose("mine")
    assert choose("sdpa") is SDPA, "what is here does not ask what is elsewhere"
