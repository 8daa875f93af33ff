"""Words that keys and lists are made of: those of the offline text, of a file, or of the package wonderwords."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from random import Random

from kvcompile.calibration.text import LIBRARY, REFERENCE, sentences
from kvcompile.errors import KvcompileError

TEXT, WONDERWORDS = "text", "wonderwords"
_WORD = re.compile(r"(?<![\w.-])[a-z]{5,10}(?![\w-]|\.\w)")  # not a part of a name or of a compound


@dataclass(frozen=True)
class Words:
    """Different words, sorted. Keys of needles are pairs of one of `first` and one of `second`."""

    every: tuple[str, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]

    def key(self, rng: Random) -> str:
        """Two words with a hyphen between them."""
        return f"{rng.choice(self.first)}-{rng.choice(self.second)}"


@functools.cache
def words(source: str) -> Words:
    """The words of a source.

    `text`: of Python's documentation, no word with another one at its front. `wonderwords`: nouns, adjectives and verbs
    of that package, which RULER has its words from. Otherwise the path of a text file, all words that are in it.
    Raises KvcompileError for a source that cannot be read, or has fewer than 100 words.
    """
    if source == WONDERWORDS:
        return _wonderwords()
    if source == TEXT:
        text = " ".join([*sentences(REFERENCE), *sentences(LIBRARY)])
        every = _prefix_free(sorted(set(_WORD.findall(text))))
    else:
        every = tuple(sorted(set(_read(source).split())))
        if len(every) < 100:
            raise KvcompileError(f"tasks.ruler: {Path(source).name} must hold 100 words or more", len(every))
    return Words(every, every, every)


def _prefix_free(ordered: list[str]) -> tuple[str, ...]:
    """A word of the answer would be found in every longer word that begins with it."""
    kept: list[str] = []
    for word in ordered:
        if not kept or not word.startswith(kept[-1]):
            kept.append(word)
    return tuple(kept)


def _read(source: str) -> str:
    try:
        return Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KvcompileError(
            "tasks.ruler: words must be `text`, `wonderwords`, or the path of a text file", f"{source!r} ({error})"
        ) from error


def _wonderwords() -> Words:
    try:
        folder = resources.files(WONDERWORDS) / "assets"
    except ModuleNotFoundError as error:
        raise KvcompileError(
            "tasks.ruler: words=wonderwords needs that package", "none", "pip install wonderwords"
        ) from error
    lists = [(folder / f"{kind}list.txt").read_text("utf-8").split("\n") for kind in ("adjective", "noun", "verb")]
    adjectives, nouns, verbs = ({w.strip() for w in each if w.strip()} for each in lists)
    return Words(tuple(sorted(adjectives | nouns | verbs)), tuple(sorted(adjectives)), tuple(sorted(nouns)))
