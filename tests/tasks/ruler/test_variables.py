"""Protects variable tracking: the answers are the chain of the value that is asked for; the example is solved right."""

from __future__ import annotations

import re
from random import Random

from spelling import spelling

from kvcompile.tasks.prompt import Encoder
from kvcompile.tasks.ruler.variables import Variables
from kvcompile.tasks.ruler.wording import NOISE

ASSIGNMENT = re.compile(r"^VAR ([A-Z]+) = (?:VAR )?(\w+) ?$", re.MULTILINE)
VALUE = re.compile(r"assigned the value (\d{5}) in")


def chain(context: str, value: str) -> list[str]:
    """Variables that have a value, followed in the order of the assignments."""
    known = {value}
    return [name for name, source in ASSIGNMENT.findall(context) if source in known and not known.add(name)]


def test_all_variables_of_the_chain_are_asked_for() -> None:
    for seed in range(5):
        draft = Variables(example=6).draft(Random(seed), 12, 1024)
        prompt = draft.prompt
        example, rest = prompt.context.split("\n\nMemorize")
        (value,) = VALUE.findall(prompt.question)
        assert chain(rest, value) == list(draft.answers)
        assert [len(name) for name in draft.answers] == [5] * 5
        assert rest.count(NOISE) == 12
        assert prompt.start.endswith(f"above, 5 variables are assigned the value {value}, they are: ")
        said = chain(example, VALUE.findall(example)[0])
        assert [len(name) for name in said] == [3] * 5
        assert example.endswith(f"they are:  {' '.join(said)}")
        assert draft.wording.tokens == 30


def test_the_example_is_as_long_as_rulers() -> None:
    """At most 500 tokens, of a tokenizer that makes few of much; and never less than five lines of noise."""
    assert Variables.of(Encoder(spelling())).example == 5
