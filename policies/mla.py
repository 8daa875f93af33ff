"""MLA: one latent a token in place of all heads' keys and values, and positions in a few numbers of their own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Family, LayerPlan, Plan
from kvcompile.plan.policy import Calibrator, Policy
from kvcompile.plan.structure import Factor, Latent

Select = Literal["position", "norm", "high", "low", "uniform"]
MEASURED = ("position", "norm")


@dataclass(frozen=True)
class MLA(Policy):
    """A row [k_R; c] per token and layer: `rope` numbers that RoPE turns, shared by all heads, and `rank` that every
    head's values and keys without position are made of (DeepSeek-V2, 2405.04434; conversions: TransMLA 2502.07864,
    MHA2MLA 2502.14837). Decoding never makes keys or values: queries and outputs are absorbed into the row.

    rank: numbers of the latent (0: what is left of half of the uncompressed keys and values). energy: instead, per
    layer as many as hold this share of the energy. rope: numbers with position (0: an eighth of keys and values).
    select: which RoPE components those are: the ones that lose most without `position`, or of largest `norm`, or of
    `high`, `low` or `uniform` frequencies. mix: components are mixtures of heads (RoRoPE), not heads alone.
    damp: the others keep the mean of their rotation instead of none. factor: fitted to `activations` on `tokens` tokens
    of text, or the SVD of the `weights`. tokens: length of that text.
    ranks, frequencies: per layer, as calibration found them.
    """

    name: ClassVar[str] = "mla"
    family: ClassVar[Family] = "structure"
    summary: ClassVar[str] = "one low-rank latent for the keys and values of all heads"
    rank: int = 0
    rope: int = 0
    energy: float | None = None
    select: Select = "position"
    mix: bool = True
    damp: bool = True
    factor: Factor = "activations"
    tokens: int = 4096
    ranks: list[int] = field(default_factory=list)
    frequencies: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.require(self.rank >= 0, "rank", "0 or more")
        self.require(self.rope >= 0 and self.rope % 2 == 0, "rope", "even, 0 or more")
        self.require(self.energy is None or 0 < self.energy <= 1, "energy", "in (0, 1]")
        self.require(self.energy is None or not self.rank, "energy", "null where rank is given")
        choices = (*MEASURED, "high", "low", "uniform")
        self.require(self.select in choices, "select", ", ".join(choices))
        self.require(self.factor in ("activations", "weights"), "factor", "activations or weights")
        self.require(self.tokens >= 16, "tokens", "16 or more")

    @property
    def fitted(self) -> bool:
        """Whether it looks at text."""
        return self.factor == "activations" or self.select in MEASURED

    @property
    def uncalibrated(self) -> str | None:
        """The rank of each layer by its energy, and which frequencies keep their position."""
        if self.energy is not None and not self.ranks:
            return "the rank of each layer"
        return "which frequencies keep their position" if self.select in MEASURED and not self.frequencies else None

    def calibrated(self, calibrator: Calibrator) -> Policy:
        """The policy with `ranks` and `frequencies` filled in where the loaded model decides."""
        if self.uncalibrated is None:
            return self
        from kvcompile.adapters.architectures import describe
        from kvcompile.calibration.activations import calibration_ids
        from kvcompile.structure.absorb import calibrate

        model: Any = calibrator.model
        plan = self.apply(describe(model.config, str(model.dtype).removeprefix("torch.")))
        plan.check()
        measured = self.select in MEASURED and not self.frequencies
        by = self.select if measured else None
        ids = calibration_ids(calibrator.tokenizer, self.tokens, self.name)
        ranks, frequencies = calibrate(model, plan, ids, by, None if self.ranks else self.energy)
        return replace(self, ranks=ranks or self.ranks, frequencies=frequencies or self.frequencies)

    def apply(self, plan: Plan) -> Plan:
        """Give every layer a latent row. Raises KvcompileError where its numbers do not fit."""
        for name in ("ranks", "frequencies"):
            values = getattr(self, name)
            if values and len(values) != len(plan.layers):
                raise KvcompileError(
                    f"stack.mla: {name} must be given for each of the {len(plan.layers)} layers",
                    len(values),
                    f"stack.mla.{name}=[] to calibrate",
                )
        return plan.record(self.name, self.family).map(self._compressed)

    def _compressed(self, p: LayerPlan) -> LayerPlan:
        if p.latent is not None:
            fix = "drop mla" if p.latent.native else "drop one"
            raise KvcompileError(f"layer {p.index}: a layer has only one latent", f"'mla' {p.latent.before}", fix)
        dense, most = 2 * p.kv_heads * p.head_dim, p.kv_heads * p.rotary
        if p.rotates and self.rope > most:
            raise KvcompileError(
                f"stack.mla: rope must be at most {most}, what RoPE turns in layer {p.index}", self.rope
            )
        rope = self.rope or min(most, dense // 16 * 2)
        frequencies = tuple(self.frequencies[p.index]) if self.frequencies else self._spread(p, rope // 2)
        free = rope - 2 * len(frequencies)  # a layer without positions has a longer latent instead
        rank = self.rank + free if self.rank else dense // 2 - 2 * len(frequencies)
        latent = Latent(
            self.ranks[p.index] if self.ranks else rank,
            frequencies,
            p.kv_heads,
            self.factor,
            self.mix,
            self.damp,
            self.tokens if self.fitted else 0,
            centred=self.factor == "activations" and not (p.softcap or p.sink),  # which see what is constant in logits
        )
        return replace(p, kv_heads=1, latent=latent)

    def _spread(self, p: LayerPlan, pairs: int) -> tuple[int, ...]:
        """The frequency of each of `pairs` pairs, ascending; where they are still to be measured, uniformly spread."""
        half, each = p.rotary // 2, -(-pairs // p.kv_heads)
        if not p.rotates or not pairs:
            return ()
        order = {"high": list(range(half)), "low": list(range(half))[::-1]}
        frequencies = order.get(self.select, [i * half // each for i in range(each)])
        return tuple(sorted([f for f in frequencies for _ in range(p.kv_heads)][:pairs]))
