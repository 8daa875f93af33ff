"""A number format that generators were not written for is decoded by the library, never read as one that they know."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from kvcompile.errors import KvcompileError
from kvcompile.kernels import codecs
from kvcompile.kernels.cpp import encode
from kvcompile.kernels.dispatch import CPP, SDPA, TRITON, describe, serving
from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.kernels.triton.emit import Kernels
from kvcompile.kernels.triton.forms import Form
from kvcompile.plan import extensions, formats
from kvcompile.plan.formats import Integer
from kvcompile.plan.storage import Codec

ODD, OWN = Codec("odd4", "token"), Codec("float32")


class Odd(Integer):
    """Integers from which decoding takes a half."""

    def decode(self, codes: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return super().decode(codes - 0.5, *parameters)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    entry = SimpleNamespace(name="odd4", value="elsewhere:odd4", load=lambda: Odd("odd4", 4))
    monkeypatch.setattr(extensions, "entry_points", lambda group: [entry] if group == formats.GROUP else [])
    formats.installed.cache_clear()
    yield
    formats.installed.cache_clear()


@pytest.mark.parametrize(("key", "value"), [(ODD, OWN), (OWN, ODD)], ids=["keys", "values"])
def test_no_kernel_is_generated(key: Codec, value: Codec) -> None:
    """Of 4 bits, with two parameters: to generators that ask for no more it looks like int4."""
    spec = KernelSpec((Part("dense", key, value),), 1, 64, 64, 0.125)
    with pytest.raises(KvcompileError, match=r"kernels=triton knows float32.*got odd4t"):
        Kernels(spec, Form())
    for backend in (CPP, TRITON):
        assert serving(backend, spec, torch.float32) is SDPA
        assert describe(backend, spec, torch.float32) == f"sdpa ({backend.name} has no kernel for it in float32)"


def test_it_is_encoded_and_decoded_by_its_own_functions() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for call in (codecs.encode, encode.encode):
        codes, scales = call(x, ODD)
        plain = codecs.decode(codes, scales, Codec("int4", "token"))
        assert torch.allclose(codecs.decode(codes, scales, ODD), plain - scales[:, :1, 0].float() / 2, atol=1e-6)


def test_the_encoder_of_triton_refuses_it_too() -> None:
    pytest.importorskip("triton")
    from kvcompile.kernels.triton.entries.encode import Encoder

    with pytest.raises(KvcompileError, match="got odd4t"):
        Encoder(ODD, 64)


def test_a_format_that_no_package_has_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(KvcompileError, match=r"number formats are float64.*nf4, odd4, got 'nf5'"):
        codecs.encode(torch.ones(2, 64), Codec("nf5", "token"))
