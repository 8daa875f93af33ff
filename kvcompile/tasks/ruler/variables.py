"""RULER's variable tracking (`vt`): a chain of assignments in noise, all of whose variables are asked for.

Source: RULER, arXiv 2404.06654, section 3; `variable_tracking.py` of its code, one chain of four hops.
"""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass
from random import Random

from kvcompile.tasks.prompt import Encoder
from kvcompile.tasks.ruler.base import Subtask, largest
from kvcompile.tasks.ruler.needles import different
from kvcompile.tasks.ruler.wording import NOISE, VARIABLES, Draft

HOPS = 4
EXAMPLE_TOKENS = 500  # of the worked example before the task, at most


@dataclass(frozen=True)
class Variables(Subtask):
    """Five variables, the first a number and each other one the one before it; a worked example comes first.

    The example has names of three letters and `example` lines of noise: as many as fit in 500 tokens.
    """

    example: int

    @property
    def least(self) -> int:
        """Every assignment takes the place of another line."""
        return HOPS + 1

    @staticmethod
    def of(encoder: Encoder) -> Variables:
        """The task, with an example as long as RULER's."""
        plain = Encoder(encoder.tokenizer)

        def length(size: int) -> int:
            return len(plain.ids(_chain(Random(0), size, 3).prompt))

        return Variables(largest(length, EXAMPLE_TOKENS, HOPS + 1) or HOPS + 1)

    def draft(self, rng: Random, size: int, tokens: int) -> Draft:
        """size: lines of noise."""
        worked = _chain(rng, self.example, 3)
        prompt = worked.prompt
        example = f"{prompt.context}{prompt.question}{prompt.start} {' '.join(worked.answers)}\n\n"
        return _chain(rng, size, 5, example)


def _chain(rng: Random, size: int, letters: int, example: str = "") -> Draft:
    names = different(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), HOPS + 1)
    value = str(rng.randint(10000, 99998))
    assignments = [f"VAR {names[0]} = {value}"]
    assignments += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names)]
    lines = [NOISE] * size
    for i, place in enumerate(sorted(rng.sample(range(size), len(assignments)))):
        lines.insert(place + i, assignments[i])
    return VARIABLES.draft("\n".join(lines), tuple(names), example, query=value, count=str(len(names)))
