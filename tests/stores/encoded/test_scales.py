"""Scales are float16: numbers that they cannot hold are refused by layer, never decoded to others in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model

from kvcompile.adapters.architectures import describe
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.kernels import codecs
from kvcompile.kernels.dispatch import named
from kvcompile.plan.storage import Codec
from kvcompile.stack import apply_stack, build_stack
from kvcompile.stores.encoded.codes import Codes, Format
from kvcompile.stores.encoded.scales import require_held

FORMATS = {
    "int8": (Codec("int8", "token"), Codec("int8", "token")),
    "fp8": (Codec("float8", "token"), Codec("float8", "token")),
    "kivi 4": (Codec("int4", "channel", 32), Codec("int4", "token", 32)),
    "kivi 2": (Codec("int2", "channel", 32), Codec("int2", "token", 32)),
    "values": (Codec("float32"), Codec("int8", "token")),
}
ORDINARY = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
formats = pytest.mark.parametrize("codecs_of", FORMATS.values(), ids=FORMATS)


def errors(x: torch.Tensor, format: Format) -> tuple[float, float]:
    """Error of decoded keys and values over the size of `x`."""
    decoded = Codes.of(x, x, torch.arange(len(x)), format).decoded(format)[:2]
    return tuple(float((each - x).double().norm() / x.double().norm()) for each in decoded)  # type: ignore[return-value]


def checked(x: torch.Tensor, format: Format) -> None:
    require_held(Codes.of(x, x, torch.arange(len(x)), format), (x, x), format, "int8", 3)


@pytest.mark.parametrize("backend", ["sdpa", "cpp"])
@formats
def test_what_is_not_refused_is_as_exact_as_ever(codecs_of: tuple[Codec, Codec], backend: str) -> None:
    """From 1e-12 to 1e30: other than ordinary numbers are refused, or as close as those are."""
    format, said = Format(*codecs_of, torch.float32, named(backend).encode), {}
    usual = errors(ORDINARY, format)
    for power in range(-12, 31):
        x = ORDINARY * 10.0**power
        try:
            checked(x, format)
        except KvcompileError as error:
            said[power] = str(error)
        else:
            assert all(got <= 2.2 * ordinary for got, ordinary in zip(errors(x, format), usual, strict=True))
    assert {-12, -9, 9, 30} <= set(said)
    assert not set(said) & set(range(-3, 5))
    assert all("int8: layer 3: float16 scales" in text for text in said.values())
    assert all("add 3 to stack.int8.skip_layers" in text for text in said.values())


@formats
def test_ordinary_rows_beside_odd_ones_are_not_refused(codecs_of: tuple[Codec, Codec]) -> None:
    format = Format(*codecs_of, torch.float32)
    small = ORDINARY.clone()
    small[:32] *= 1e-9
    for x in (small, torch.zeros(64, 32), torch.full((64, 32), 5.0001), ORDINARY + 100, ORDINARY.bfloat16()):
        checked(x, format)


def test_the_infinity_of_the_model_itself_is_its_own() -> None:
    for odd in (float("nan"), float("inf")):
        x = ORDINARY.clone()
        x[0, 0] = odd
        checked(x, Format(*FORMATS["int8"], torch.float32))


@pytest.mark.parametrize("values", [7e4, -7e4])
def test_large_numbers_that_differ_little_are_refused(values: float) -> None:
    with pytest.raises(KvcompileError, match="values up to 7e"):
        checked(torch.full((64, 32), values), Format(*FORMATS["int8"], torch.float32, codecs.encode))


@pytest.mark.parametrize("policy", ["int8", "kivi", "fp8"])
@pytest.mark.parametrize("factor", [1e8, 1e-8])
def test_a_model_of_huge_or_tiny_values_says_which_layer_to_skip(policy: str, factor: float) -> None:
    """What its output projection undoes: dense, the model is the one without the factor."""

    def compiled(**fields: Any) -> Any:
        model = tiny_model()
        attention = model.model.layers[2].self_attn
        with torch.no_grad():
            attention.v_proj.weight *= factor
            attention.o_proj.weight /= factor
        stack = {policy: {**({"residual": 32, "bits": 8} if policy == "kivi" else {}), **fields}}
        return compile_plan(model, apply_stack(describe(model.config, "float32"), build_stack([policy], stack)), "sdpa")

    ids, options = tiny_ids(1, 96), {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(KvcompileError, match=rf"add 2 to stack\.{policy}\.skip_layers"):
        compiled().generate(ids, **options)
    assert compiled(skip_layers=[2]).generate(ids, **options).shape == (1, 99)
