"""What is hidden in a context: numbers of keys, and plain facts about people."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvcompile.evaluation.needle import ADJECTIVES, DIGITS, NOUNS, draw_numbers

NUMBER_TOKENS, WORD_TOKENS = DIGITS + 3, 5
NAMES = ["Alice", "Boris", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jacob", "Laura", "Martin"]
JOBS = ["baker", "carpenter", "dentist", "farmer", "gardener", "lawyer", "nurse", "painter", "pilot", "tailor"]
CITIES = ["Athens", "Berlin", "Cairo", "Dublin", "Lisbon", "London", "Madrid", "Oslo", "Paris", "Prague", "Rome"]


@dataclass(frozen=True)
class Fact:
    """A sentence to hide, the question about it with the start of its answer, and the answer, `tokens` at most."""

    sentence: str
    question: str
    answer: str
    tokens: int


def numbers(rng: random.Random, count: int) -> list[Fact]:
    """Numbers of different keys."""
    keys = [f"{a}-{n}" for a, n in zip(rng.sample(ADJECTIVES, count), rng.sample(NOUNS, count), strict=True)]
    return [
        Fact(
            f"One of the special magic numbers for {key} is: {number}.",
            f"The special magic number for {key} mentioned in the provided text is",
            number,
            NUMBER_TOKENS,
        )
        for key, number in zip(keys, draw_numbers(rng, count), strict=True)
    ]


def people(rng: random.Random, count: int) -> list[Fact]:
    """What different people are, or where they live, in turn; no two answers are the same."""
    names, jobs, cities = rng.sample(NAMES, count), rng.sample(JOBS, count), rng.sample(CITIES, count)
    facts = []
    for i, name in enumerate(names):
        if i % 2:
            facts.append(Fact(f"{name} lives in {cities[i]}.", f"The city in which {name} lives is", cities[i], 0))
        else:
            facts.append(Fact(f"{name} works as a {jobs[i]}.", f"As the text says, {name} works as a", jobs[i], 0))
    return [Fact(f.sentence, f.question, f.answer, WORD_TOKENS) for f in facts]
