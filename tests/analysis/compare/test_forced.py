"""Protects forced answers: right is what greedy decoding says, and the likelihood is that of its steps."""

from __future__ import annotations

import pytest
import torch
from contract_table import dense
from tiny import tiny_ids

from kvcompile.analysis.compare.contest import Contest
from kvcompile.analysis.compare.entry import Entry
from kvcompile.analysis.compare.forced import continued, forced
from kvcompile.evaluation.perplexity import of_windows

IDS = tiny_ids(1, 60, seed=11)[0].tolist()
CONTEXT, QUESTION = IDS[:40], IDS[40:50]


@pytest.fixture(scope="module")
def contest() -> Contest:
    return Contest(dense(), None, kernels="sdpa")


@pytest.mark.parametrize("text", ["full", "snapkv budget=0.3", "policy=[adakv,rotate,kivi] budget=0.5"])
def test_an_answer_is_right_where_greedy_decoding_says_it(contest: Contest, text: str) -> None:
    runner = contest.runner(Entry(text))
    cache = runner.cache(CONTEXT)
    going = cache.fork()
    logits = [runner.step(going, *QUESTION)]
    said = [int(logits[0].argmax())]
    while len(said) < 4:
        logits.append(runner.step(going, said[-1]))
        said.append(int(logits[-1].argmax()))
    result = forced(runner, cache.fork(), QUESTION, said)
    steps = torch.stack(logits).float().log_softmax(-1)
    assert result.exact
    assert result.nll == pytest.approx(-float(steps[range(4), said].mean()), abs=2e-2 if "kivi" in text else 1e-4)
    wrong = forced(runner, cache.fork(), QUESTION, [*said[:-1], (said[-1] + 1) % 64])
    assert not wrong.exact
    assert wrong.nll > result.nll


def test_nothing_is_dropped_between_question_and_answer_that_are_read_together(contest: Contest) -> None:
    runner = contest.runner(Entry("policy=[snapkv] budget=20 stack.snapkv.window=4"))
    cache = runner.cache(CONTEXT)
    apart, together = cache.fork(), cache.fork()
    forced(runner, apart, QUESTION, IDS[50:51])
    forced(runner, together, QUESTION, IDS[50:51], together=True)
    assert apart.lengths() == together.lengths() == [[20, 20]] * 4
    one = forced(runner, cache.fork(), QUESTION, IDS[50:53], together=True)
    other = forced(runner, cache.fork(), QUESTION, IDS[50:53])
    assert one.nll != pytest.approx(other.nll, abs=1e-6)


def test_text_that_goes_on_is_scored_as_step_by_step(contest: Contest) -> None:
    runner, rest = contest.runner(Entry("snapkv budget=0.3")), IDS[40:]
    steps = of_windows(runner.model, torch.tensor([IDS]), 40)
    assert continued(runner, runner.cache(CONTEXT), rest) == pytest.approx(float(torch.tensor(steps).log()), abs=1e-4)
