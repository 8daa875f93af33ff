"""RULER's needles in a haystack (`niah_*`): values with keys, hidden in noise, in a text or among other needles.

Source: RULER, arXiv 2404.06654, section 3 and appendix B; `niah.py` and `synthetic.yaml` of its code.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from kvcompile.tasks.ruler.base import Subtask
from kvcompile.tasks.ruler.wording import NEEDLE, NEEDLES, NOISE, ONE_NEEDLE, Draft
from kvcompile.tasks.ruler.words import Words

DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent of the sentences, where needles stand in a text
Kind = Literal["words", "numbers", "uuids"]
SETTINGS: dict[str, dict[str, Any]] = {  # of RULER's synthetic.yaml
    "niah_single_1": {"haystack": "noise"},
    "niah_single_2": {},
    "niah_single_3": {"value": "uuids"},
    "niah_multikey_1": {"keys": 4},
    "niah_multikey_2": {"haystack": "needles"},
    "niah_multikey_3": {"haystack": "needles", "key": "uuids", "value": "uuids"},
    "niah_multivalue": {"values": 4},
    "niah_multiquery": {"keys": 4, "queries": 4},
}


@dataclass(frozen=True)
class Needles(Subtask):
    """`keys` keys with `values` values each; `queries` of the keys are asked for, all in one question.

    Attributes:
        words: that keys are made of. text: sentences of the haystack `text`.
        haystack: `text`, `noise` (the same few sentences over and over) or `needles` (others).
        key, value: what they look like.
    """

    words: Words
    text: tuple[str, ...]
    haystack: Literal["text", "noise", "needles"] = "text"
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def least(self) -> int:
        """Every needle takes the place of another sentence."""
        return self.keys * self.values

    @property
    def most(self) -> int | None:
        """Half of all keys, where each needle has one of its own: drawing the last ones takes long."""
        if self.haystack == "needles" and self.key == "words":
            return len(self.words.first) * len(self.words.second) // 2
        return None

    def draft(self, rng: Random, size: int, tokens: int) -> Draft:
        """size: words of the text, lines of the noise, or other needles."""
        keys = different(lambda: self._draw(rng, self.key), self.keys)
        values = [[self._draw(rng, self.value) for _ in range(self.values)] for _ in keys]
        needles = [self._needle(key, value) for key, each in zip(keys, values, strict=True) for value in each]
        rng.shuffle(needles)
        asked = rng.sample(range(self.keys), self.queries)
        context = self._among_sentences(rng, needles, size) if self.haystack == "text" else ""
        if self.haystack == "noise":
            context = _among_lines(rng, needles, [NOISE] * size)
        if self.haystack == "needles":
            others = different(lambda: self._draw(rng, self.key), size, set(keys))
            lines = [self._needle(key, self._draw(rng, self.value)) for key in others]
            context = _among_lines(rng, needles, lines)
        queries = [keys[i] for i in asked]
        query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
        answers = tuple(value for i in asked for value in values[i])
        if len(answers) == 1:
            return ONE_NEEDLE.draft(context, answers, kind=self.value.removesuffix("s"), query=query)
        return NEEDLES.draft(context, answers, kind=self.value, query=query)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value, key=key, value=value)

    def _draw(self, rng: Random, kind: Kind) -> str:
        if kind == "words":
            return self.words.key(rng)
        if kind == "numbers":
            return str(rng.randint(10**6, 10**7 - 1))
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def _among_sentences(self, rng: Random, needles: list[str], size: int) -> str:
        """Needles between the sentences of the first `size` words of the text, at depths drawn from `DEPTHS`."""
        sentences = first_words(self.text, size)
        places = [int(len(sentences) * depth / 100) for depth in sorted(rng.sample(DEPTHS, len(needles)))]
        pieces = []
        for start, end, needle in zip([0, *places], places, needles, strict=False):
            pieces += [*sentences[start:end], needle]
        return " ".join([*pieces, *sentences[places[-1] :]])


def needles(words: Words, text: tuple[str, ...]) -> dict[str, Needles]:
    """All tasks of this kind by their names."""
    return {name: Needles(words, text, **settings) for name, settings in SETTINGS.items()}


def first_words(text: tuple[str, ...], size: int) -> list[str]:
    """Sentences of so many words in all, from the front again where the text ends; the last one may be cut."""
    sentences: list[str] = []
    for sentence in itertools.cycle(text):
        parts = sentence.split()
        sentences.append(" ".join(parts[:size]))
        size -= len(parts)
        if size <= 0:
            break
    return sentences


def different(draw: Callable[[], str], count: int, without: set[str] | None = None) -> list[str]:
    """So many different things drawn, none of `without`."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        if (item := draw()) not in (without or ()):
            drawn[item] = None
    return list(drawn)


def _among_lines(rng: Random, needles: list[str], lines: list[str]) -> str:
    places = sorted(rng.sample(range(len(lines)), len(needles)), reverse=True)
    for place, needle in zip(places, needles, strict=True):
        lines.insert(place, needle)
    return "\n".join(lines)
