"""Samples show a head exactly what it must copy, and the score finds the heads that look there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer

from kvcompile.calibration.retrieval import (
    FORMS,
    SPANS,
    CalibrationResult,
    Prompts,
    Sample,
    head_mass,
    retrieval_scores,
)
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.needle import FORMS as NEEDLES

SENTENCES = [" ".join(f"w{(7 * i + j * j) % 120 + 4}" for j in range(12)) for i in range(40)]
LAYERS, HEADS, GROUP = 3, 2, 2


def samples(each: int = 2, seed: int = 0) -> list[Sample]:
    return Prompts(tiny_tokenizer(), SENTENCES, 200, seed).samples(each)


class Looking:
    """A calibrator whose heads attend evenly, but for one that looks at the token to be copied (`aim` 0 or -1)."""

    def __init__(self, head: tuple[int, int], aim: int = 0, blind: bool = False) -> None:
        self.tokenizer, self.layers, self.model = tiny_tokenizer(), LAYERS, None
        self.head, self.aim, self.blind = head, aim, blind
        self.seen: list[tuple[int, int]] = []
        self.source = {tuple(s.ids): s.source for s in samples()}

    def progress(self, text: str, done: int, total: int) -> None:
        self.seen.append((done, total))

    def attention(self, ids: torch.Tensor, last: int) -> list[torch.Tensor]:
        n = ids.shape[1]
        even = torch.zeros(HEADS, GROUP, last, n) if self.blind else torch.full((HEADS, GROUP, last, n), 1 / n)
        rows = [even.clone() for _ in range(LAYERS)]
        if not self.blind:
            start = self.source[tuple(ids[0].tolist())]
            layer, head = self.head
            rows[layer][head, 1] = 0
            for query in range(last):
                rows[layer][head, 1, query, start + query + self.aim] = 1
        return rows


def scored(calibrator: Any) -> CalibrationResult:
    return retrieval_scores(calibrator, SENTENCES, samples=2, tokens=200, seed=0)


def test_every_query_predicts_the_token_at_the_source() -> None:
    tokenizer = tiny_tokenizer()
    for sample in samples():
        start, stop = sample.source, sample.source + sample.answers
        assert stop < len(sample.ids) - sample.answers, "the source is not the answer itself"
        copied = list(sample.ids[start : stop - 1])
        assert list(sample.ids[len(sample.ids) - sample.answers + 1 :]) == copied, sample.form
        assert sample.ids[: len(tokenizer("")["input_ids"])] == tuple(tokenizer("")["input_ids"])


def test_samples_have_all_forms_at_several_depths_and_depend_on_the_seed() -> None:
    found = samples(3)
    assert {s.form for s in found} == {f.name for f in FORMS} | set(SPANS)
    for name in {s.form for s in found}:
        starts = [s.source for s in found if s.form == name]
        assert len(set(starts)) == 3
    assert samples(3) == found
    assert samples(3, seed=1) != found


def test_no_form_of_the_needle_benchmark_is_used() -> None:
    asked = {f.ask.format(key="x").strip() for f in FORMS}
    assert not asked & {f.question.format(key="x").strip() for f in NEEDLES.values()}
    assert not {f.plant.strip() for f in FORMS} & {f.needle.split("{")[0].strip() for f in NEEDLES.values()}


@pytest.mark.parametrize("aim", [0, -1], ids=["induction", "echo"])
def test_the_head_that_looks_at_the_source_comes_first(aim: int) -> None:
    result = scored(Looking((1, 1), aim))
    assert result.top(1) == [[1, 1]]
    assert result.scores[1][1] > 3 * result.scores[0][0]


def test_forms_weigh_the_same() -> None:
    result = scored(Looking((2, 0)))
    total = sum(sum(row) for row in result.scores) / (LAYERS * HEADS)
    assert total == pytest.approx(1, abs=1e-4)


def test_equal_heads_are_taken_in_order() -> None:
    result = CalibrationResult(((1.0, 2.0), (2.0, 1.0)), {}, 0, 1, 128)
    assert result.top(3) == [[0, 1], [1, 0], [0, 0]]


def test_head_mass_counts_the_copied_and_the_own_token_of_the_best_query_head() -> None:
    attention = torch.zeros(2, 3, 2, 10)
    attention[1, 2, 0, 4] = attention[1, 0, 1, 4] = 0.8  # the second query looks at its own token
    attention[1, 1, 1, 6] = attention[0, 0, 0, 5] = 1.0  # too far ahead
    assert head_mass(attention, 4).tolist() == pytest.approx([0.0, 0.8])


def test_progress_runs_to_the_end() -> None:
    calibrator = Looking((0, 0))
    scored(calibrator)
    total = 2 * (len(FORMS) + len(SPANS))
    assert calibrator.seen == [(i, total) for i in range(total + 1)]


def test_a_model_that_looks_nowhere_is_refused() -> None:
    with pytest.raises(KvcompileError, match="heads that look at a planted answer, got none"):
        scored(Looking((0, 0), blind=True))


def test_the_result_is_plain_data() -> None:
    import json

    result = scored(Looking((0, 1)))
    data = json.loads(json.dumps(result.to_json()))
    assert set(data["forms"]) == {f.name for f in FORMS} | set(SPANS)
    assert (data["seed"], data["samples"], data["tokens"]) == (0, 2, 200)
