"""Protects the needle score: prompts as asked, exact answers only, by generation only."""

from __future__ import annotations

import re

import pytest
import torch
from tiny import tiny_model

from kvcompile.compiler import compile
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.needle import FORMS, NeedleRecord, NeedleResult, NeedleTask, score


class Words:
    """Tokenizer of words and white space; `pad` is no word of any text."""

    pad_token_id, eos_token_id = 0, None

    def __init__(self) -> None:
        self.known: list[str] = ["<pad>"]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        pieces = re.findall(r"\s+|[^\s.:]+|[.:]", text)
        self.known += sorted(set(pieces) - set(self.known))
        place = {piece: i for i, piece in enumerate(self.known)}
        return {"input_ids": [place[piece] for piece in pieces]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.known[i] for i in ids)


class Reader:
    """A model that looks for the number after the last word group of the question, or says another number."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: Words, only_late: bool = False) -> None:
        self.tokenizer, self.only_late, self.calls = tokenizer, only_late, []

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int, **kwargs):
        self.calls.append((tuple(input_ids.shape), kwargs))
        answers = []
        for row, mask in zip(input_ids.tolist(), attention_mask.tolist()):
            assert mask == sorted(mask)  # pads on the left
            text = self.tokenizer.decode([i for i, m in zip(row, mask) if m])
            key = re.findall(r"[a-z]+-[a-z]+", text)[-1]
            found = re.search(rf"{key}\D*?(\d{{7}})", text)
            late = found.start() > len(text) / 2
            answer = found[1] if late or not self.only_late else found[1] + "0"
            answers.append(self.tokenizer(f" {answer}.")["input_ids"])
        return torch.cat([input_ids, torch.tensor(answers)], 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [400, 1000])
def test_prompts_have_the_length_and_the_needle_at_the_depth_asked(form: str, tokens: int) -> None:
    words, depths = Words(), (0.0, 0.3, 0.7, 1.0)
    task = NeedleTask(tokens=tokens, samples=4, depths=depths, form=form)
    prompts = task.prompts(words)
    assert [p.depth for p in prompts] == list(depths)
    for prompt in prompts:
        text = words.decode(prompt.ids)
        assert tokens - 15 <= len(prompt.ids) <= tokens
        assert text.count(prompt.answer) == 1
        assert len(re.findall(r"\d{7}", text)) == 1 + FORMS[form].others
        body = text.split("\n", 1)[1].rsplit(FORMS[form].question.split("{key}")[0], 1)[0]
        assert body.index(prompt.answer) / len(body) == pytest.approx(prompt.depth, abs=100 / tokens)


@pytest.mark.parametrize("form", FORMS)
def test_the_ids_before_the_question_hold_all_of_the_text_and_none_of_the_question(form: str) -> None:
    words = Words()
    (prompt,) = NeedleTask(tokens=400, samples=1, form=form).prompts(words)
    text, question = words.decode(prompt.ids[: prompt.context]), words.decode(prompt.ids[prompt.context :])
    assert prompt.answer in text
    assert text.endswith("\n")
    assert question.startswith(FORMS[form].question.split("{key}")[0])


def test_a_group_asks_for_every_number_of_one_text_and_begins_with_the_prompt_itself() -> None:
    words, task = Words(), NeedleTask(tokens=500, samples=2, form="four_keys")
    groups = task.groups(words)
    assert [group[0] for group in groups] == task.prompts(words)
    for group in groups:
        assert len({p.answer for p in group}) == len(group) == 4
        assert len({tuple(p.ids[: p.context]) for p in group}) == 1
        for prompt in group:
            text, question = words.decode(prompt.ids[: prompt.context]), words.decode(prompt.ids[prompt.context :])
            key = re.findall(r"[a-z]+-[a-z]+", question)[-1]
            assert re.search(rf"{key} is: (\d+)", text)[1] == prompt.answer
            body = text.split("\n", 1)[1]
            assert body.index(prompt.answer) / len(body) == pytest.approx(prompt.depth, abs=0.2)


def test_prompts_repeat_for_a_seed_and_differ_between_seeds_samples_and_forms() -> None:
    def answers(**of: object) -> list[str]:
        return [p.answer for p in NeedleTask(tokens=300, **of).prompts(Words())]

    assert answers(seed=1) == answers(seed=1)
    everything = answers(seed=1) + answers(seed=2) + answers(seed=1, form="two_keys")
    assert len(set(everything)) == len(everything)


def test_fewer_samples_than_depths_still_span_them() -> None:
    task = NeedleTask(samples=2, depths=(0.0, 0.5, 1.0))
    assert [task.depth(i) for i in range(2)] == [0.0, 1.0]


def test_the_haystack_can_be_a_file_and_is_repeated_when_short(tmp_path) -> None:
    essay = tmp_path / "essay.txt"
    essay.write_text("The sea was calm on that evening. Nobody had expected any letter.", encoding="utf-8")
    words = Words()
    (prompt,) = NeedleTask(tokens=400, samples=1, source=str(essay)).prompts(words)
    assert words.decode(prompt.ids).count("Nobody had expected any letter.") > 5


@pytest.mark.parametrize("batch", [1, 3])
def test_score_counts_exact_answers_by_depth(batch: int) -> None:
    words = Words()
    task = NeedleTask(tokens=600, samples=8, depths=(0.1, 0.9))
    seen = []
    perfect = score(Reader(words), words, task, lambda *step: seen.append(step), batch)
    assert perfect.mean == 1.0
    assert seen[-1][1:] == (8, 8)
    model = Reader(words, only_late=True)  # at depth 0.1 it appends a digit: contains the answer, is not it
    half = score(model, words, task, batch=batch)
    assert half.by_depth == {0.1: 0.0, 0.9: 1.0}
    assert half.mean == 0.5
    assert all(r.right == (r.text.strip(" .") == r.answer) for r in half.records)
    assert all(shape[0] <= batch and not kwargs["do_sample"] for shape, kwargs in model.calls)


def test_a_hidden_question_comes_over_the_cache_of_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    words, task = Words(), NeedleTask(tokens=600, samples=2)
    first, second = task.prompts(words)
    model, read = Reader(words), []

    def forward(model: Reader, ids: torch.Tensor) -> tuple[None, int]:
        read.append(ids[0].tolist())
        return None, len(read)

    monkeypatch.setattr("kvcompile.evaluation.needle.forward", forward)
    assert score(model, words, task, question="hidden").mean == 1.0
    assert read == [prompt.ids[: prompt.context] for prompt in (first, second)]
    assert [kwargs["past_key_values"] for _, kwargs in model.calls] == [1, 2], "each has its own"
    with pytest.raises(KvcompileError, match="1 where the question is hidden"):
        score(model, words, task, batch=2, question="hidden")


def test_a_hidden_question_reads_the_compressed_cache_of_a_compiled_model() -> None:
    words, task = Words(), NeedleTask(tokens=160, samples=1)
    (prompt,) = task.prompts(words)
    model = compile(tiny_model("llama", vocab_size=len(words.known)), "streaming", ["budget=0.3", "kernels=sdpa"])
    ids = [torch.tensor([piece]) for piece in (prompt.ids[: prompt.context], prompt.ids[prompt.context :])]
    said = []
    with torch.inference_mode():
        cache = model(ids[0]).past_key_values
        assert max(map(max, cache.lengths())) < 0.4 * prompt.context
        piece = ids[1]
        for _ in range(task.max_new_tokens):
            said.append(int(model(piece, past_key_values=cache).logits[0, -1].argmax()))
            piece = torch.tensor([[said[-1]]])
    (record,) = score(model, words, task, question="hidden").records
    assert record.text == words.decode(said)
    assert (record.haystack, record.tokens) == ("reference", len(prompt.ids))


def test_results_of_several_lengths_add_up() -> None:
    def record(length: int, right: bool) -> NeedleRecord:
        return NeedleRecord("magic", length, length, 0.5, "1", "1", right)

    both = NeedleResult((record(64, True),)) + NeedleResult((record(128, True), record(128, False)))
    assert both.mean == pytest.approx(2 / 3)


def test_a_real_model_class_generates_and_an_untrained_one_fails() -> None:
    words = Words()
    task = NeedleTask(tokens=160, samples=2)
    task.prompts(words)  # makes the vocabulary
    model = tiny_model("llama", vocab_size=len(words.known))
    result = score(model, words, task, batch=2)
    assert result.mean == 0.0
    assert len(result.records) == 2


@pytest.mark.parametrize(
    "wrong", [{"form": "story_"}, {"samples": 0}, {"depths": ()}, {"depths": (1.5,)}, {"max_new_tokens": 3}]
)
def test_values_out_of_range_are_named(wrong: dict) -> None:
    with pytest.raises(KvcompileError, match="needle"):
        NeedleTask(**wrong)


def test_too_few_tokens_name_the_least() -> None:
    with pytest.raises(KvcompileError, match=r"more tokens, got 20\. Fix: \d+ or more"):
        NeedleTask(tokens=20).prompts(Words())
