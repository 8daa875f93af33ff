"""Protects LongBench's definition: wordings, lengths, metrics and exceptions are the published ones."""

from __future__ import annotations

import hashlib
import json

import pytest

from kvcompile.tasks.longbench.datasets import DATASETS

PUBLISHED = "2dda2560eb9b520bde3515cfa4107f6fb73cb1e2e9f994ecbb9dfd11b5a247ba"  # of dataset2prompt.json, keys sorted
TOKENS = {  # of dataset2maxlen.json
    "narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "multifieldqa_zh": 64, "hotpotqa": 32, "2wikimqa": 32,
    "musique": 32, "dureader": 128, "gov_report": 512, "qmsum": 512, "multi_news": 512, "vcsum": 512, "trec": 64,
    "triviaqa": 32, "samsum": 128, "lsht": 64, "passage_count": 32, "passage_retrieval_en": 32,
    "passage_retrieval_zh": 32, "lcc": 64, "repobench-p": 64,
}  # fmt: skip
METRICS = {  # of eval.py
    "f1": "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa",
    "f1_zh": "multifieldqa_zh",
    "rouge_l": "gov_report qmsum multi_news samsum",
    "rouge_l_zh": "dureader vcsum",
    "classification": "trec lsht",
    "retrieval": "passage_retrieval_en",
    "retrieval_zh": "passage_retrieval_zh",
    "count": "passage_count",
    "code": "lcc repobench-p",
}


def test_wordings_are_the_published_ones() -> None:
    templates = {name: dataset.template for name, dataset in DATASETS.items()}
    assert hashlib.sha256(json.dumps(templates, sort_keys=True).encode()).hexdigest() == PUBLISHED


def test_lengths_and_metrics_are_the_published_ones() -> None:
    assert {name: dataset.tokens for name, dataset in DATASETS.items()} == TOKENS
    metrics = {name: metric for metric, names in METRICS.items() for name in names.split()}
    assert {name: dataset.metric for name, dataset in DATASETS.items()} == metrics


def test_exceptions_are_the_published_ones() -> None:
    plain = {name for name, dataset in DATASETS.items() if not dataset.chat}
    assert plain == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {name for name, d in DATASETS.items() if d.first_line} == {"trec", "triviaqa", "samsum", "lsht"}


@pytest.mark.parametrize("name", DATASETS)
def test_the_question_begins_after_the_context(name: str) -> None:
    before, after = DATASETS[name].parts
    assert before + after == DATASETS[name].template
    assert before.rstrip().endswith("{context}")
    assert after[0] == after.lstrip()[0]
