"""What a task of RULER's is: drafts of a size, and the size that fills a number of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from kvcompile.errors import KvcompileError
from kvcompile.tasks.prompt import Encoder
from kvcompile.tasks.ruler.wording import Draft


@dataclass(frozen=True)
class Subtask:
    """One of RULER's tasks."""

    @property
    def least(self) -> int:
        """The smallest size of a context."""
        return 1

    @property
    def most(self) -> int | None:
        """The largest size that there is material for, None where there is no end to it."""
        return None

    def draft(self, rng: Random, size: int, tokens: int) -> Draft:
        """A prompt with a context of a size: sentences, needles, words or documents.

        tokens: that prompt and answer may have together, on which RULER makes some of its settings depend.
        """
        raise NotImplementedError

    def fitted(self, name: str, encoder: Encoder, seed: str, tokens: int) -> Draft:
        """The longest prompt that leaves room for its answer in `tokens`, the same for the same seed.

        Raises KvcompileError where not even the shortest does, or there is no material for a longer one.
        """

        def draft(size: int) -> Draft:
            return self.draft(Random(seed), size, tokens)

        def length(size: int) -> int:
            written = draft(size)
            return len(encoder.ids(written.prompt)) + written.wording.tokens

        size = largest(length, tokens, self.least, self.most)
        if size is None:
            raise KvcompileError(f"tasks.ruler: {name} needs more tokens", tokens, f"{length(self.least)} or more")
        if size == self.most:
            raise KvcompileError(
                f"tasks.ruler: {name} of {tokens:,} tokens needs more words than there are",
                self.most,
                "words=wonderwords, or a file of more words",
            )
        return draft(size)


def largest(length: Callable[[int], int], room: int, least: int, most: int | None = None) -> int | None:
    """The largest size, `least` to `most`, whose length is at most `room`; None where that of the least is not.

    length: about linear, which makes for few calls: they are the tokens of whole prompts. Of a length that falls in
    between, the size is one that fits, and the next one does not.
    """
    low, high = (least, length(least)), None
    if low[1] > room:
        return None
    start, size = low, 2 * least
    for turn in itertools.count(1):
        if low[0] == most or (high is not None and high[0] - low[0] == 1):
            return low[0]
        size = size if most is None else min(size, most)
        point = (size, length(size))
        low, high = (point, high) if point[1] <= room else (low, point)
        (a, at_a), (b, at_b) = (low, high) if high is not None else (start, low)
        steps = int((room - low[1]) * (b - a) / max(1, at_b - at_a))
        size = low[0] + max(1, min(steps, 7 * low[0]))
        if high is not None:
            size = min(size, high[0] - 1) if turn % 4 else (low[0] + high[0]) // 2
    return None
