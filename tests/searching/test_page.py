"""The page of a search: what was tried, by the number of contexts, with its bytes, answers and command."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

from kvcompile.config.compose import compose
from kvcompile.searching.fit import Fitter
from kvcompile.searching.page import html
from kvcompile.searching.run import Result
from kvcompile.searching.stack import Stack
from kvcompile.searching.study import Tried
from kvcompile.searching.wish import Score, Wish


def tried(number: int, budget: float, *scores: Score) -> Tried:
    stack = Stack({"knorm": {"budget": budget}})
    return Tried(number, stack, float(FITTER.share(stack)), scores, True)


FITTER = Fitter(tiny_config("llama"), 64)
EVERY = (
    tried(0, 0.5, Score(6, 0.1, 0.01, 0.5, None, answers=10), Score(24, 0.1, 0.01, 0.8, None, answers=40)),
    tried(1, 0.25, Score(6, 0.2, 0.01, 0.6, None, answers=10)),
    tried(2, 0.75, Score(6, 0.0, 0.01, 0.4, None, answers=10)),
    tried(3, 0.9, Score(6, 0.0, 0.01, None, None)),
)


@pytest.fixture(scope="module")
def panels() -> Any:
    result = Result(Wish(Fraction(1, 2)), EVERY[0], EVERY[:1], (), EVERY, 0, 1.0, Path(), FITTER)
    text = html(result, compose(["model=llama", "question=hidden"]), ["model=llama"])
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])["panels"]


def test_stacks_are_compared_on_the_same_contexts(panels: Any) -> None:
    names = [[s["stack"].split("=")[-1] for s in panel["standings"]] for panel in panels]
    assert [panel["task"] for panel in panels] == ["24 contexts", "6 contexts"]
    assert names == [["0.5"], ["0.75", "0.5", "0.25"]]  # most bytes first; one that answers nothing has no place
    assert [s["front"] for s in panels[1]["standings"]] == [False, False, True]


def test_a_standing_says_bytes_answers_with_their_interval_and_command(panels: Any) -> None:
    standing = panels[0]["standings"][0]
    assert standing["share"] == EVERY[0].share
    assert standing["held"] + standing["positions"] == EVERY[0].share * FITTER.sizes(Stack({})).dense
    assert (standing["score"]["value"], standing["score"]["answers"]) == (0.8, 40)
    assert 0.6 < standing["score"]["low"] < 0.8 < standing["score"]["high"] < 0.95
    assert standing["command"] == "kvcompile policy=[knorm] stack.knorm.budget=0.5 model=llama".replace(
        "policy=[knorm]", "'policy=[knorm]'"
    )
