"""Levels of a table under generated C++: as whole numbers where fixed point is exact enough, else as floats."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kvcompile.kernels import reference
from kvcompile.kernels.cpp import backend, build
from kvcompile.kernels.cpp.emit import integer_keys, integer_values
from kvcompile.kernels.cpp.emit.stored import Stored
from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.plan import formats
from kvcompile.plan.formats import Table
from kvcompile.plan.storage import Codec

sys.path.insert(0, str(Path(__file__).parent.parent))

from quantized import case

CODECS = [Codec("nf4", "token", 64), Codec("nf4", "token"), Codec("nf4", "channel", 32)]
POWERS = Table("powers", 4, levels=(*(-(2.0**-i) for i in range(8)), *(2.0**-i for i in reversed(range(8)))))


def whole(codec: Codec) -> bool:
    """Whether a decode kernel of such keys and values looks codes up as whole numbers."""
    spec = KernelSpec((Part("dense", codec, codec),), 2, 128, 128, 0.1)
    return "const int16_t* levels" in backend.source(spec, torch.float32)


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
@pytest.mark.parametrize("dim", [64, 128, 512])
def test_what_fixed_point_adds_is_far_below_what_nf4_rounds_off(codec: Codec, dim: int) -> None:
    """At most 1/300 of half the distance between two levels; keys and values have 16 bits for a level."""
    levels = formats.number_format("nf4").levels  # type: ignore[attr-defined]
    closest = min(high - low for low, high in pairwise(levels))
    for side in (integer_keys, integer_values):
        fixed = side.fixed_point(Stored(codec, dim))
        if fixed is None:  # values whose scales are a channel's are floats anyway
            assert (side, codec.axis) == (integer_values, "channel")
            continue
        assert fixed.levels[7] == 0
        assert max(map(abs, fixed.levels)) == fixed.most < 2**15
        off = [abs(n * float(fixed.unit[:-1]) - level) for n, level in zip(fixed.levels, levels, strict=True)]
        assert max(off) < closest / 2 / 300


def test_a_decode_step_multiplies_whole_numbers() -> None:
    assert all(map(whole, CODECS))


@pytest.mark.skipif(build.available() is not None, reason="no C++ compiler here")
def test_levels_that_lie_close_stay_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """1/128 of the largest from each other: in fixed point, products would be off by more than sums of floats are."""
    monkeypatch.setitem(formats.BUILT_IN, "powers", POWERS)
    codec = Codec("powers", "token", 32)
    assert not whole(codec)
    made = case(KernelSpec((Part("ragged", codec, codec),), 2, 64, 64, 0.125), [[70, 300, 9, 64]], 2, 2)
    got, expected = (way.attend(made.queries, made.view, made.spec).double() for way in (backend, reference))
    assert float((got - expected).norm() / expected.norm()) < 2e-5
