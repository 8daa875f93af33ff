"""KIVI: asymmetric integers, keys per channel, values per token, and a residual of recent tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.storage import Codec
from kvcompile.policies.base import require_layers
from kvcompile.policies.quantized import QuantizedPolicy

if TYPE_CHECKING:
    from kvcompile.plan.policy import Calibrator

BITS = (2, 4, 8)
CALIBRATION_TOKENS = 512


@dataclass(frozen=True)
class KIVI(QuantizedPolicy):
    """Old tokens as integers of 2, 4 or 8 bits with a scale and a zero a group (arXiv 2402.02750).

    x = code * scale + zero, scale = (max - min) / (2^bits - 1), zero = min. Keys: groups of `group` tokens of a channel
    (outliers sit in channels); values: groups of `group` channels of a token (of all, where the head has fewer).
    Tokens older than the `residual` newest are encoded after each prefill, and while decoding in whole groups; the
    paper encodes keys `residual` at a time, and values one by one.

    bits: of keys and of values. key_bits, value_bits: bits of the one, over `bits`.
    group: numbers that share a scale and a zero. residual: newest tokens that keep the model's dtype, a multiple of
    `group`.
    key_axis: `token` gives keys scales as values have them: rows need no whole groups of tokens then, so short rows
    are encoded to the last token; best after `rotate`, which spreads the outliers of a channel over the head.
    wide_layers: layers whose keys have 8 bits, whatever the others have.
    most_noise: nats; layers whose logits encoded keys move by more (standard deviation over a text) become wide ones
    when a model is compiled. A first layer whose keys are long (Qwen2) is one: what it keeps costs little in 8 bits,
    and in 4 its entries are taken for one another. null: none does.
    """

    name: ClassVar[str] = "kivi"
    summary: ClassVar[str] = "2, 4 or 8 bit integers: keys per channel, values per token"
    bits: int = 4
    key_bits: int | None = None
    value_bits: int | None = None
    group: int = 32
    residual: int = 128
    key_axis: Literal["channel", "token"] = "channel"
    wide_layers: list[int] = field(default_factory=list)
    most_noise: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bits", "key_bits", "value_bits"):
            chosen = getattr(self, name)
            self.require(chosen in BITS or (chosen is None and name != "bits"), name, "2, 4 or 8")
        self.require(self.group >= 1, "group", "1 or more")
        self.require(self.key_axis in ("channel", "token"), "key_axis", "channel or token")
        whole = self.key_axis == "token" or self.residual % self.group == 0
        self.require(whole, "residual", f"a multiple of the group, {self.group}")
        self.require(self.most_noise is None or self.most_noise > 0, "most_noise", "above 0, or null")

    def require_calibratable(self, tokenizer: Any) -> None:
        """Noise is measured on a text. Raises KvcompileError without a tokenizer."""
        if self.most_noise is not None and tokenizer is None:
            raise KvcompileError(
                "kivi needs a tokenizer to measure what its codes do to logits",
                "none",
                "pass tokenizer=, or set stack.kivi.most_noise=null",
            )

    @property
    def uncalibrated(self) -> str | None:
        """Which layers are wide, where noise says so."""
        return None if self.most_noise is None else "which layers' keys need 8 bits"

    def calibrated(self, calibrator: Calibrator) -> KIVI:
        """The policy with the layers above `most_noise` among the `wide_layers`."""
        if self.most_noise is None:
            return self
        from kvcompile.calibration.activations import calibration_ids

        ids = calibration_ids(calibrator.tokenizer, CALIBRATION_TOKENS, self.name)
        loud = [i for i, noise in calibrator.noise(ids).items() if noise > self.most_noise]
        return replace(self, wide_layers=sorted({*self.wide_layers, *loud}), most_noise=None)

    def apply(self, plan: Plan) -> Plan:
        """As all that encode. Raises KvcompileError for a wide layer that the model has not."""
        require_layers(plan, self.name, self.wide_layers, "wide_layers")
        return super().apply(plan)

    def store(self, p: LayerPlan) -> LayerPlan:
        """With these codecs, keys of wide layers in 8 bits."""
        p = super().store(p)
        if p.index not in self.wide_layers or p.storage.key is None:
            return p
        key = replace(p.storage.key, kind="int8")
        return replace(p, storage=replace(p.storage, key=key, value=key if p.latent else p.storage.value))

    def codecs(self, dim: int) -> tuple[Codec, Codec]:
        """Per channel, per token."""
        key, value = self.key_bits or self.bits, self.value_bits or self.bits
        values = min(self.group, dim)
        keys = values if self.key_axis == "token" else self.group
        return Codec(f"int{key}", self.key_axis, keys), Codec(f"int{value}", "token", values)
