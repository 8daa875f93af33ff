"""Task `multi_turn`: one context, several questions in turn, all over the cache that the first one met."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvcompile.tasks.base import Sample, Task, Turn

MOST = 20  # turns: so many keys and names there are
INTRO = "Some special magic numbers, and facts about people, are hidden within the following text. Memorize them."


@dataclass(frozen=True)
class MultiTurn(Task):
    """Questions about numbers and plain facts hidden in a text, one after the other over one cache, scored by turn.

    tokens: of the context and its first question, at most. turns: how many questions, half of them about numbers, in
    random order. samples: contexts of each text. haystacks: `reference`, `library`, or paths of text files. seed: of
    what is hidden, where, and in which order it is asked.
    A later question meets the answers before it, right or wrong. Where the question is seen, that is the first one:
    what a stack has kept for it is what the others must do with.
    Source: the idea of SCBench (arXiv 2412.10319), whose own data is not used.
    """

    name: ClassVar[str] = "multi_turn"
    summary: ClassVar[str] = "one context, several questions in turn over one cache, scored turn by turn"
    tokens: int = 1024
    turns: int = 4
    samples: int = 4
    haystacks: tuple[str, ...] = ("reference", "library")
    seed: int = 0

    def __post_init__(self) -> None:
        self.require(self.tokens >= 64, "tokens", "64 or more")
        self.require(2 <= self.turns <= MOST, "turns", f"2 to {MOST}")
        self.require(self.samples >= 1, "samples", "1 or more")
        self.require(len(self.haystacks) > 0, "haystacks", "one or more")

    def make_samples(self, tokenizer: Any, longest: int) -> Sequence[Sample]:
        """The contexts of every text."""
        kinds = itertools.product(self.haystacks, range(self.samples))
        samples = [self._sample(tokenizer, haystack, number) for haystack, number in kinds]
        for sample in samples:
            spoken = sum(len(turn.ids) + turn.tokens for turn in sample.turns)
            self.require_short(len(sample.context) + spoken, longest)
        return samples

    def _sample(self, tokenizer: Any, haystack: str, number: int) -> Sample:
        from kvcompile.evaluation.needle import common_prefix, filled
        from kvcompile.tasks.multi_turn.facts import numbers, people

        name = Path(haystack).name
        rng = random.Random(f"{self.seed}/{self.tokens}/{number}")
        facts = [*numbers(rng, (self.turns + 1) // 2), *people(rng, self.turns // 2)]
        rng.shuffle(facts)
        places = [(i + rng.random()) / self.turns for i in range(self.turns)]
        rng.shuffle(places)
        hidden = list(zip(places, (fact.sentence for fact in facts), strict=True))

        def ids(body: str, question: str) -> list[int]:
            return list(tokenizer(f"{INTRO}\n{body}\n{question}")["input_ids"])

        body = filled(tokenizer, haystack, hidden, self.tokens, lambda body: len(ids(body, facts[0].question)), rng)
        whole = ids(body, facts[0].question)
        context = common_prefix(whole, ids(body, ""))
        later = [tokenizer(f"\n{fact.question}", add_special_tokens=False)["input_ids"] for fact in facts[1:]]
        turns = [
            Turn(tuple(piece), (fact.answer,), fact.tokens)
            for fact, piece in zip(facts, [whole[context:], *later], strict=True)
        ]
        return Sample(f"{name} {number + 1}", name, tuple(whole[:context]), tuple(turns), chained=True)

    def part(self, sample: Sample, turn: int) -> str:
        """Scores are shown turn by turn."""
        return f"turn {turn + 1}"

    def score(self, said: str, turn: Turn, sample: Sample) -> float:
        """1 where the answer comes as one whole number or word."""
        return float(turn.answers[0].lower() in re.findall(r"\w+", said.lower()))
