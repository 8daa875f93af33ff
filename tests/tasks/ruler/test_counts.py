"""Protects word counting: the answers really are the words that come most often, by the definition's numbers."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest

from kvcompile.tasks.ruler.counts import CommonWords, FrequentWords
from kvcompile.tasks.ruler.words import words

ITEM = re.compile(r"(\d+)\. ([a-z]+)")


@pytest.mark.parametrize(
    ("tokens", "size", "often", "seldom", "worked"),
    [(1024, 50, 6, 1, (20, 3, 1)), (4096, 60, 30, 3, (40, 10, 3))],
)
def test_common_words(tokens: int, size: int, often: int, seldom: int, worked: tuple[int, int, int]) -> None:
    draft = CommonWords(words("text")).draft(Random(3), size, tokens)
    example, context = draft.prompt.context.rstrip().split("\nBelow is")
    listed = ITEM.findall(context)
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    assert {word for word, n in counts.items() if n == often} == set(draft.answers)
    assert Counter(counts.values()) == {often: 10, seldom: size - 10}
    task, _, answer = example.partition("\nQuestion: ")
    in_example, said = Counter(word for _, word in ITEM.findall(task)), [word for _, word in ITEM.findall(answer)]
    assert (len(in_example), max(in_example.values()), min(in_example.values())) == worked
    assert {word for word, n in in_example.items() if n == worked[1]} == set(said)
    assert answer.startswith(
        "What are the 10 most common words in the above list? "
        "Answer: The top 10 words that appear most often in the list are: 1. "
    )
    assert draft.wording.tokens == 120


@pytest.mark.parametrize("size", [53, 61, 200, 1000])
def test_frequent_words(size: int) -> None:
    """Counts of a zeta distribution with alpha = 2: int(n / (1.6449 k^2))."""
    draft = FrequentWords().draft(Random(3), size, 1050)
    text = draft.prompt.context.split("coded words. ")[1].split()
    counts = Counter(text)
    assert counts["..."] == int(size / 1.6449341)
    assert [counts[word] for word in draft.answers] == [int(size / 1.6449341 / k**2) for k in (2, 3, 4)]
    others = [n for word, n in counts.items() if word not in ("...", *draft.answers)]
    assert len(counts) <= 20, "as many kinds as RULER takes: (1,050 - 50) / 50"
    assert max(others, default=0) < counts[draft.answers[-1]]
    assert draft.wording.tokens == 50
