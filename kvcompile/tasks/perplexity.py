"""Task `perplexity`: text read through the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvcompile.tasks.base import Sample, Task, Turn


@dataclass(frozen=True)
class Perplexity(Task):
    """Perplexity of the `scored` tokens after contexts of `tokens` tokens, `windows` of each text.

    A text: `reference` (the part of Python's language reference that nothing is trained on), `library` (docstrings of
    its standard library), or the path of a text file. Windows are spread evenly over a text.
    """

    name: ClassVar[str] = "perplexity"
    summary: ClassVar[str] = "perplexity of text read through the cache"
    metric: ClassVar[str] = "perplexity"
    tokens: int = 1024
    scored: int = 96
    windows: int = 8
    texts: tuple[str, ...] = ("reference", "library")

    def __post_init__(self) -> None:
        for field in ("tokens", "windows"):
            self.require(getattr(self, field) >= 1, field, "1 or more")
        self.require(self.scored >= 2, "scored", "2 or more")
        self.require(len(self.texts) > 0, "texts", "one or more")

    def make_samples(self, tokenizer: Any, longest: int) -> Sequence[Sample]:
        """The windows of every text."""
        import torch

        from kvcompile.calibration.text import REFERENCE, sentences, split
        from kvcompile.evaluation.perplexity import spread

        self.require_short(self.tokens + self.scored + 1, longest)
        samples = []
        for name in self.texts:
            text = split(sentences())[1] if name == REFERENCE else sentences(name)
            ids = torch.tensor(tokenizer(" ".join(text))["input_ids"], dtype=torch.int64, device="cpu")
            for i, window in enumerate(spread(ids, self.tokens, self.scored, self.windows).tolist()):
                part = Path(name).name
                context, rest = tuple(window[: self.tokens]), tuple(window[self.tokens :])
                samples.append(Sample(f"{part} {i + 1}", part, context, rest=rest))
        return samples

    def score(self, said: str, turn: Turn, sample: Sample) -> float:
        """Never asked: samples have no turns."""
        raise NotImplementedError
