"""Protects the task: which rows are asked, whose they are, what counts of an answer, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from spelling import spelling

from kvcompile.errors import KvcompileError
from kvcompile.tasks.longbench.task import LongBench
from kvcompile.tasks.registry import build_tasks

LONG = 10**6
TWO_WIKI = Path(__file__).parents[4] / "shared/data/2wiki/2wiki_rebuilt.jsonl"
ROWS = [
    {"input": f"Question {i}?", "context": f"Text {i}. " * 50, "answers": [f"A{i}", f"The B{i}"], "dataset": "qasper"}
    for i in range(6)
]


def written(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_rows_are_asked_from_the_skipped_ones_on(tmp_path: Path) -> None:
    source = written(tmp_path, ROWS)
    tokenizer = spelling(begin=True)
    every = LongBench(source=(source,), tokens=2000).make_samples(tokenizer, LONG)
    some = LongBench(source=(source,), tokens=2000, skip=4, first=2).make_samples(tokenizer, LONG)
    assert some == every[4:]
    assert [s.name for s in some] == ["rows.jsonl 5", "rows.jsonl 6"]
    (turn,) = some[0].turns
    assert (some[0].part, turn.answers, turn.tokens) == ("qasper", ("A4", "The B4"), 128)
    assert tokenizer.decode(turn.ids).startswith("Answer the question based on the above article")
    assert tokenizer.decode(turn.ids).endswith("Question: Question 4?\n\nAnswer:")
    assert len(some[0].context) + len(turn.ids) <= 2000


@pytest.mark.parametrize(
    ("name", "row", "part"),
    [
        ("2wikimqa.jsonl", {}, "2wikimqa"),
        ("hotpotqa_e.json", {}, "hotpotqa"),
        ("x.jsonl", {"dataset": "musique_e"}, "musique"),
    ],
)
def test_a_file_or_a_row_says_whose_it_is(tmp_path: Path, name: str, row: dict[str, Any], part: str) -> None:
    source = written(tmp_path, [{"input": "Who?", "context": "x", "answers": ["a"], **row}], name)
    (sample,) = LongBench(source=(source,)).make_samples(spelling(), LONG)
    assert sample.part == part
    (sample,) = LongBench(source=(source,), dataset="qmsum").make_samples(spelling(), LONG)
    assert (sample.part, sample.turns[0].tokens) == ("qmsum", 512)


def test_the_answer_that_fits_best_counts(tmp_path: Path) -> None:
    task = LongBench(source=(written(tmp_path, ROWS),), first=1)
    (sample,) = task.make_samples(spelling(), LONG)
    (turn,) = sample.turns
    assert task.score("b0", turn, sample) == 1.0
    assert task.score("it is A0", turn, sample) == 0.5
    assert task.score("nothing", turn, sample) == 0.0


@pytest.mark.parametrize(("dataset", "first_line", "score"), [
    ("qasper", None, 0.5), ("qasper", True, 1.0), ("triviaqa", None, 1.0), ("triviaqa", False, 0.5),
])  # fmt: skip
def test_only_the_first_line_counts_where_longbench_says_so(
    tmp_path: Path, dataset: str, first_line: bool | None, score: float
) -> None:
    task = LongBench(source=(written(tmp_path, ROWS),), dataset=dataset, first_line=first_line, first=1)
    (sample,) = task.make_samples(spelling(), LONG)
    assert task.score("\n\nA0\nor not", sample.turns[0], sample) == score


def test_labels_come_from_the_row(tmp_path: Path) -> None:
    row = {"context": "x", "input": "y", "answers": ["Date"], "all_classes": ["Date", "City"], "dataset": "trec"}
    task = LongBench(source=(written(tmp_path, [row]),))
    (sample,) = task.make_samples(spelling(), LONG)
    assert task.score("Date of a City", sample.turns[0], sample) == 0.5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": []}, "rows.jsonl 1 must hold answers, a list of one or more"),
        ({"answers": ["a"], "dataset": "trec"}, "rows.jsonl 1 must hold all_classes, the list of all labels"),
        ({"answers": ["3"], "dataset": "passage_retrieval_en"}, "an answer must be like Paragraph (\\d+), got '3'"),
        (
            {"answers": ["a"], "dataset": "nq"},
            "rows.jsonl 1: tasks.longbench.dataset must say whose row it is, got 'nq'",
        ),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    source = written(tmp_path, [{"context": "x", "input": "y", "dataset": "qasper", **row}])
    with pytest.raises(KvcompileError) as error:
        LongBench(source=(source,)).make_samples(spelling(), LONG)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ["a"], "dataset": "2wiki"}, "unknown dataset, got '2wiki'. Fix: did you mean '2wikimqa'"),
        ({"source": ["a"], "first": 0}, "first must be 1 or more"),
        ({"source": ["a"], "segment": "words"}, "segment must be one of characters, jieba"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KvcompileError) as error:
        build_tasks({"longbench": options})
    assert message in str(error.value)


def test_more_rows_than_there_are_and_too_long_ones_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path, ROWS)
    with pytest.raises(
        KvcompileError, match=r"must be rows of each file, got skip=5, first=2, and 6 rows in rows\.jsonl"
    ):
        LongBench(source=(source,), skip=5, first=2).make_samples(spelling(), LONG)
    with pytest.raises(
        KvcompileError, match=r"source must be one or more \.json or \.jsonl files of LongBench's shape"
    ):
        LongBench().make_samples(spelling(), LONG)
    with pytest.raises(KvcompileError, match="must not be longer than the 2,048 tokens that the model knows, got 3500"):
        LongBench(source=(source,)).make_samples(spelling(), 2048)
    (sample,) = LongBench(source=(source,), first=1).make_samples(spelling(), LONG)
    prompt = len(sample.context) + len(sample.turns[0].ids)
    with pytest.raises(KvcompileError, match=f"samples must not be longer than .* got {prompt + 128}"):
        LongBench(source=(source,), tokens=prompt, first=1).make_samples(spelling(), prompt + 127)


@pytest.mark.skipif(not TWO_WIKI.exists(), reason=f"{TWO_WIKI} is not there")
def test_two_wiki_is_asked_as_it_is() -> None:
    tokenizer = spelling()
    task = LongBench(source=(str(TWO_WIKI),), dataset="2wikimqa", tokens=8000, first=5)
    for sample in task.make_samples(tokenizer, LONG):
        (turn,) = sample.turns
        assert 6000 < len(sample.context) + len(turn.ids) <= 8000
        assert task.score(turn.answers[0], turn, sample) == 1.0
        assert tokenizer.decode(sample.context).startswith("Answer the question based on the given passages.")
