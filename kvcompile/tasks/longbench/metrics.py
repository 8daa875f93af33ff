"""LongBench's metrics: how right an answer is, 0 to 1.

Source: LongBench, arXiv 2308.14508, table 1 and `metrics.py` of its code, quirks included: scores compare with others.
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Callable, Sequence
from typing import Literal

from kvcompile.errors import KvcompileError
from kvcompile.evaluation.qa import f1, f1_of_words
from kvcompile.tasks.longbench.datasets import Metric
from kvcompile.tasks.longbench.rouge import rouge_l

Segment = Literal["characters", "jieba"]
PARAGRAPH = {"retrieval": re.compile(r"Paragraph (\d+)"), "retrieval_zh": re.compile(r"段落(\d+)")}
CHINESE = ("f1_zh", "rouge_l_zh")  # metrics over words of Chinese
_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟"
)
_PUNCTUATION = str.maketrans("", "", string.punctuation + _MARKS + "〰〾〿–—‘’‛“”„‟…‧﹏")


def score(metric: Metric, said: str, answer: str, classes: Sequence[str], segment: Segment) -> float:
    """How right `said` is. classes: all labels of a classification. segment: what cuts Chinese into words."""
    if metric == "classification":
        return classification(said, answer, classes)
    if metric in CHINESE:
        cut = cutter(segment)
        return f1_zh(said, answer, cut) if metric == "f1_zh" else rouge_l(" ".join(cut(said)), " ".join(cut(answer)))
    if metric in PARAGRAPH:
        return counted(said, paragraph(metric, answer))
    return {"f1": f1, "rouge_l": rouge_l, "count": counted, "code": code}[metric](said, answer)


def cutter(segment: Segment) -> Callable[[str], list[str]]:
    """What cuts a Chinese text into words: characters one by one, or jieba's words, as in the paper.

    Raises KvcompileError where jieba is not installed.
    """
    if segment == "characters":
        return list
    try:
        import jieba
    except ImportError as error:
        raise KvcompileError(
            "tasks.longbench: segment=jieba needs that package", "none", "pip install jieba, or segment=characters"
        ) from error
    return lambda text: list(jieba.cut(text, cut_all=False))


def f1_zh(said: str, answer: str, cut: Callable[[str], list[str]]) -> float:
    """F1 of two multisets of words of Chinese, in lower case, without punctuation."""
    ours, theirs = (["".join(w.lower().translate(_PUNCTUATION).split()) for w in cut(text)] for text in (said, answer))
    return f1_of_words([w for w in ours if w], [w for w in theirs if w])


def classification(said: str, answer: str, classes: Sequence[str]) -> float:
    """1 / n where the answer is among the n labels that were said, 0 where it is not.

    A label that is a part of the answer does not count, unless the one before it in the list was just left out: the
    published code removes from the list that it walks.
    """
    named = [label for label in classes if label in said]
    i = 0
    while i < len(named):
        if named[i] in answer and named[i] != answer:
            del named[i]
        i += 1
    return 1 / len(named) if answer in named else 0.0


def paragraph(metric: str, answer: str) -> str:
    """The number that an answer of a retrieval names. Raises KvcompileError for one that names none."""
    number = PARAGRAPH[metric].search(answer)
    if number is None:
        raise KvcompileError(f"tasks.longbench: an answer must be like {PARAGRAPH[metric].pattern}", repr(answer))
    return number[1]


def counted(said: str, answer: str) -> float:
    """Share of the numbers said that are the answer; 0 where none was said."""
    numbers = re.findall(r"\d+", said)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def code(said: str, answer: str) -> float:
    """Similarity of the first line said that is neither comment nor markup with the right line, in hundredths.

    difflib's ratio: twice the characters in matching blocks over all characters (`fuzz.ratio` of fuzzywuzzy where
    python-Levenshtein is not installed); 1 for the same, 0 where one is empty.
    """
    lines = said.lstrip("\n").split("\n")
    line = next((each for each in lines if not any(mark in each for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100
