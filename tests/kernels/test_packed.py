"""Weights in few bits: what their formats say, how near they come, and that nothing but whole groups enters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels.names import WEIGHTS
from kvcompile.kernels.reference.packed import BLOCK, GROUP, PackedLinear, hollow, pack, rounded, unpack


def weights(features: int = 37, inner: int = 96, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(features, inner, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_int8_is_what_its_formula_says() -> None:
    """Of each group: scale = max |w| / 127 in half precision, codes to the nearest, as they lie."""
    weight = weights()
    packed = pack(weight, "int8")
    for row, group in ((0, 0), (17, 1), (36, 2)):
        own = weight[row, GROUP * group : GROUP * (group + 1)].double()
        scale = float((own.abs().max() / 127).half())
        assert float(packed.scales.view(torch.float16)[row // BLOCK, group, row % BLOCK]) == scale
        for k in range(GROUP):
            code = int(packed.codes[row // BLOCK, group, k // 4 * 64 + row % BLOCK * 4 + k % 4]) - 128
            assert code == round(float(own[k]) / scale)
            assert float(unpack(packed, torch.float64)[row, GROUP * group + k]) == pytest.approx(scale * code)


def test_int4_has_sixteen_values_a_group_and_the_ends_nearly() -> None:
    weight = weights()
    back = unpack(pack(weight, "int4"), torch.float32)
    for row in back.unflatten(1, (-1, GROUP)).flatten(0, 1):
        assert len(row.unique()) <= 16
    step = (weight.unflatten(1, (-1, GROUP)).amax(-1) - weight.unflatten(1, (-1, GROUP)).amin(-1)) / 15
    assert ((back - weight).abs() <= 2.2 * step.repeat_interleave(GROUP, 1)).all()
    whole = torch.arange(16.0).repeat(2) * 0.5 - 3  # a group that the format holds exactly
    assert torch.equal(unpack(pack(whole[None], "int4"), torch.float32)[0], whole)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_what_a_file_of_four_bits_held_stays(kind: str) -> None:
    """Also where a group uses few of its sixteen values; up to the lowest value of a group, rounded to fp16."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    weight = weights(64, 320)
    weight[:32] = weight[:32].abs() ** 3
    number = gguf.GGMLQuantizationType[kind]
    stored = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), number), number))
    back = unpack(pack(stored, "int4"), torch.float32)
    assert (back - stored).abs().max() <= 2**-11 * stored.abs().max()
    assert (stored - weight).abs().max() > 0.05


@pytest.mark.parametrize("format", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_how_near_they_come(format: str, dtype: torch.dtype) -> None:
    weight = weights(50, 320, dtype)
    packed = pack(weight, format)
    error = (unpack(packed, torch.float64) - weight.double()).norm() / weight.double().norm()
    assert error < (0.007 if format == "int8" else 0.08)
    size = sum(x.numel() * x.element_size() for x in (packed.codes, packed.scales, packed.lows) if x is not None)
    assert size == 64 * 320 * (8.5 if format == "int8" else 5) / 8


@pytest.mark.parametrize("format", WEIGHTS)
def test_nothing_and_little_stay_what_they_are(format: str) -> None:
    weight = torch.zeros(3, 2 * GROUP)
    weight[1] = 1e-9
    weight[2, :GROUP] = 0.25
    back = unpack(pack(weight, format), torch.float32)
    assert back.isfinite().all()
    assert torch.allclose(back, weight, rtol=1e-3, atol=1e-8)


def test_a_module_keeps_its_codes_when_it_is_cast() -> None:
    module = PackedLinear(pack(weights(), "int4"), torch.randn(37))
    before = module.weight
    cast = module.to(torch.bfloat16)
    assert cast.scales.dtype == torch.int16
    assert cast.weight.dtype == torch.bfloat16
    assert torch.equal(cast.float().weight, before)
    x = torch.randn(2, 5, 96)
    assert torch.allclose(cast(x), x @ before.T + cast.bias)
    assert "format=int4" in str(module)


@pytest.mark.parametrize("format", WEIGHTS)
def test_a_hollow_one_takes_the_state_of_another(format: str) -> None:
    module = PackedLinear(pack(weights(), format), torch.randn(37))
    other = hollow((37, 96), format, True, torch.float32, torch.device("cpu"))
    assert {n: x.shape for n, x in other.state_dict().items()} == {n: x.shape for n, x in module.state_dict().items()}
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)


def test_rows_are_rounded_by_group() -> None:
    x = torch.randn(3, 64)
    x[1, 40] = torch.nan
    x[2, :32] = 0
    codes, scales = rounded(x)
    back = (codes.unflatten(-1, (-1, GROUP)) * scales.unsqueeze(-1)).flatten(-2)
    assert (back[0] - x[0]).abs().max() <= scales[0].max() / 2 * 1.001
    assert back[1, 32:].isnan().all()
    assert back[1, :32].isfinite().all()
    assert (back[2, :32] == 0).all()


def test_what_is_no_whole_number_of_groups_is_refused() -> None:
    with pytest.raises(KvcompileError, match="multiples of 32"):
        pack(torch.randn(4, 40), "int8")
    with pytest.raises(KvcompileError, match="int8, int4"):
        pack(torch.randn(4, 32), "int2")
