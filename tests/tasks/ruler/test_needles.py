"""Protects RULER's needles: what is hidden where, and asked in which words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import pytest

from kvcompile.calibration.text import sentences
from kvcompile.tasks.ruler.needles import DEPTHS, SETTINGS, Needles, first_words, needles
from kvcompile.tasks.ruler.wording import NOISE
from kvcompile.tasks.ruler.words import Words, words

READY = Path(__file__).parents[4] / "shared/data/ruler/4096_niah_multikey_3.first60.jsonl"
NEEDLE = re.compile(r"One of the special magic (\w+) for ([\w-]+) is: ([\w-]+)\.")
NUMBER, UUID = r"[1-9]\d{6}", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
KEY = r"[a-z]+-[a-z]+"
# of each task: what keys and values look like, needles in the context of 40, keys asked for, values of each
FORMS = {
    "niah_single_1": (KEY, NUMBER, 1, 1, 1),
    "niah_single_2": (KEY, NUMBER, 1, 1, 1),
    "niah_single_3": (KEY, UUID, 1, 1, 1),
    "niah_multikey_1": (KEY, NUMBER, 4, 1, 1),
    "niah_multikey_2": (KEY, NUMBER, 41, 1, 1),
    "niah_multikey_3": (UUID, UUID, 41, 1, 1),
    "niah_multivalue": (KEY, NUMBER, 4, 1, 4),
    "niah_multiquery": (KEY, NUMBER, 4, 4, 1),
}


def task(name: str) -> Needles:
    return needles(words("text"), tuple(sentences()))[name]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_answers_are_the_values_of_the_keys_that_are_asked_for(name: str, seed: int) -> None:
    key, value, count, asked, each = FORMS[name]
    draft = task(name).draft(Random(seed), 40, 1024)
    hidden = NEEDLE.findall(draft.prompt.context)
    assert len(hidden) == count
    assert all(re.fullmatch(key, k) and re.fullmatch(value, v) for _, k, v in hidden)
    several = asked * each > 1
    kind = hidden[0][0] if several else hidden[0][0].removesuffix("s")
    opening, verb = ("What are all the", "are") if several else ("What is the", "is")
    question = rf"{opening} special magic {kind} for (.+) mentioned in the provided text\?"
    (queries,) = re.fullmatch(question, draft.prompt.question).groups()
    assert draft.prompt.start == f" The special magic {kind} for {queries} mentioned in the provided text {verb}"
    keys = re.split(r", and |, ", queries)
    assert len(set(keys)) == asked
    assert sorted(draft.answers) == sorted(v for _, k, v in hidden if k in keys), "no other needle has such a key"
    assert draft.wording.tokens == 128
    assert not draft.wording.any


def test_no_other_needle_has_the_key_that_is_asked_for() -> None:
    """With 16 keys in all, half of which the others take, a draw of one twice is near."""
    few = ("a", "b", "c", "d")
    small = Needles(Words(few, few, few), (), haystack="needles")
    assert small.most == 8
    for seed in range(20):
        prompt = small.draft(Random(seed), 8, 1024).prompt
        assert len({key for _, key, _ in NEEDLE.findall(prompt.context)}) == 9


def test_the_beginning_says_what_is_hidden() -> None:
    one, many = (task(name).draft(Random(0), 40, 1024).prompt for name in ("niah_single_3", "niah_multivalue"))
    assert one.context.startswith(
        "A special magic uuid is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the uuid afterwards.\n"
    )
    assert many.context.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )


def test_noise_is_the_same_line_over_and_over() -> None:
    _, *lines = task("niah_single_1").draft(Random(1), 25, 1024).prompt.context.splitlines()
    assert len(lines) == 26
    assert sum(line == NOISE for line in lines) == 25


def test_needles_in_a_text_stand_between_its_first_sentences() -> None:
    for seed in range(5):
        _, context = task("niah_multikey_1").draft(Random(seed), 300, 1024).prompt.context.rstrip("\n").split("\n")
        text = " ".join(first_words(tuple(sentences()), 300))
        assert " ".join(NEEDLE.sub("", context).split()) == text
        for place in (match.start() for match in NEEDLE.finditer(context)):
            assert place == 0 or context[place - 2] in '.!?"'
    assert DEPTHS[:3] == [0, 3, 5]
    assert (len(DEPTHS), DEPTHS[-1]) == (40, 100)


def test_a_text_begins_again_where_it_ends() -> None:
    assert first_words(("a b.", "c."), 7) == ["a b.", "c.", "a b.", "c.", "a"]


@pytest.mark.skipif(not READY.exists(), reason=f"{READY} is not there")
def test_ready_prompts_of_ruler_have_our_structure() -> None:
    """Keys and values aside, each ready prompt is ours with as many needles, to the letter."""
    ours = task("niah_multikey_3")
    for line in READY.read_text("utf-8").splitlines()[:20]:
        row = json.loads(line)
        hidden = NEEDLE.findall(row["input"])
        prompt = ours.draft(Random(0), len(hidden) - 1, 4096).prompt
        assert re.sub(UUID, "?", row["input"]) == re.sub(UUID, "?", prompt.context + prompt.question + prompt.start)
        assert row["outputs"] == [v for _, k, v in hidden if k in row["input"].rpartition("What is")[2]]
