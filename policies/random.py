"""Random tokens: the honest baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.plan.selection import Needs, Score
from kvcompile.policies.base import SelectionPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation

MIX = 1_000_003  # a prime, so that (seed, layer, tokens) rarely share a stream


@dataclass(frozen=True)
class Uniformly(Score):
    """s[h, j] uniform in [0, 1), drawn by (seed, layer, tokens seen) for every KV head and true position."""

    seed: int

    needs = Needs(traceable=False)  # the numbers come from a generator that Python seeds
    comparable = True

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`; the same on every machine and in every batch."""
        import torch

        generator = torch.Generator().manual_seed((self.seed * MIX + seen.layer) * MIX + seen.tokens)
        drawn = torch.rand(
            seen.positions.shape[0], seen.tokens, generator=generator, dtype=torch.float32, device="cpu"
        ).to(seen.keys.device)
        return drawn.gather(1, seen.positions.clamp(min=0).long())


@dataclass(frozen=True)
class Random(SelectionPolicy):
    """Keep random tokens and the sinks: what any other policy must beat.

    seed: of the draw; the same seed keeps the same tokens of a prompt.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "random tokens: the honest baseline"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.seed < 2**20, "seed", "in 0..1048575")

    def score(self) -> Score:
        """Uniform random numbers."""
        return Uniformly(self.seed)
