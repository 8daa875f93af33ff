"""Protects recipes side by side: a contest answers as each recipe by itself does, and measures live caches."""

from __future__ import annotations

import pytest
import torch
from contract_table import dense
from tiny import tiny_ids

from kvcompile.analysis.compare.contest import Contest, tokens_read
from kvcompile.analysis.compare.entry import Entry
from kvcompile.compiler import compile
from kvcompile.errors import KvcompileError
from kvcompile.models.sharing import shared

IDS = tiny_ids(1, 60, seed=11)[0].tolist()


class Numbers:
    """Tokens are written as their ids."""

    eos_token_id, added_tokens_decoder = None, {}

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def contest() -> Contest:
    runs = Contest(dense(), Numbers(), kernels="sdpa")
    runs.stop = frozenset()
    return runs


@torch.inference_mode()
def by_itself(overrides: list[str], read: int, count: int) -> tuple[str, int]:
    """The same from the recipe compiled alone: the answer, and the bytes it holds after its prompt."""
    model = compile(shared(dense()), overrides=[*overrides, "kernels=sdpa"])
    cache = model(torch.tensor([IDS[:read]])).past_key_values
    held, said, rest = cache.nbytes() + cache.index_bytes(), [], list(IDS[read:])
    while len(said) < count:
        logits = model(torch.tensor([[(rest.pop(0) if rest else said[-1])]]), past_key_values=cache).logits
        said += [] if rest else [int(logits[0, -1].argmax())]
    return Numbers().decode(said), held


@pytest.mark.parametrize(
    "text",
    [
        "full",
        "snapkv budget=0.3",
        "policy=[snapkv,rotate,kivi] budget=0.5",
        "policy=[h2o] budget=20",
        "gqa",
        "policy=[adakv] budget=0.3 prefill_chunk=16",
        "policy=[quest] stack.quest.budget=16",
    ],
)
@pytest.mark.parametrize("question", ["seen", "hidden"])
def test_an_answer_is_what_the_recipe_by_itself_gives(contest: Contest, text: str, question: str) -> None:
    entry, read = Entry(text), tokens_read(IDS, 48, question)
    found = contest.answer(entry, IDS, read, 5)
    text, held = by_itself(list(entry.overrides), read, 5)
    assert (found["text"], found["held"]) == (text, held)
    assert found["dense"] == 2 * 4 * 2 * 16 * 4 * read  # keys and values, layers, heads, channels, bytes
    if entry.fixed:
        assert (found["held"], found["read"]) == (found["dense"], found["dense_read"])


def test_recipes_that_leave_weights_alone_share_one_prefill_and_the_question_goes_on_from_the_context() -> None:
    runs, lengths = Contest(dense(), Numbers(), kernels="sdpa"), []
    for read in (48, 59):
        for text in ("full", "snapkv budget=0.3", "streaming budget=0.3"):
            runs.answer(Entry(text), IDS, read, 1)
    (reader,) = runs._readers.values()
    assert reader.ids == IDS[:59]
    extend, reader.extend = reader.extend, lambda ids: (lengths.append(len(ids)), extend(ids))
    runs.answer(Entry("full"), IDS, 59, 1)
    assert lengths == []
    runs.answer(Entry("full"), IDS[1:], 40, 1)
    assert lengths == [40]


def test_a_recipe_that_is_forgotten_is_built_again() -> None:
    runs = Contest(dense(), Numbers(), kernels="sdpa")
    first = runs.runner(Entry("snapkv"))
    assert runs.runner(Entry("snapkv")) is first
    runs.forget(Entry("snapkv"))
    runs.forget(Entry("snapkv"))
    assert runs.runner(Entry("snapkv")) is not first


def test_an_end_token_ends_an_answer_and_is_no_part_of_it(contest: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_ = contest.answer(Entry("full"), IDS, 59, 5)["text"].split()
    monkeypatch.setattr(contest, "stop", frozenset({int(first)}))
    assert contest.answer(Entry("full"), IDS, 59, 5)["text"] == ""


def test_what_is_no_recipe_is_refused_before_anything_is_measured(contest: Contest) -> None:
    with pytest.raises(KvcompileError, match="settings of recipes"):
        Entry("snapkv model.dtype=float16")
    with pytest.raises(KvcompileError, match="unknown recipe"):
        contest.require_possible([Entry("full"), Entry("snapvk")])


def test_a_budget_is_given_as_on_the_command_line() -> None:
    assert Entry("zigzag").within(0.25).overrides == ("recipe=zigzag", "budget=0.25")
    assert Entry("full").fixed
    assert not Entry("snapkv").fixed
