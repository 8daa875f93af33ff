"""Protects the task: lengths never exceeded, the same samples for the same seed, RULER's scores, and its own files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from spelling import spelling

from kvcompile.errors import KvcompileError
from kvcompile.tasks.base import Turn
from kvcompile.tasks.registry import build_tasks
from kvcompile.tasks.ruler.task import GENERATED, Ruler, RulerSample

LONG = 10**6
LENGTHS = {"vt": 6500, "niah_multikey_3": 4200}  # of letters, where the worked example needs them


@pytest.mark.parametrize("name", GENERATED)
def test_prompts_fill_their_length_and_never_exceed_it(name: str) -> None:
    tokenizer, tokens = spelling(begin=True), LENGTHS.get(name, 3000)
    task = Ruler(tokens=(tokens,), tasks=(name,), samples=2)
    samples = task.make_samples(tokenizer, tokens)
    assert samples == task.make_samples(tokenizer, tokens), "the same for the same seed"
    assert samples != Ruler(tokens=(tokens,), tasks=(name,), samples=2, seed=1).make_samples(tokenizer, tokens)
    assert [s.name for s in samples] == [f"{name} 1", f"{name} 2"]
    for sample in samples:
        (turn,) = sample.turns
        length = len(sample.context) + len(turn.ids) + turn.tokens
        assert tokens - 200 < length <= tokens
        text = tokenizer.decode([*sample.context, *turn.ids], skip_special_tokens=True)
        assert [*sample.context, *turn.ids] == tokenizer(text)["input_ids"]
        assert tokenizer.decode(turn.ids).startswith(("What ", "Question: "))
        context = tokenizer.decode(sample.context)
        assert all(answer in context for answer in turn.answers)


def test_without_files_eleven_tasks_are_asked() -> None:
    tokenizer = spelling()
    parts = dict.fromkeys(s.part for s in Ruler(tokens=(8000, 9000), samples=1).make_samples(tokenizer, LONG))
    assert list(parts) == [f"{name}, {tokens}" for tokens in (8000, 9000) for name in GENERATED]


def test_in_a_chat_the_answer_begins_after_the_template() -> None:
    tokenizer = spelling(chat=True)
    (sample,) = Ruler(tokens=(2000,), tasks=("cwe",), samples=1, chat=True).make_samples(tokenizer, LONG)
    assert tokenizer.decode(sample.context).startswith("<u>Below is a numbered list")
    assert tokenizer.decode(sample.turns[0].ids) == (
        "Question: What are the 10 most common words in the above list?</u><a>"
        " Answer: The top 10 words that appear most often in the list are:"
    )


def sample_of(*answers: str, any: bool = False) -> tuple[RulerSample, Turn]:
    turn = Turn((1,), answers, 9)
    return RulerSample("a", "p", (1,), (turn,), any=any), turn


@pytest.mark.parametrize(
    ("said", "answers", "every", "one"),
    [
        ("are 12, 34 and 99", ("12", "34", "56", "78"), 0.5, 1.0),
        ("  ALPHA beta\n", ("alpha",), 1.0, 1.0),
        ("1234567", ("345",), 1.0, 1.0),  # a part of a word is found too: RULER's definition
        ("nothing", ("a", "x"), 0.0, 0.0),
        ("new\tyork", ("new york", "new\nyork"), 0.5, 1.0),  # control characters are line ends
    ],
)
def test_scores_are_rulers(said: str, answers: tuple[str, ...], every: float, one: float) -> None:
    """string_match_all: the share of the answers; string_match_part: whether any of them is there."""
    sample, turn = sample_of(*answers)
    assert Ruler().score(said, turn, sample) == every
    sample, turn = sample_of(*answers, any=True)
    assert Ruler().score(said, turn, sample) == one


def test_questions_about_documents_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    paragraphs = [
        {"context": f"Fact {i}.", "qas": [{"question": f"Q{i}?", "answers": [{"text": f"{i}"}]}]} for i in range(40)
    ]
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    task = Ruler(tokens=(800,), tasks=("qa_1",), samples=2, squad=str(path))
    for i, sample in enumerate(task.make_samples(spelling(), LONG)):
        (turn,) = sample.turns
        assert f"\nFact {i}." in spelling().decode(sample.context)
        assert turn.answers == (f"{i}",)
        assert 750 < len(sample.context) + len(turn.ids) + turn.tokens <= 800
        assert task.score(f"It is {i}.", turn, sample) == 1.0


def test_files_of_rulers_own_prompts_are_asked_as_they_are(tmp_path: Path) -> None:
    text = "A special magic number is hidden.\nOne of the special magic numbers for a-b is: 7.\n"
    question = "What is the special magic number for a-b mentioned in the provided text?"
    start = " The special magic number for a-b mentioned in the provided text is"
    folder = tmp_path / "niah_single_2"
    folder.mkdir()
    path = folder / "validation.jsonl"
    rows = [
        {"input": text + question, "answer_prefix": start, "outputs": ["7"]},
        {"input": text + question + start, "outputs": ["7"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = spelling(chat=True)
    for sample in Ruler(source=(str(path),), samples=2).make_samples(tokenizer, LONG):
        assert sample.part == "niah_single_2"
        assert tokenizer.decode(sample.context) == text
        assert tokenizer.decode(sample.turns[0].ids) == question + start
        assert (sample.turns[0].answers, sample.turns[0].tokens) == (("7",), 128)
    (sample, _) = Ruler(source=(str(path),), samples=2, chat=True).make_samples(tokenizer, LONG)
    assert tokenizer.decode(sample.turns[0].ids) == f"{question}</u><a>{start}"
    with pytest.raises(KvcompileError, match="samples must not be longer than the 100 tokens that the model knows"):
        Ruler(source=(str(path),), samples=1).make_samples(tokenizer, 100)
    path.write_text('{"input": "Who?", "outputs": ["a"]}')
    with pytest.raises(KvcompileError, match="row 1 must hold one of RULER's questions, got 'Who"):
        Ruler(source=(str(path),), samples=1).make_samples(tokenizer, LONG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["niah_single_4"]}, "unknown task, got 'niah_single_4'. Fix: did you mean 'niah_single_"),
        ({"tasks": ["qa_1"]}, "qa_1 needs a file, got none. Fix: tasks.ruler.squad=PATH"),
        ({"tokens": []}, "tokens must be a list of lengths"),
        ({"samples": 0}, "samples must be 1 or more"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(options: dict[str, object], message: str) -> None:
    with pytest.raises(KvcompileError) as error:
        build_tasks({"ruler": options})
    assert message in str(error.value)


def test_lengths_that_cannot_be_are_refused() -> None:
    with pytest.raises(KvcompileError, match="must not be longer than the 100 tokens that the model knows, got 1024"):
        Ruler().make_samples(spelling(), 100)
    with pytest.raises(KvcompileError, match=r"tasks\.ruler: vt needs more tokens, got 900\. Fix: \d+ or more"):
        Ruler(tokens=(900,), tasks=("vt",)).make_samples(spelling(), LONG)
    with pytest.raises(KvcompileError, match="cwe of 200,000 tokens needs more words than there are"):
        Ruler(tokens=(200_000,), tasks=("cwe",), samples=1).make_samples(spelling(), LONG)
