"""By what rule entries are scored by what their own text looks back at, as data (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class GhostRule:
    """What is alike for all calls of a layer; the formula is in `kvcompile.kernels.reference.ghost`.

    chunk: tokens that see one another, from true positions on that are multiples of it; 0: all tokens of a call.
    band: how far from a token the entries lie that it scores; 0: it scores all of its chunk.
    scale, softcap: of the layer's attention.
    own_from: true position from which on entries weigh a second time, the sinks before it being there once.
    """

    chunk: int
    band: int
    scale: float
    softcap: float | None = None
    own_from: int = 0

    def chunks(self, start: int, tokens: int) -> Iterator[tuple[int, int]]:
        """Where each chunk begins and ends among `tokens` tokens, the first at true position `start`."""
        begin = 0
        while begin < tokens:
            end = begin + self.chunk - (start + begin) % self.chunk if self.chunk else tokens
            yield begin, min(end, tokens)
            begin = end
