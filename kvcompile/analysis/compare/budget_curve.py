"""Answers over kept bytes: F1 of questions over long contexts, and needles found, of recipes at several budgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvcompile.analysis.base import Analysis, Subject
from kvcompile.analysis.compare.answers import Answers, Record, percent, right, shares
from kvcompile.analysis.compare.entry import Entry, Question
from kvcompile.errors import KvcompileError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvcompile.evaluation.needle import NeedleTask

TITLES = {"needle": "Needles found, %", "qa": "Token F1, %"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#333f48")
MARKERS = "osD^vPX*"
WIDTHS = {1: 2.0, 2: 1.4}  # of a panel, by their number
ASIDE = 0.02  # how far, as a share, the points of two recipes are drawn apart: those of one budget hold the same bytes


@dataclass(frozen=True)
class BudgetCurve(Analysis):
    """Needles found and F1 of answers over the bytes that are held, for recipes at several budgets.

    F1 is LongBench's (`evaluation.qa`), of the prompts of `prompts.source` that have answers. Bytes are measured on the
    live caches. Intervals of 95 %: Wilson's for needles, bootstrap for F1.

    recipes: `full`, or a recipe's name and its settings; each but `full` runs at every one of `budgets`. question:
    `seen`, it stands in the prompt that is compressed; `hidden`, it comes afterwards, token by token. needles: prompts
    with a needle, of `needle_tokens` tokens (0: none). max_new_tokens: of an answer to a question. first_line: score
    no more of it than its first line.
    """

    name: ClassVar[str] = "budget_curve"
    summary: ClassVar[str] = "needles and F1 of answers over the bytes held"
    recipes: tuple[str, ...] = ("zigzag", "snapkv", "pyramidkv", "h2o", "streaming", "full")
    budgets: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.7)
    question: Question = "seen"
    needles: int = 8
    needle_tokens: int = 1024
    form: str = "magic"
    seed: int = 0
    max_new_tokens: int = 32
    first_line: bool = False

    def __post_init__(self) -> None:
        self.require(len(self.recipes) > 0, "recipes", "one or more")
        self.require(len(self.budgets) > 0 and all(b > 0 for b in self.budgets), "budgets", "one or more, above 0")
        self.require(self.needles >= 0, "needles", "0 or more")
        self.require(self.max_new_tokens >= 1, "max_new_tokens", "1 or more")
        for text in self.recipes:
            Entry(text)

    @property
    def task(self) -> NeedleTask | None:
        """The needle prompts. Raises KvcompileError for an unknown form."""
        from kvcompile.evaluation.needle import NeedleTask

        return NeedleTask(self.needle_tokens, self.needles, seed=self.seed, form=self.form) if self.needles else None

    def points(self) -> Iterator[tuple[str, float | None, Entry]]:
        """Every recipe at every budget: its text, the budget (None: as it is), what runs."""
        for text in self.recipes:
            entry = Entry(text)
            for budget in [None] if entry.fixed else self.budgets:
                yield text, budget, entry if budget is None else entry.within(budget)

    def part_options(self) -> dict[str, Any]:
        """None: an answer depends on its recipe and its prompt alone, so that more can be asked for later."""
        return {}

    def refuse(self, subject: Subject) -> None:
        """Recipes that cannot be on this model, and nothing to ask."""
        Answers(subject).contest.require_possible(entry for _, _, entry in self.points())
        if self.task is not None:
            self.task.prompts(subject.tokenizer)
        if subject.config.prompts.source is None:
            if self.task is None:
                raise KvcompileError(
                    "analysis.budget_curve must have something to ask",
                    "needles=0 without prompts.source",
                    "analysis.budget_curve.needles=8, or prompts.source=<a LongBench file>",
                )
        elif not any(prompt.answers for prompt in subject.prompts):
            raise KvcompileError(
                "budget_curve asks prompts that have answers", f"none in {subject.config.prompts.source}"
            )

    def measure(self, subject: Subject) -> Record:
        """By task, recipe and budget: score with its interval, bytes as shares of the uncompressed cache."""
        answers = Answers(subject)
        scores: dict[tuple[str, str, float | None], list[Record]] = {}
        asked = [] if subject.config.prompts.source is None else [p for p in subject.prompts if p.answers]
        questions = [*self._needles(subject), *(("qa", p.ids, p.context, p.answers) for p in asked)]
        for number, (task, ids, context, right_ones) in enumerate(questions):
            count = self.task.max_new_tokens if task == "needle" and self.task else self.max_new_tokens
            for text, budget, entry in self.points():
                said = answers.of(entry, ids, context, self.question, count)
                score = self._score(task, said, right_ones)
                scores.setdefault((task, text, budget), []).append({**said, "score": score})
            subject.progress(self.name, number + 1, len(questions))
        return {"points": [_point(key, said) for key, said in scores.items()]}

    def _needles(self, subject: Subject) -> Iterator[tuple[str, Sequence[int], int, Sequence[str]]]:
        for prompt in self.task.prompts(subject.tokenizer) if self.task else []:
            yield "needle", prompt.ids, prompt.context, (prompt.answer,)

    def _score(self, task: str, said: Record, answers: Sequence[str]) -> float:
        from kvcompile.evaluation.qa import best_f1, first_line

        if task == "needle":
            return float(right(said, answers[0]))
        return best_f1(first_line(said["text"]) if self.first_line else said["text"], answers)

    def section(self, result: Record) -> str:
        """A table for each task."""
        tasks = [task for task in TITLES if any(p["task"] == task for p in result["points"])]
        return "\n\n".join([self._definition(tasks), *(self._table(result, task) for task in tasks)])

    def _definition(self, tasks: Sequence[str]) -> str:
        lines = [
            f"The question is {self.question} when the cache is made; answers are greedy, and every token of them is "
            "predicted by a step over the recipe's own cache. Held and read: bytes after the prompt and of one step, "
            "of the uncompressed cache's, measured."
        ]
        if "needle" in tasks:
            lines.append(
                f"Needle {self.form}, {self.needle_tokens:,} tokens, {self.needles} prompts, seed {self.seed}."
            )
        if "qa" in tasks:
            part = "first line of an answer" if self.first_line else f"answers of at most {self.max_new_tokens} tokens"
            lines.append(f"F1 of words against the best reference, LongBench's, of the {part}.")
        else:
            lines.append("No questions: `prompts.source` names no file with answers.")
        return " ".join(lines)

    def _table(self, result: Record, task: str) -> str:
        from tabulate import tabulate

        rows = [_row(p) for p in result["points"] if p["task"] == task]
        header = ["recipe", "budget", f"{TITLES[task]} (95 %)", "prompts", "held", "read"]
        table: str = tabulate(rows, header, "github", disable_numparse=True, colalign=("left", *["right"] * 5))
        return table

    def draw(self, result: Record, figure: Figure) -> None:
        """A panel for each task: score over the share of bytes held."""
        from kvcompile.analysis.pictures import panels

        tasks = [task for task in TITLES if any(p["task"] == task for p in result["points"])]
        for task, ax in zip(tasks, panels(figure, *[WIDTHS[len(tasks)]] * len(tasks)), strict=True):
            self._curves(ax, [p for p in result["points"] if p["task"] == task])
            ax.set_title(f"{TITLES[task]}, the question {self.question}", fontsize=10)

    def _curves(self, ax: Axes, points: Sequence[Record]) -> None:
        from kvcompile.report.plot import INK

        curved = [text for text in self.recipes if not Entry(text).fixed]
        for number, text in enumerate(curved):
            mine = sorted((p for p in points if p["recipe"] == text), key=lambda p: p["held"])
            aside = 1 + ASIDE * (number - (len(curved) - 1) / 2)
            x, y = [100 * p["held"] * aside for p in mine], [100 * p["mean"] for p in mine]
            spread = [[100 * (p["mean"] - p["low"]) for p in mine], [100 * (p["high"] - p["mean"]) for p in mine]]
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            ax.errorbar(x, y, spread, **style, markersize=4, linewidth=1.4, elinewidth=0.6, alpha=0.9, label=text)
        for whole in (p for p in points if Entry(p["recipe"]).fixed):
            ax.axhline(100 * whole["mean"], color=INK, linestyle="--", linewidth=1.1, label=whole["recipe"])
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("{x:g}")
        ax.tick_params(which="both", length=0, labelsize=7)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("bytes held, % of the uncompressed cache", color=INK)
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 3}
        ax.legend(frameon=False, fontsize=8, labelcolor=INK, **place)

    def numbers(self, result: Record) -> dict[str, float | int | str | None]:
        """The score of each recipe at its least budget."""
        out: dict[str, float | int | str | None] = {}
        for p in sorted(result["points"], key=lambda p: -p["held"]):
            out[f"{p['task']}_{p['recipe']}"] = p["mean"]
        return out


def _point(key: tuple[str, str, float | None], answers: Sequence[Record]) -> Record:
    from kvcompile.evaluation.intervals import mean, wilson

    task, recipe, budget = key
    values = [a["score"] for a in answers]
    if task == "needle":
        middle, (low, high) = sum(values) / len(values), wilson(round(sum(values)), len(values))
    else:
        middle, low, high = mean(values)
    point = {"task": task, "recipe": recipe, "budget": budget, "count": len(values)}
    return {**point, "mean": middle, "low": low, "high": high, **shares(answers)}


def _row(point: Record) -> list[str]:
    budget = "as it is" if point["budget"] is None else f"{point['budget']:g}"
    score = percent(point["mean"], point["low"], point["high"])
    return [f"`{point['recipe']}`", budget, score, str(point["count"]), f"{point['held']:.1%}", f"{point['read']:.1%}"]
