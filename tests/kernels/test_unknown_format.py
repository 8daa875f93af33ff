"""A number format that generators were not written for is refused, never read as one that they know."""

from __future__ import annotations

import pytest
import torch

from kvcompile.errors import KvcompileError
from kvcompile.kernels import codecs
from kvcompile.kernels.cpp import backend, encode
from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.kernels.triton.emit import Kernels
from kvcompile.kernels.triton.forms import Form
from kvcompile.plan import storage
from kvcompile.plan.storage import Codec


def test_an_unknown_format_is_refused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 bits, its rows are half as long as generated code read them."""
    monkeypatch.setitem(storage.BITS, "nf4", 4)
    odd, own = Codec("nf4", "token"), Codec("float32")
    for key, value in ((odd, own), (own, odd)):
        parts = (Part("dense", key, value),)
        with pytest.raises(KvcompileError, match=r"kernels=triton knows float32.*got nf4t"):
            Kernels(KernelSpec(parts, 1, 64, 64, 0.125), Form())
        assert not backend.generated(parts, "float32"), "the library decodes it, and refuses"
    for call in (codecs.encode, encode.encode):
        with pytest.raises(KvcompileError, match="number formats are"):
            call(torch.ones(2, 64), odd)
    with pytest.raises(KvcompileError, match="number formats are"):
        codecs.decode(torch.ones(2, 32, dtype=torch.uint8), torch.ones(2, 2, 1, dtype=torch.float16), odd)


def test_the_encoder_of_route_triton_refuses_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from kvcompile.kernels.triton.encode import Encoder

    monkeypatch.setitem(storage.BITS, "nf4", 4)
    with pytest.raises(KvcompileError, match="got nf4t"):
        Encoder(Codec("nf4", "token"), 64)
