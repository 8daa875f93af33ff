"""Whether the scales of a number format, which are float16, could hold what was encoded with them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels.codecs import decode, encode
from kvcompile.plan.storage import Codec
from kvcompile.stores.encoded.codes import Codes, Format

COARSE = 2.0**-18  # of float16's steps of 2^-24, 64 or fewer: from here on a scale's rounding is worth a look
WORSE = 2.0  # times the error that the same numbers have where float16 holds their scales in full


def require_held(codes: Codes, plain: Sequence[Tensor], format: Format, policy: str, layer: int) -> None:
    """Raise KvcompileError, naming the layer, where `given` (keys, values) cannot be told from `codes`.

    Read back are the largest scale of keys and that of values, no more, unless one is out of the ordinary. An encoding
    is judged as a whole: small groups beside large ones are off by 255 x 2^-25 at most.
    """
    keys, values = plain
    sides = (
        ("keys", keys, codes.keys, codes.key_scales, format.key),
        ("values", values, codes.shown, codes.value_scales, format.value),
    )
    scaled = [(*side, side[3][..., 0, :]) for side in sides if side[3] is not None]  # zeros lie behind scales
    if not scaled:
        return
    largest = torch.stack([part.abs().amax() for *_, part in scaled]).tolist()
    for (name, x, stored, scales, codec, _), scale in zip(scaled, largest, strict=True):
        if not ordinary(scale) and _lost(x, stored, scales, codec):
            raise KvcompileError(
                f"{policy}: layer {layer}: float16 scales must be able to hold its {name}",
                f"values up to {float(x.abs().amax()):.3g}",
                f"add {layer} to stack.{policy}.skip_layers: that layer then keeps the model's dtype",
            )


def ordinary(scale: float) -> bool:
    """Whether float16 holds scales up to this largest one so well that nobody need look closer."""
    return math.isfinite(scale) and scale >= COARSE


def _lost(x: Tensor, stored: Tensor, scales: Tensor | None, codec: Codec) -> bool:
    """Whether finite numbers `x [n, D]` became infinite or far coarser than they are where scales are held in full."""
    most = float(x.abs().amax())
    if not math.isfinite(most) or not most:
        return False  # the model's own infinity; zeros are zeros
    unit = 2.0 ** min(1000, -math.floor(math.log2(most)))
    ideal = x.double() * unit
    error = (decode(stored, scales, codec, torch.float64) * unit - ideal).square().mean()
    expected = (decode(*encode(ideal, codec), codec, torch.float64) - ideal).square().mean()
    return not bool(error.sqrt() <= WORSE * expected.sqrt())
