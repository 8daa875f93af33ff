"""Protects the words that keys and lists are made of: many, different, none within another's front."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random

import pytest

from kvcompile.errors import KvcompileError
from kvcompile.tasks.ruler.words import words


def test_words_of_the_text_are_many_and_none_begins_another() -> None:
    """An answer is found wherever it stands, so it must not be the front of another word."""
    every = words("text").every
    assert len(every) > 1000
    assert list(every) == sorted(set(every))
    assert all(word.isalpha() and word.islower() and 5 <= len(word) <= 10 for word in every)
    assert not any(after.startswith(before) for before, after in itertools.pairwise(every))


def test_words_of_a_file_are_all_that_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{i}" for i in range(200)) + "\nw7 w8\n")
    assert len(words(str(path)).every) == 200
    path = tmp_path / "few.txt"
    path.write_text("one two")
    with pytest.raises(KvcompileError, match=r"few\.txt must hold 100 words or more, got 2"):
        words(str(path))
    with pytest.raises(KvcompileError, match="words must be `text`, `wonderwords`, or the path of a text file"):
        words(str(tmp_path / "absent.txt"))


def test_wonderwords_are_those_of_the_paper() -> None:
    pytest.importorskip("wonderwords", reason="the package wonderwords is not installed")
    first, _, second = words("wonderwords").key(Random(0)).partition("-")
    assert first in words("wonderwords").first
    assert second in words("wonderwords").second
