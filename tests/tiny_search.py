"""A tiny search for tests: a task of the tiny tokenizer's words, a space of tiny stacks, a measure that computes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from tiny import tiny_ids

from kvcompile.searching.climb import Search
from kvcompile.searching.fit import Fitter
from kvcompile.searching.space import Space, parse
from kvcompile.searching.stack import Stack
from kvcompile.searching.study import Study
from kvcompile.searching.wish import Wish
from kvcompile.tasks import registry
from kvcompile.tasks.base import Sample, Task, Turn

SPACE = """
places:
  score:
    snapkv: {snapkv: {budget: fit, kernel: [1, 3], window: {low: 2, high: 24}}}
    keydiff: {keydiff: {budget: fit, sinks: {low: 0, high: 6}}}
    kivi: {kivi: {}}
  allocation:
    adakv: {when: {score: [snapkv, keydiff]}, adakv: {safeguard: {low: 0.0, high: 0.5}}}
    uniform: {}
first: [{score: keydiff, allocation: adakv}, {score: kivi}]
tasks: {words: {samples: 6}}
unseen: {words: {samples: 4, seed: 1}}
"""


@dataclass(frozen=True)
class Words(Task):
    """Random words, and two more after them: whatever the model says, some answers are likelier than others."""

    name: ClassVar[str] = "words"
    summary: ClassVar[str] = "for tests"
    samples: int = 3
    tokens: int = 60
    seed: int = 0

    def make_samples(self, tokenizer: Any, longest: int) -> Sequence[Sample]:
        def ids(n: int, seed: int) -> tuple[int, ...]:
            return tuple(tiny_ids(1, n, seed=seed)[0].tolist())

        samples = []
        for i in range(self.samples):
            seed = 1000 * self.seed + 10 * i
            turns = tuple(Turn(ids(3, seed + k), (f"w{10 + i} w{20 + k}",), 3) for k in (1, 2))
            samples.append(Sample(f"{i}", f"part {i % 2}", ids(self.tokens, seed), turns))
        return [*samples, Sample("text", "text", ids(self.tokens, self.seed + 7), rest=ids(5, self.seed + 8))]

    def score(self, said: str, turn: Turn, sample: Sample) -> float:
        return float(bool(said))


@pytest.fixture
def words() -> Any:
    """The task, while it is known."""
    with pytest.MonkeyPatch.context() as patch:
        known = {**registry.discover(), "words": Words}
        patch.setattr(registry, "discover", lambda: known)
        yield


@functools.cache
def space() -> Space:
    return parse("tiny", yaml.safe_load(SPACE))


class Fake:
    """The excess of a stack is how far its window is from 10 (or its sinks + 20); contexts add the same to all."""

    def __init__(self, fails: str = "") -> None:
        self.asked: list[tuple[tuple[str, ...], Any]] = []
        self.forgotten: list[tuple[str, ...]] = []
        self.fails = fails

    def of(self, stack: Stack, context: Any) -> dict[str, Any]:
        if self.fails and self.fails in stack.options:
            raise RuntimeError("no memory\nfor this")
        self.asked.append((stack.overrides, context))
        fields = next(iter(stack.options.values()))
        away = abs(fields.get("window", fields.get("sinks", 0) + 20) - 10) / 10
        return {"answers": [[float(away < 0.5), away + context]]}

    def dense(self, context: Any) -> dict[str, Any]:
        return {"answers": [[1.0, float(context)]]}

    def forget(self, stack: Stack) -> None:
        self.forgotten.append(stack.overrides)

    def refresh(self) -> None:
        pass


def fake_search(folder: Path, architecture: Any, wish: Wish, meter: Fake, storage: str | None = None) -> Search:
    """A search over the tiny space whose rungs are the numbers of contexts."""
    study = Study("tiny", storage, folder, wish.aims, {"wish": str(wish)}, seed=0)
    fitter = Fitter(architecture, 100)
    return Search(
        study, space(), wish, fitter, meter, [[0, 1], [0, 1, 2], [0, 1, 2, 3, 4]], batch=3, say=lambda _: None
    )
