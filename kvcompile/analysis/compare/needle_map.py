"""The heat map of needles in a haystack, length x depth, of any recipes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvcompile.analysis.base import Analysis, Subject
from kvcompile.analysis.compare.answers import Answers, Record, percent, right, shares
from kvcompile.analysis.compare.entry import Entry, Question

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvcompile.evaluation.needle import NeedleTask

QUESTIONS: tuple[Question, ...] = ("seen", "hidden")
COLUMNS = 6


@dataclass(frozen=True)
class NeedleMap(Analysis):
    """Share of needles found, by length of the text and depth of the needle, for each recipe.

    A needle is found where its digits come in the greedy answer as one whole number.

    recipes: `full`, or a recipe's name and its settings, e.g. `snapkv budget=0.1`. questions: `seen`, the question
    stands in the prompt that is compressed; `hidden`, it comes afterwards, token by token. samples: prompts of each
    length and depth. form: wording of the needle (`evaluation.needle.FORMS`). source: a text file to hide it in
    (None: the offline text).
    """

    name: ClassVar[str] = "needle_map"
    summary: ClassVar[str] = "needles found by length and depth, recipes side by side"
    recipes: tuple[str, ...] = ("full", "snapkv", "zigzag", "streaming")
    questions: tuple[Question, ...] = QUESTIONS
    tokens: tuple[int, ...] = (512, 1024, 1536, 2048)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 1
    form: str = "magic"
    source: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.require(len(self.recipes) > 0, "recipes", "one or more")
        self.require(len(self.tokens) > 0, "tokens", "one or more lengths")
        self.require(self.samples >= 1, "samples", "1 or more")
        self.require(
            len(self.questions) > 0 and set(self.questions) <= set(QUESTIONS), "questions", "seen, hidden or both"
        )
        for text in self.recipes:
            Entry(text)

    @property
    def tasks(self) -> list[NeedleTask]:
        """One task a length. Raises KvcompileError for an unknown form and for depths out of range."""
        from kvcompile.evaluation.needle import NeedleTask

        count = self.samples * len(self.depths)
        return [NeedleTask(n, count, tuple(self.depths), self.seed, self.form, self.source) for n in self.tokens]

    def part_options(self) -> dict[str, Any]:
        """None: an answer depends on its recipe and its prompt alone, so that more can be asked for later."""
        return {}

    def refuse(self, subject: Subject) -> None:
        """Recipes that cannot be on this model, texts too short for a needle."""
        from dataclasses import replace

        Answers(subject).contest.require_possible(map(Entry, self.recipes))
        for task in self.tasks:
            replace(task, samples=1).prompts(subject.tokenizer)

    def measure(self, subject: Subject) -> Record:
        """By recipe, question, length and depth: prompts, needles found, bytes as shares of the uncompressed cache."""
        answers = Answers(subject)
        cells: dict[tuple[str, str, int, float], list[Record]] = {}
        tasks = self.tasks
        done, total = 0, sum(task.samples for task in tasks) * len(self.recipes) * len(self.questions)
        for task in tasks:
            for prompt in task.prompts(subject.tokenizer):
                for question in sorted(self.questions):  # a hidden question's prompt is the beginning of a seen one's
                    for text in self.recipes:
                        said = answers.of(Entry(text), prompt.ids, prompt.context, question, task.max_new_tokens)
                        key = text, question, prompt.length, prompt.depth
                        cells.setdefault(key, []).append({**said, "right": right(said, prompt.answer)})
                        done += 1
                        subject.progress(self.name, done, total)
        return {"cells": [_cell(key, cells[key]) for key in cells]}

    def section(self, result: Record) -> str:
        """A table of the lengths for each question, with intervals of 95 % of the whole."""
        return "\n\n".join([self._definition(), *(self._table(result, q) for q in QUESTIONS if q in self.questions)])

    def _definition(self) -> str:
        text = "the offline text" if self.source is None else "a text file"
        return (
            f"Needle {self.form} in {text}, {self.samples} a length and depth, seed {self.seed}; found: the digits "
            "come in the greedy answer as one whole number. Held and read: bytes after the prompt and of one step, of "
            "the uncompressed cache's."
        )

    def _table(self, result: Record, question: str) -> str:
        from tabulate import tabulate

        rows = []
        for text in self.recipes:
            mine = [c for c in result["cells"] if (c["recipe"], c["question"]) == (text, question)]
            lengths = [_found([c for c in mine if c["tokens"] == tokens]) for tokens in self.tokens]
            row = [f"`{text}`", *(f"{100 * found / count:.0f}" for found, count in lengths)]
            rows.append([*row, *whole(mine)])
        header = ["recipe", *(f"{n:,}" for n in self.tokens), "all, % (95 %)", "held", "read"]
        table = tabulate(
            rows, header, "github", disable_numparse=True, colalign=("left", *["right"] * (len(header) - 1))
        )
        return f"Found, %, the question {question} when the cache is made:\n\n{table}"

    def draw(self, result: Record, figure: Figure) -> None:
        """A map for each recipe, at most `COLUMNS` side by side, first with the question seen, then hidden."""
        questions = [q for q in QUESTIONS if q in self.questions]
        lines = [(q, self.recipes[i : i + COLUMNS]) for q in questions for i in range(0, len(self.recipes), COLUMNS)]
        columns = min(COLUMNS, len(self.recipes))
        figure.set_size_inches(1.2 + 2.5 * columns, 0.6 + 2.5 * len(lines))
        axes = figure.subplots(len(lines), columns, squeeze=False, sharex=True, sharey=True)
        image: Any = None
        for (question, recipes), row in zip(lines, axes, strict=True):
            for text, ax in zip(recipes, row, strict=False):
                cells = [c for c in result["cells"] if (c["recipe"], c["question"]) == (text, question)]
                image = self._map(ax, cells)
                found, count = _found(cells)
                ax.set_title(f"{text}\n{100 * found / count:.0f} % found, {shares(cells)['held']:.0%} held", fontsize=8)
            row[0].set_ylabel(f"question {question}\ndepth", fontsize=8)
            for ax in row[len(recipes) :]:
                ax.set_axis_off()
        for ax in axes[-1]:
            ax.set_xlabel("tokens", fontsize=8)
        bar = figure.colorbar(image, ax=axes, format="{x:.0%}", shrink=0.8, label="needles found")
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7)

    def _map(self, ax: Axes, cells: Sequence[Record]) -> Any:
        from matplotlib.colors import LinearSegmentedColormap

        from kvcompile.report.plot import KEPT, LOSS

        found = {(c["depth"], c["tokens"]): c["right"] / c["count"] for c in cells}
        grid = [[found[depth, tokens] for tokens in self.tokens] for depth in self.depths]
        colours = LinearSegmentedColormap.from_list("found", [LOSS, "#f4efe6", KEPT])
        image = ax.imshow(grid, aspect="auto", cmap=colours, vmin=0, vmax=1)
        ax.set_xticks(range(len(self.tokens)), [f"{n:,}" for n in self.tokens], fontsize=7, rotation=45)
        ax.set_yticks(range(len(self.depths)), [f"{d:.0%}" for d in self.depths], fontsize=7)
        ax.set_xticks([i + 0.5 for i in range(len(self.tokens) - 1)], minor=True)
        ax.set_yticks([i + 0.5 for i in range(len(self.depths) - 1)], minor=True)
        ax.grid(which="minor", color="white", linewidth=1.2)
        ax.tick_params(length=0, which="both")
        ax.spines[:].set_visible(False)
        return image

    def numbers(self, result: Record) -> dict[str, float | int | str | None]:
        """The share found of each recipe, the question seen and hidden."""
        keys = [(text, question) for text in self.recipes for question in self.questions]
        pairs = {key: _found([c for c in result["cells"] if (c["recipe"], c["question"]) == key]) for key in keys}
        return {f"needle_{question}_{text}": found / count for (text, question), (found, count) in pairs.items()}


def _cell(key: tuple[str, str, int, float], answers: Sequence[Record]) -> Record:
    recipe, question, tokens, depth = key
    bytes_of = {name: sum(a[name] for a in answers) for name in ("held", "dense", "read", "dense_read")}
    found = sum(a["right"] for a in answers)
    place = {"recipe": recipe, "question": question, "tokens": tokens, "depth": depth}
    return {**place, "count": len(answers), "right": found, **bytes_of}


def _found(cells: Sequence[Record]) -> tuple[int, int]:
    return sum(c["right"] for c in cells), sum(c["count"] for c in cells)


def whole(cells: Sequence[Record]) -> list[str]:
    """Found with its interval, and bytes held and read, as words of a table."""
    from kvcompile.evaluation.intervals import wilson

    found, count = _found(cells)
    of = shares(cells)
    return [percent(found / count, *wilson(found, count)), f"{of['held']:.1%}", f"{of['read']:.1%}"]
