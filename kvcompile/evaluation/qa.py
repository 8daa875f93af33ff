"""Scores of answers to questions: LongBench's F1 of words."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> list[str]:
    """The words that count: lower case, without punctuation and the articles a, an, the."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1(prediction: str, reference: str) -> float:
    """F1 of two multisets of words, 0 to 1: with m words in both, P = m / |prediction|, R = m / |reference|,

        F1 = 2 P R / (P + R), 0 where m = 0.

    Source: LongBench, arXiv 2308.14508 (its `qa_f1_score`), after SQuAD, arXiv 1606.05250.
    """
    return f1_of_words(normalized(prediction), normalized(reference))


def f1_of_words(said: Sequence[str], wanted: Sequence[str]) -> float:
    """`f1` of words that are as they shall be compared."""
    both = (Counter(said) & Counter(wanted)).total()
    return 2 * both / (len(said) + len(wanted)) if both else 0.0


def best_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 against the reference that fits best, 0 to 1."""
    return max(f1(prediction, reference) for reference in references)


def first_line(text: str) -> str:
    """The first line of an answer that says anything."""
    return (text.lstrip().splitlines() or [""])[0]
