"""Which KV heads retrieve: attention to planted needles and copied spans, in offline text.

A sample is a text with something planted in it, a question (or the beginning of a copied span) and its answer, in one
sequence. A head retrieves if the queries that predict the answer look at where the answer stands.
Sources: retrieval heads (arXiv 2404.15574), RazorAttention's induction heads (2407.15891), HeadKV (2410.19258).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvcompile.errors import KvcompileError

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.plan.policy import Calibrator

NAMES = ("Alice", "Boris", "Chloe", "David", "Elena", "Frank", "Grace", "Hugo", "Irene", "Jonas")
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Prague", "Seoul", "Dublin", "Vienna", "Havana", "Nairobi")
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "black", "white", "pink", "brown")
THINGS = ("lamp", "boat", "piano", "ladder", "violin", "tent", "clock", "mirror", "bicycle", "basket")
DIGITS: tuple[str, ...] = ()  # no words: the answer is a number


@dataclass(frozen=True)
class Form:
    """A needle: `plant` + answer + "." stands in the text, `ask` comes last and is answered by the same words."""

    name: str
    plant: str
    ask: str
    keys: tuple[str, ...]
    answers: tuple[str, ...]


FORMS = (
    Form(
        "code",
        " The access code of {key} is",
        "\nQuestion: What is the access code of {key}?\nAnswer: The access code of {key} is",
        NAMES,
        DIGITS,
    ),
    Form(
        "price",
        " In the shop a {key} costs exactly",
        "\nWhat does a {key} cost in the shop? According to the text, in the shop a {key} costs exactly",
        THINGS,
        DIGITS,
    ),
    Form(
        "place",
        " Last summer {key} moved to the city of",
        "\nQuestion: To which city did {key} move?\nAnswer: Last summer {key} moved to the city of",
        NAMES,
        CITIES,
    ),
    Form(
        "colour",
        " The {key} in the garden was painted",
        "\nWhich colour does the {key} in the garden have? The {key} in the garden was painted",
        THINGS,
        COLOURS,
    ),
)
SPANS = ("copied sentence", "copied words")  # as in the text, or its tokens in random order
SPAN, CUE = 24, 8  # tokens of a copied span; how many of them are given before the model must go on
MARGIN = 40  # tokens at the end of the text where nothing is planted: windows see those anyway


@dataclass(frozen=True)
class Sample:
    """Text, question and answer as one sequence.

    `ids` end before the answer's last token: the last `answers` queries predict, one each, the tokens that stand at
    `source`, `source + 1`, ….
    """

    form: str
    ids: tuple[int, ...]
    answers: int
    source: int


@dataclass(frozen=True)
class CalibrationResult:
    """Retrieval scores `[layers][kv_heads]`: mean over the forms, each of which has mean 1 over the heads."""

    scores: tuple[tuple[float, ...], ...]
    forms: dict[str, tuple[tuple[float, ...], ...]]  # mean attention mass on the source, by form
    seed: int
    samples: int
    tokens: int

    def top(self, count: int) -> list[list[int]]:
        """The `count` highest scoring `[layer, kv_head]`, best first; of equals the earlier one."""
        ranked = sorted((-score, i, h) for i, row in enumerate(self.scores) for h, score in enumerate(row))
        return [[i, h] for _, i, h in ranked[:count]]

    def to_json(self) -> dict[str, Any]:
        """Plain data: the scores, their parts by form, and the settings that reproduce them."""
        return asdict(self)


class Prompts:
    """Builds samples over a text of `tokens` tokens; the same seed gives the same samples."""

    def __init__(self, tokenizer: Any, sentences: Sequence[str], tokens: int, seed: int) -> None:
        self.tokenizer, self.sentences, self.tokens = tokenizer, list(sentences), tokens
        self.random = random.Random(seed)
        self.prefix: list[int] = list(tokenizer("")["input_ids"])

    def samples(self, each: int) -> list[Sample]:
        """`each` samples of every form, at depths spread over the text."""
        depths = [(k + 0.5) / each for k in range(each)]
        needles = [self.needle(form, depth) for form in FORMS for depth in depths]
        return needles + [self.copied(name, depth) for name in SPANS for depth in depths]

    def needle(self, form: Form, depth: float) -> Sample:
        """Two needles of one form with different keys; the one at `depth` (0..1) is asked for."""
        keys = self.random.sample(form.keys, 2)
        answers = [self._encode(" " + word) for word in self._answers(form)]
        pieces = [
            self._encode(form.plant.format(key=k)) + a + self._encode(".") for k, a in zip(keys, answers, strict=True)
        ]
        place = {0: self._place(depth), 1: self._place(self.random.random())}
        ids, starts = self._planted(self._text(), [(place[i], pieces[i]) for i in (0, 1)])
        start = starts[0] + len(self._encode(form.plant.format(key=keys[0])))
        question = self._encode(form.ask.format(key=keys[0])) + answers[0]
        return self._sample(form.name, ids + question, len(answers[0]), start)

    def copied(self, name: str, depth: float) -> Sample:
        """A span that comes again at the end of the text: its first tokens are given, the others are predicted."""
        text, place = self._text(), self._place(depth)
        span = text[place : place + SPAN]
        if name != SPANS[0]:
            span = self.random.sample(text, SPAN)
        ids, (start,) = self._planted(text[:place] + text[place + SPAN :], [(place, span)])
        return self._sample(name, ids + span, SPAN - CUE, start + CUE)

    def _sample(self, form: str, ids: list[int], answers: int, start: int) -> Sample:
        return Sample(form, (*self.prefix, *ids[:-1]), answers, len(self.prefix) + start)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _answers(self, form: Form) -> list[str]:
        if form.answers:
            return self.random.sample(form.answers, 2)
        return [str(self.random.randrange(10**5, 10**6)) for _ in range(2)]

    def _text(self) -> list[int]:
        ids: list[int] = []
        at = self.random.randrange(len(self.sentences))
        while len(ids) < self.tokens:
            ids += self._encode((" " if ids else "") + self.sentences[at % len(self.sentences)])
            at += 1
        return ids[: self.tokens]

    def _place(self, depth: float) -> int:
        return SPAN + int(depth * (self.tokens - MARGIN - 2 * SPAN))

    @staticmethod
    def _planted(text: list[int], pieces: list[tuple[int, list[int]]]) -> tuple[list[int], list[int]]:
        """The text with each piece inserted at its place, and where the pieces then start."""
        starts = [0] * len(pieces)
        ids: list[int] = []
        done = 0
        for i in sorted(range(len(pieces)), key=lambda i: pieces[i][0]):
            place, piece = pieces[i]
            ids += text[done:place]
            starts[i], done = len(ids), place
            ids += piece
        return ids + text[done:], starts


def head_mass(attention: Tensor, source: int) -> Tensor:
    """How much a KV head copies from `source`, `[H_kv]` in [0, 1], by attention `[H_kv, g, answers, n]`.

    m = mean_i max_g (A[g, i, source + i] + A[g, i, source + i - 1]): query i looks at the token that comes next there
    (induction) or at the earlier copy of its own token (echo). Copying needs both kinds (RazorAttention, section 3).
    """
    import torch

    answers = torch.arange(attention.shape[2], dtype=torch.int64, device=attention.device)
    induction = attention[:, :, answers, source + answers]
    echo = attention[:, :, answers, source + answers - 1]
    return (induction + echo).amax(1).mean(-1)


def retrieval_scores(
    calibrator: Calibrator, sentences: Sequence[str], *, samples: int = 3, tokens: int = 512, seed: int = 0
) -> CalibrationResult:
    """Score every KV head over `samples` samples of each form, in texts of `tokens` tokens.

    score[l, h] = mean_f m_f[l, h] / mean(m_f), m_f = `head_mass` averaged over the samples of form f.
    Raises KvcompileError if no head of the model ever looks at what was planted.
    """
    import torch

    drawn = Prompts(calibrator.tokenizer, sentences, tokens, seed).samples(samples)
    masses: dict[str, list[Tensor]] = {}
    for done, sample in enumerate(drawn):
        calibrator.progress("calibrating", done, len(drawn))
        seen = calibrator.attention(torch.tensor([sample.ids], dtype=torch.int64, device="cpu"), sample.answers)
        masses.setdefault(sample.form, []).append(torch.stack([head_mass(a, sample.source) for a in seen]))
    calibrator.progress("calibrating", len(drawn), len(drawn))
    forms = {name: torch.stack(samples_of_form).mean(0) for name, samples_of_form in masses.items()}
    scores = torch.stack([mass / mass.mean() for mass in forms.values()]).mean(0)
    if not bool(scores.isfinite().all()):
        raise KvcompileError(
            "calibration needs heads that look at a planted answer",
            f"none, with a {type(calibrator.tokenizer).__name__}",
            "give the tokenizer of this checkpoint, or a policy that needs no calibration",
        )
    return CalibrationResult(_rows(scores), {k: _rows(v) for k, v in forms.items()}, seed, samples, tokens)


def _rows(heads: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(float(x), 6) for x in row) for row in heads)
