"""RULER's word counting: the most common words of a list (`cwe`), the most frequent of a coded text (`fwe`).

Source: RULER, arXiv 2404.06654, section 3; `common_words_extraction.py` and `freq_words_extraction.py` of its code.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from random import Random

from kvcompile.tasks.ruler.base import Subtask
from kvcompile.tasks.ruler.needles import different
from kvcompile.tasks.ruler.wording import COMMON_WORDS, FREQUENT_WORDS, Draft
from kvcompile.tasks.ruler.words import Words

COMMON = 10  # words that are asked for
SHORT = 4096  # tokens below which RULER repeats words less


@dataclass(frozen=True)
class CommonWords(Subtask):
    """A numbered list in which ten words come more often than all others, with a worked example before it."""

    words: Words

    @property
    def least(self) -> int:
        """None but the common words."""
        return COMMON

    @property
    def most(self) -> int:
        """So many words there are."""
        return len(self.words.every)

    def draft(self, rng: Random, size: int, tokens: int) -> Draft:
        """size: different words."""
        short = tokens < SHORT
        worked = self._listed(rng, 20, 3, 1) if short else self._listed(rng, 40, 10, 3)
        prompt = worked.prompt
        example = f"{prompt.context}{prompt.question}{prompt.start} {_numbered(worked.answers)}\n"
        return self._listed(rng, size, 6, 1, example) if short else self._listed(rng, size, 30, 3, example)

    def _listed(self, rng: Random, size: int, often: int, seldom: int, example: str = "") -> Draft:
        words = rng.sample(self.words.every, size)
        common = words[:COMMON]
        listed = common * often + words[COMMON:] * seldom
        rng.shuffle(listed)
        return COMMON_WORDS.draft(_numbered(listed), tuple(common), example)


@dataclass(frozen=True)
class FrequentWords(Subtask):
    """Words of six letters whose counts follow a zeta distribution; the first of them is shown as dots.

    Of `size` words, rank k comes int(size k^-2 / zeta(2)) times, ranks 2 to 4 are asked for.
    """

    @property
    def least(self) -> int:
        """From here on rank 4 always comes more often than rank 5."""
        return 53

    def draft(self, rng: Random, size: int, tokens: int) -> Draft:
        """size: of the distribution; counts are rounded down, so words are a few less."""
        kinds = max(4, (tokens - FREQUENT_WORDS.tokens) // 50)
        coded = different(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), kinds)
        coded[0] = "..."
        zeta = math.pi**2 / 6
        text = [word for rank, word in enumerate(coded, 1) for _ in range(int(size * rank**-2.0 / zeta))]
        rng.shuffle(text)
        return FREQUENT_WORDS.draft(" ".join(text), tuple(coded[1:4]))


def _numbered(words: list[str] | tuple[str, ...]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
