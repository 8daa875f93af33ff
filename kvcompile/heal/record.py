"""What a healing did, as plain data for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Point:
    """One logged step. loss: mean training loss since the point before; None where only quality was measured.

    stage: `layers` (each attention alone) or `model` (end to end): their losses do not compare.
    """

    step: int
    tokens: int
    seconds: float
    stage: str
    loss: float | None = None
    lr: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class HealRecord:
    """The whole training. perplexity: (original, converted, healed) on the held-out text, without a cache.

    parameters: how many were trained; seconds: of wall clock, over all sessions of a resumed training.
    """

    loss: str
    weights: str
    source: str
    tokens: int
    steps: int
    seconds: float
    parameters: int
    perplexity: tuple[float, float, float]
    curve: list[Point] = field(default_factory=list)

    @property
    def gap_closed(self) -> float:
        """Share of what the conversion cost that is regained: (converted - healed) / (converted - original)."""
        original, converted, healed = self.perplexity
        return (converted - healed) / (converted - original) if converted != original else 0.0

    @staticmethod
    def from_json(data: dict[str, Any]) -> HealRecord:
        """The inverse of `dataclasses.asdict`."""
        curve = [Point(**point) for point in data["curve"]]
        return HealRecord(**{**data, "perplexity": tuple(data["perplexity"]), "curve": curve})
