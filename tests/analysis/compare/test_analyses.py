"""Protects the analyses of answers: which prompts go to which recipe, what counts as right, and that parts are kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvcompile.analysis.compare.answers import Answers
from kvcompile.analysis.compare.budget_curve import BudgetCurve
from kvcompile.analysis.compare.needle_map import NeedleMap
from kvcompile.analysis.parts import Parts
from kvcompile.analysis.prompts import Prompt
from kvcompile.config.schema import Config, PromptsConfig
from kvcompile.errors import KvcompileError


class Letters:
    """Tokenizer of characters."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(map(ord, text))}


class Reader:
    """In place of a contest: `full` finds every number, a recipe those in the last `budget` of what it has read."""

    asked: list[tuple[str, int]]

    def __init__(self) -> None:
        self.asked = []

    def require_possible(self, entries: Any) -> None:
        for entry in entries:
            entry.config()

    def answer(self, entry: Any, ids: list[int], read: int, count: int) -> dict[str, Any]:
        self.asked.append((entry.text, read))
        share = 1.0 if entry.fixed else float(entry.text.rpartition("=")[2])
        text = "".join(map(chr, ids[int((1 - share) * read) :]))
        found = re.search(r"<<(.*)>>| is: (\d{7})", text)
        said = (found[1] or found[2]) if found else "nothing"
        return {"text": f"{said}.", "held": share * read, "read": share * read, "dense": read, "dense_read": read}


class Subject:
    """What an analysis looks at, without a model."""

    tokenizer = Letters()

    def __init__(self, path: Path, prompts: list[Prompt] | None = None) -> None:
        self.prompts, self.parts = prompts or [], Parts(path, "settings")
        self.config = Config(prompts=PromptsConfig(source="a file" if prompts else None))
        self.part, self.progress = self.parts.of, lambda *_: None


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    stub = Reader()
    monkeypatch.setattr(Answers, "contest", stub)
    return stub


def drawn(analysis: Any, result: dict[str, Any]) -> Figure:
    figure = Figure(dpi=40, layout="constrained")
    FigureCanvasAgg(figure)
    analysis.draw(result, figure)
    figure.canvas.draw()
    return figure


MAP = NeedleMap(recipes=("full", "snapkv budget=0.5"), tokens=(1200, 2400), depths=(0.0, 1.0), samples=2)


def test_a_map_has_a_cell_for_each_recipe_question_length_and_depth(reader: Reader, tmp_path: Path) -> None:
    subject = Subject(tmp_path / "parts")
    MAP.refuse(subject)
    result = MAP.measure(subject)
    cells = {(c["recipe"], c["question"], c["tokens"], c["depth"]): c for c in result["cells"]}
    assert len(cells) == len(result["cells"]) == 16
    assert all(c["count"] == 2 for c in cells.values())
    assert all(c["right"] == 2 for key, c in cells.items() if key[0] == "full")
    half = {key[1:]: c["right"] for key, c in cells.items() if key[0] != "full"}
    assert all(half[q, n, 0.0] == 0 and half[q, n, 1.0] == 2 for q in ("seen", "hidden") for n in (1200, 2400))
    table = MAP.section(result)
    assert "| `snapkv budget=0.5` | 50 | 50 | 50 (22-78) | 50.0% | 50.0% |" in re.sub(" +", " ", table)
    assert [q in table for q in ("question seen", "question hidden")] == [True, True]
    assert len(drawn(MAP, result).axes) == 5  # 2 x 2 maps and their bar
    assert MAP.numbers(result)["needle_seen_snapkv budget=0.5"] == 0.5
    assert json.loads(json.dumps(result)) == result


def test_many_recipes_have_maps_in_several_lines(reader: Reader, tmp_path: Path) -> None:
    many = NeedleMap(tuple(f"snapkv budget=0.{i}" for i in range(1, 9)), ("seen",), (1200,), (0.0, 1.0))
    figure = drawn(many, many.measure(Subject(tmp_path / "parts")))
    assert [ax.axison for ax in figure.axes[:12]] == [True] * 8 + [False] * 4


def test_a_hidden_question_is_not_read_before_the_cache_is_made(reader: Reader, tmp_path: Path) -> None:
    MAP.measure(Subject(tmp_path / "parts"))
    (prompt, *_) = MAP.tasks[0].prompts(Letters())
    assert reader.asked[0] == ("full", prompt.context)
    assert reader.asked[2] == ("full", len(prompt.ids) - 1)
    assert prompt.context < len(prompt.ids) - 40


def test_what_is_measured_is_not_measured_again_and_more_can_be_asked_for(reader: Reader, tmp_path: Path) -> None:
    MAP.measure(Subject(tmp_path / "parts"))
    before = len(reader.asked)
    subject = Subject(tmp_path / "parts")
    MAP.measure(subject)
    assert (len(reader.asked), subject.parts.reused) == (before, before)
    NeedleMap(("full", "snapkv budget=0.1"), tokens=(1200,), depths=(0.0, 1.0), samples=2).measure(subject)
    assert {text for text, _ in reader.asked[before:]} == {"snapkv budget=0.1"}


CURVE = BudgetCurve(recipes=("snapkv", "full"), budgets=(0.25, 0.75), needles=4, needle_tokens=1200)
QUESTION = Prompt(
    "a", tuple(map(ord, "x" * 50 + "<<New York>>" + "x" * 40 + "Where?")), 100, "Where?", ("york", "Lima")
)


def test_a_curve_has_a_point_for_each_task_recipe_and_budget(reader: Reader, tmp_path: Path) -> None:
    subject = Subject(tmp_path / "parts", [QUESTION, Prompt("b", (1, 2), 2)])  # the other has no answers: not asked
    CURVE.refuse(subject)
    result = CURVE.measure(subject)
    points = {(p["task"], p["recipe"], p["budget"]): p for p in result["points"]}
    assert [(p["count"], round(p["held"], 2)) for p in points.values()] == [
        (4, 0.25),
        (4, 0.75),
        (4, 1),
        *[(1, x) for x in (0.25, 0.75, 1)],
    ]
    assert points["needle", "full", None]["mean"] == 1.0
    assert points["needle", "snapkv", 0.25]["mean"] == 0.25  # the deepest of four
    assert points["needle", "snapkv", 0.75]["mean"] == 0.75
    assert points["qa", "snapkv", 0.25]["mean"] == 0
    assert points["qa", "full", None]["mean"] == pytest.approx(2 / 3)  # york of new york
    whole = points["needle", "full", None]
    assert (whole["low"], whole["high"]) == (pytest.approx(0.5101, abs=1e-4), 1.0)
    table = CURVE.section(result)
    assert "Token F1" in table
    assert "Needles found" in table
    assert len(drawn(CURVE, result).axes) == 2
    assert CURVE.numbers(result)["qa_snapkv"] == 0


def test_a_curve_without_questions_says_so(reader: Reader, tmp_path: Path) -> None:
    subject = Subject(tmp_path / "parts")
    result = CURVE.measure(subject)
    assert "names no file with answers" in CURVE.section(result)
    assert len(drawn(CURVE, result).axes) == 1
    with pytest.raises(KvcompileError, match="something to ask"):
        BudgetCurve(needles=0).refuse(subject)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (NeedleMap, {"recipes": ()}),
        (NeedleMap, {"questions": ("asked",)}),
        (NeedleMap, {"recipes": ("snapkv model=x",)}),
        (BudgetCurve, {"budgets": (0.0,)}),
        (BudgetCurve, {"needles": -1}),
    ],
)
def test_options_out_of_range_are_refused(cls: Any, options: dict[str, Any]) -> None:
    with pytest.raises(KvcompileError):
        cls(**options)


def test_a_recipe_that_is_not_there_is_refused_before_anything_is_measured(reader: Reader, tmp_path: Path) -> None:
    with pytest.raises(KvcompileError, match="did you mean 'snapkv'"):
        NeedleMap(recipes=("snapvk",)).refuse(Subject(tmp_path / "parts"))
    assert not reader.asked
