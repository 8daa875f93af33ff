"""Protects LongBench's metrics: values by hand, after the published definitions and with their quirks."""

from __future__ import annotations

import sys

import pytest

from kvcompile.errors import KvcompileError
from kvcompile.tasks.longbench.metrics import cutter, score


@pytest.mark.parametrize(
    ("metric", "said", "answer", "value"),
    [
        ("f1", "the city of Paris", "Paris, France", 0.4),  # 1 word of 3 and of 2
        ("f1_zh", "北京大学，我来了", "我来到北京清华大学。", 0.75),  # 6 characters of 7 and of 9
        ("f1_zh", "ABC", "ab 。", 0.8),
        ("f1_zh", "。", "。", 0.0),  # marks are no words
        ("rouge_l", "b a", "a b", 0.5),
        ("rouge_l_zh", "北京大学", "北大", 2 / 3),
        ("count", "There are 7, no, 8 of 8", "8", 2 / 3),
        ("count", "eight", "8", 0.0),
        ("count", "18", "8", 0.0),  # numbers are whole
        ("retrieval", "Paragraph 3", "Paragraph 3", 1.0),
        ("retrieval", "Paragraph 3 or Paragraph 13", "Paragraph 3", 0.5),
        ("retrieval_zh", "段落12", "段落12", 1.0),
        ("code", "return x", "return x", 1.0),
        ("code", "\n\n# a comment\n// more\n```py\nreturn x\nreturn y", "return x", 1.0),
        ("code", "return y", "return x", 0.88),  # 14 of 16 characters: 0.875, in hundredths
        ("code", "# nothing else", "return x", 0.0),
    ],
)
def test_values_by_hand(metric: str, said: str, answer: str, value: float) -> None:
    assert score(metric, said, answer, (), "characters") == pytest.approx(value, abs=1e-7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "answer", "classes", "value"),
    [
        ("Type: Date", "Date", ("Date", "City"), 1.0),
        ("Date or City", "Date", ("Date", "City"), 0.5),
        ("City", "Date", ("Date", "City"), 0.0),
        ("date", "Date", ("Date", "City"), 0.0),  # letters are as they are
        ("Other number", "Other number", ("number", "Other number"), 1.0),  # a part of the answer does not count
        ("Other number", "Other number", ("Other", "number", "Other number"), 0.5),  # of two in a row the second does
        ("Other number", "Other number", ("Other", "City", "number", "Other number"), 0.5),
    ],
)
def test_labels_that_were_said(said: str, answer: str, classes: tuple[str, ...], value: float) -> None:
    assert score("classification", said, answer, classes, "characters") == value


def test_jieba_is_needed_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(KvcompileError, match=r"segment=jieba needs that package.*Fix: pip install jieba"):
        cutter("jieba")
    assert cutter("characters")("北京") == ["北", "京"]
