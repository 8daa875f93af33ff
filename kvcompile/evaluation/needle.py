"""Needle in a haystack: hide a number in real text, ask for it, count exact answers. Generation only."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kvcompile.calibration.text import REFERENCE, sentences
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.intervals import wilson
from kvcompile.evaluation.perplexity import forward
from kvcompile.progress import Progress

DIGITS = 7
DEPTHS = (0.1, 0.35, 0.6, 0.85)
ADJECTIVES = ["amber", "brisk", "calm", "dusty", "eager", "gentle", "hollow", "jolly", "lively", "noble", "olive"]
NOUNS = ["anchor", "basket", "candle", "dragon", "engine", "falcon", "garden", "island", "kettle", "lantern", "orchard"]


@dataclass(frozen=True)
class Form:
    """One wording: what stands before the text, the needle, the question with the start of its answer.

    `others` is how many more needles, with other keys and numbers, are hidden.
    """

    intro: str
    needle: str
    question: str
    others: int = 0


# The uncompressed default model answers `two_keys` less surely than the others (55 of 60 prompts at 1,024 tokens, where
# each of the others got 20 of 20): read its score beside the uncompressed one, never alone.
FORMS = {
    "magic": Form(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.",
        "One of the special magic numbers for {key} is: {number}.",
        "What is the special magic number for {key} mentioned in the provided text? "
        "The special magic number for {key} mentioned in the provided text is",
    ),
    "two_keys": Form(
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
        "I will quiz you about the numbers afterwards.",
        "One of the special magic numbers for {key} is: {number}.",
        "What is the special magic number for {key} mentioned in the provided text? "
        "The special magic number for {key} mentioned in the provided text is",
        others=1,
    ),
    "four_keys": Form(
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
        "I will quiz you about the numbers afterwards.",
        "One of the special magic numbers for {key} is: {number}.",
        "What is the special magic number for {key} mentioned in the provided text? "
        "The special magic number for {key} mentioned in the provided text is",
        others=3,
    ),
    "reference": Form(
        "Read this text with care, you will need a detail of it later.",
        "The reference number of the {key} order is {number}.",
        "Which reference number does the {key} order have? The reference number of the {key} order is",
    ),
    "story": Form(
        "Please read the following pages.",
        "On that day {key} bought a train ticket with the number {number}.",
        "Question: which train ticket did {key} buy?\nAnswer: {key} bought a train ticket with the number",
    ),
    "passcode": Form(
        "The following pages were taken from a notebook.",
        "Somebody has written in the margin: the {key} door opens with the passcode {number}.",
        "According to the note in the margin, the {key} door opens with the passcode",
    ),
}


@dataclass(frozen=True)
class Sentence:
    """A sentence and its length in tokens."""

    text: str
    tokens: int


@dataclass(frozen=True)
class NeedleTask:
    """`samples` prompts of at most `tokens` tokens, spread over `depths` (0: start, 1: end of the text).

    form: one of `FORMS`. source: the text to hide it in, `reference` (None too), `library`, or the path of a file.
    `magic` is the form of RULER's niah_single_2 (arXiv 2404.06654) with other words, another haystack and, unlike
    there, numbers without repeated digits, which makes it a little easier: scores do not compare with RULER's.
    Raises KvcompileError for values out of range.
    """

    tokens: int = 1024
    samples: int = 4
    depths: tuple[float, ...] = DEPTHS
    seed: int = 0
    form: str = "magic"
    source: str | None = None
    max_new_tokens: int = DIGITS + 3

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise KvcompileError("unknown needle form", repr(self.form), "one of " + ", ".join(FORMS))
        if self.samples < 1:
            raise KvcompileError("needle samples must be 1 or more", self.samples)
        if not self.depths or not all(0 <= d <= 1 for d in self.depths):
            raise KvcompileError("needle depths must be one or more numbers in [0, 1]", self.depths)
        if self.max_new_tokens < DIGITS:
            raise KvcompileError(f"needle max_new_tokens must be {DIGITS} or more", self.max_new_tokens)

    @property
    def haystack(self) -> str:
        """What the text is called."""
        return REFERENCE if self.source is None else Path(self.source).name

    def prompts(self, tokenizer: Any) -> list[NeedlePrompt]:
        """The prompts, the same for the same task and tokenizer. Raises KvcompileError if `tokens` is too few."""
        return [group[0] for group in self.groups(tokenizer)]

    def groups(self, tokenizer: Any) -> list[list[NeedlePrompt]]:
        """Every sample as prompts that ask for each of its numbers in turn, the first one that of `prompts`.

        The prompts of a group have the same tokens before the question; questions about other keys may be a few tokens
        longer.
        """
        text = measured(tokenizer, self.source)
        return [self._group(tokenizer, text, sample) for sample in range(self.samples)]

    def depth(self, sample: int) -> float:
        """Depth of a sample: the depths in turn, or evenly picked from them where the samples are fewer."""
        last = len(self.depths) - 1
        if self.samples > last:
            return self.depths[sample % len(self.depths)]
        return self.depths[round(sample * last / max(1, self.samples - 1))]

    def _group(self, tokenizer: Any, text: list[Sentence], sample: int) -> list[NeedlePrompt]:
        rng = random.Random(f"{self.seed}/{self.form}/{self.tokens}/{sample}")
        form, depth = FORMS[self.form], self.depth(sample)
        count = 1 + form.others
        keys = [f"{a}-{n}" for a, n in zip(rng.sample(ADJECTIVES, count), rng.sample(NOUNS, count), strict=True)]
        numbers = draw_numbers(rng, count)
        depths = [(depth + i / count) % 1 if i else depth for i in range(count)]
        needles = [(d, form.needle.format(key=k, number=n)) for d, k, n in zip(depths, keys, numbers, strict=True)]
        start = rng.randrange(len(text))

        def ids(filler: list[Sentence], question: str) -> list[int]:
            return list(tokenizer("\n".join([form.intro, " ".join(_hide(filler, needles)), question]))["input_ids"])

        questions = [form.question.format(key=key) for key in keys]
        least = len(ids([], questions[0]))
        if least > self.tokens:
            raise KvcompileError("the needle prompt needs more tokens", self.tokens, f"{least} or more")
        filler = _fill(text[start:] + text[:start], self.tokens - least)
        while len(ids(filler, questions[0])) > self.tokens:
            filler.pop()
        context = common_prefix(ids(filler, questions[0]), ids(filler, ""))
        return [
            NeedlePrompt(ids(filler, question), number, d, self.tokens, context)
            for question, number, d in zip(questions, numbers, depths, strict=True)
        ]


@dataclass(frozen=True)
class NeedlePrompt:
    """Token ids of one prompt, the number it asks for, where that number is hidden, and the length asked for.

    context: how many of the ids stand before the question.
    """

    ids: list[int]
    answer: str
    depth: float
    length: int
    context: int


@dataclass(frozen=True)
class NeedleRecord:
    """What the model said to one prompt."""

    form: str
    length: int
    tokens: int
    depth: float
    answer: str
    text: str
    right: bool
    haystack: str = REFERENCE


@dataclass(frozen=True)
class NeedleResult:
    """Records of one or more tasks (add results to pool them); scores are shares of exact answers, 0 to 1."""

    records: tuple[NeedleRecord, ...]

    @property
    def mean(self) -> float:
        """Share of all prompts answered."""
        return sum(r.right for r in self.records) / len(self.records)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of 95 % of that share."""
        return wilson(sum(r.right for r in self.records), len(self.records))

    @property
    def by_depth(self) -> dict[float, float]:
        """Share answered at each depth."""
        groups: dict[float, list[bool]] = {}
        for record in self.records:
            groups.setdefault(record.depth, []).append(record.right)
        return {depth: sum(groups[depth]) / len(groups[depth]) for depth in sorted(groups)}

    def __add__(self, other: NeedleResult) -> NeedleResult:
        return NeedleResult(self.records + other.records)


def score(
    model: Any,
    tokenizer: Any,
    task: NeedleTask,
    progress: Progress | None = None,
    batch: int = 1,
    question: Literal["seen", "hidden"] = "seen",
) -> NeedleResult:
    """Let `model.generate` (greedy) answer every prompt of the task, `batch` of them at a time, left-padded.

    An answer is right if its digits appear in the generated text as one whole number. hidden: the cache is made of the
    text alone, one prompt at a time, and the question comes as the next turn of a chat does.
    """
    if batch < 1 or (batch > 1 and question == "hidden"):
        raise KvcompileError("needle batch must be 1 or more, and 1 where the question is hidden", batch)
    prompts = task.prompts(tokenizer)
    records: list[NeedleRecord] = []
    for start in range(0, len(prompts), batch):
        group = prompts[start : start + batch]
        cache = None if question == "seen" else forward(model, _row(group[0].ids[: group[0].context], model.device))[1]
        for prompt, new in zip(group, _generate(model, tokenizer, group, task.max_new_tokens, cache), strict=True):
            text = tokenizer.decode(new, skip_special_tokens=True)
            right = prompt.answer in _numbers(text)
            records.append(
                NeedleRecord(
                    task.form, prompt.length, len(prompt.ids), prompt.depth, prompt.answer, text, right, task.haystack
                )
            )
        if progress:
            what = f"needle {task.form} in {task.haystack}, {task.tokens} tokens, {question}"
            progress(what, len(records), len(prompts))
    return NeedleResult(tuple(records))


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[NeedlePrompt], new_tokens: int, cache: Any
) -> list[list[int]]:
    ids, mask = _left_padded([p.ids for p in prompts], _pad(tokenizer))
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=_pad(tokenizer),
            **({} if cache is None else {"past_key_values": cache}),
        )
    return [list(row) for row in out[:, ids.shape[1] :].tolist()]


def _row(ids: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([list(ids)], dtype=torch.int64, device=device)


def _pad(tokenizer: Any) -> int:
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(i for i in known if i is not None))


def _left_padded(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], dtype=torch.int64, device="cpu")
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.int64, device="cpu")
    return ids, mask


def _numbers(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in text).split()


def draw_numbers(rng: random.Random, count: int) -> list[str]:
    """Different numbers of different digits: small models drop repeated digits whatever their cache holds."""
    numbers: list[str] = []
    while len(numbers) < count:
        number = "".join(rng.sample("0123456789", DIGITS))
        if number[0] != "0" and number not in numbers:
            numbers.append(number)
    return numbers


def measured(tokenizer: Any, source: str | None) -> list[Sentence]:
    """The sentences of a text with their lengths."""
    return [Sentence(s, len(tokenizer(" " + s, add_special_tokens=False)["input_ids"])) for s in sentences(source)]


def filled(
    tokenizer: Any,
    source: str | None,
    needles: list[tuple[float, str]],
    tokens: int,
    length: Callable[[str], int],
    rng: random.Random,
) -> str:
    """A text of `source`, from a random sentence on, with each needle at its depth, as long as fits into `tokens`.

    length: of a prompt around a text, in tokens. Raises KvcompileError where the needles alone are too long.
    """
    text = measured(tokenizer, source)
    least = length(" ".join(_hide([], needles)))
    if least > tokens:
        raise KvcompileError("the needle prompt needs more tokens", tokens, f"{least} or more")
    start = rng.randrange(len(text))
    filler = _fill(text[start:] + text[:start], tokens - least)
    while length(" ".join(_hide(filler, needles))) > tokens:
        filler.pop()
    return " ".join(_hide(filler, needles))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first ids are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _fill(text: list[Sentence], room: int) -> list[Sentence]:
    """Sentences in order, from the front again where they end, leaving out those too long for the rest of the room."""
    filler: list[Sentence] = []
    shortest = min(s.tokens for s in text)
    while room >= shortest:
        for sentence in text:
            if sentence.tokens <= room:
                filler.append(sentence)
                room -= sentence.tokens
    return filler


def _hide(filler: list[Sentence], needles: list[tuple[float, str]]) -> list[str]:
    """The body with each needle between the two sentences nearest to its share of the body's tokens."""
    borders = [0, *itertools.accumulate(s.tokens for s in filler)]
    placed = [s.text for s in filler]
    spots = [(min(range(len(borders)), key=lambda i: abs(borders[i] - d * borders[-1])), text) for d, text in needles]
    for spot, text in sorted(spots, key=lambda s: s[0], reverse=True):
        placed.insert(spot, text)
    return placed
