"""A job of tasks: a row for each stack, task and setting of the question, each measured once by whoever comes first."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.analysis.parts import Parts, digest
from kvcompile.analysis.run import PATHS, shown
from kvcompile.errors import KvcompileError, first_line
from kvcompile.models.provenance import versions
from kvcompile.options import options_of, suggest
from kvcompile.paths import require_here, require_short
from kvcompile.progress import Progress, progress_bar, silent
from kvcompile.tasks import rows
from kvcompile.tasks.base import QUESTIONS, Question, Sample, Task
from kvcompile.tasks.claims import Claims
from kvcompile.tasks.registry import build_tasks, discover
from kvcompile.tasks.rows import Record, Row
from kvcompile.tasks.stacks.subject import Stack, Subject, of_config, of_model
from kvcompile.tasks.stacks.together import of_recipes

if TYPE_CHECKING:
    from rich.console import Console

    from kvcompile.config.schema import Config
    from kvcompile.config.sweep import Done

POLL_SECONDS = 1.0  # between two looks at rows that others measure
Part = Callable[[object, Callable[[], Any]], Any]


@dataclass(frozen=True)
class Trial:
    """A row to be: a stack, asked a task in one setting of the question, its samples or a shard of them."""

    stack: Stack
    task: Task
    question: Question
    shard: tuple[int, int]
    samples: tuple[Sample, ...]

    @cached_property
    def key(self) -> str:
        """What names the row: a hash of all that it depends on. Samples count by their tokens, files do not."""
        samples = digest([asdict(sample) for sample in self.samples])
        task = [self.task.name, self.options, samples, self.question, list(self.shard)]
        return rows.key_of({"stack": self.stack.identity, "task": task, "versions": versions()})

    @cached_property
    def options(self) -> dict[str, Any]:
        """The task's options; of paths, the last part alone."""
        options: dict[str, Any] = _nameless(options_of([self.task])[self.task.name])
        return options

    @property
    def command(self) -> str:
        """A command line that measures it again."""
        usual = options_of([discover()[self.task.name]()])[self.task.name] if self.task.name in discover() else {}
        changed = {key: value for key, value in self.options.items() if value != usual.get(key)}
        words = [f"tasks.{self.task.name}.{key}={shown(value)}" for key, value in changed.items()]
        words.append(f"question={self.question}")
        if self.shard != (0, 1):
            words.append(f"evaluate.shard={self.shard[0]}/{self.shard[1]}")
        first = f"kvcompile evaluate=[{self.task.name}]"
        return " ".join([first, *map(shlex.quote, (*self.stack.words, *words))])

    def measure(self, part: Part, progress: Progress) -> Row:
        """Ask every sample; part: gives the value of a unit of work, as an earlier run left it or computed."""
        respondent, weights = self.stack.open()
        samples = rows.sharded(self.samples, self.shard)
        records: list[Record] = []
        seconds = 0.0
        for number, sample in enumerate(samples):
            progress(f"{self.stack.name}: {self.task.name}, {self.question}", number, len(samples))

            def ask(sample: Sample = sample) -> dict[str, Any]:
                start = time.perf_counter()
                answers = [asdict(record) for record in respondent.ask(self.task, sample, self.question)]
                return {"records": answers, "seconds": time.perf_counter() - start}

            answered = part([number, sample.name], ask)
            records += map(Record.from_json, answered["records"])
            seconds += answered["seconds"]
        progress(f"{self.stack.name}: {self.task.name}, {self.question}", len(samples), len(samples))
        return Row(
            key=self.key,
            stack=self.stack.name,
            policies={name: dict(options) for name, options in self.stack.policies.items()},
            command=self.command,
            model=self.stack.model,
            weights=weights,
            dtype=str(respondent.runner.model.dtype).removeprefix("torch."),
            task=self.task.name,
            options=self.options,
            metric=self.task.metric,
            exact=self.task.exact,
            question=self.question,
            shard=self.shard,
            records=tuple(records),
            seconds=round(seconds, 3),
            versions=versions(),
        )


def _nameless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nameless(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nameless(each) for each in value]
    return Path(value).name if isinstance(value, str) and value.startswith(PATHS) else value


def trials(
    subject: Subject, tasks: Iterable[Task], questions: Sequence[Question], shard: tuple[int, int] = (0, 1)
) -> list[Trial]:
    """The rows that a job wants, stack by stack. A text that is read has no question: it comes after its context.

    Raises KvcompileError for samples that cannot be made, or are fewer than shards.
    """
    asked = []
    for task in tasks:
        samples = tuple(task.make_samples(subject.tokenizer, subject.longest))
        if len(samples) < shard[1]:
            raise KvcompileError(
                f"tasks.{task.name}: every shard must have a sample", f"{len(samples)} in {shard[1]} shards"
            )
        subject.expect(samples)
        turns = any(sample.turns for sample in samples)
        asked += [(task, question, samples) for question in (questions if turns else ("hidden",))]
    return [
        Trial(stack, task, question, shard, samples) for stack in subject.stacks for task, question, samples in asked
    ]


class Measured:
    """Rows of a folder: as they lie there, or measured now and written there at once.

    Attributes:
        reused: rows that were there. measured: rows that this job measured.
    """

    def __init__(self, folder: Path, progress: Progress = silent, poll: float = POLL_SECONDS) -> None:
        self.folder, self.progress, self.poll = folder, progress, poll
        self.claims = Claims(folder)
        self.reused = self.measured = 0

    def all(self, wanted: Sequence[Trial]) -> list[Row]:
        """The rows of all trials, in order; those that other processes are at come last, and are waited for."""
        done: dict[str, Row] = {}
        left = list(wanted)
        while left:
            for trial in left:
                row = self._of(trial)
                if row is not None:
                    done[trial.key] = row
            before, left = left, [trial for trial in left if trial.key not in done]
            if left and len(left) == len(before):
                self.progress("waiting for another process", len(done), len(wanted))
                time.sleep(self.poll)
        return [done[trial.key] for trial in wanted]

    def _of(self, trial: Trial) -> Row | None:
        """The row; None while another process measures it."""
        path = rows.path_of(self.folder, trial.key)
        if not path.exists():
            with self.claims.claim(trial.key) as ours:
                if not ours:
                    return None
                if not path.exists():  # it may have been written since we looked
                    parts = Parts(self.folder / f".{trial.key}.parts.jsonl", trial.key)
                    row = trial.measure(parts.of, self.progress)
                    rows.write(self.folder, row)
                    parts.path.unlink(missing_ok=True)
                    self.measured += 1
                    return row
        self.reused += 1
        return rows.read(path)


def _folder(path: str | Path) -> Path:
    """A folder of rows, which is there. Raises KvcompileError where that cannot be."""
    require_here()
    folder = Path(path).expanduser().resolve()
    require_short(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = "rows need a folder that can be written to"
        raise KvcompileError(rule, f"{folder}: {first_line(error)}", "another folder (evaluate.rows=...)") from error
    return folder


def evaluate_config(config: Config, console: Console, side_by_side: Callable[[Sequence[Row]], None]) -> Done:
    """One job of the command line: find or measure its rows, print them; (folder of rows, numbers for a summary).

    side_by_side: prints the rows of several stacks.
    """
    from kvcompile.tasks import table

    folder = _folder(config.evaluate.rows)
    several = bool(config.evaluate.recipes)
    with progress_bar() as progress:
        subject = of_recipes(config, progress) if several else of_config(config, progress)
        wanted = trials(subject, config.built_tasks(), config.questions, config.evaluate.part)
        measured = Measured(folder, progress)
        found = measured.all(wanted)
    shown_rows = table.Shown(found, subject.stacks[-1].name)
    if several:
        side_by_side(found)
    else:
        table.show(shown_rows, console)
    for line in (*subject.notes, f"{folder}: {measured.measured} rows measured, {measured.reused} were there"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return str(folder), {} if several else table.summary(shown_rows)


def evaluate(
    model: Any,
    tasks: Sequence[str | Task] | Mapping[str, Mapping[str, Any]],
    tokenizer: Any,
    question: str = "both",
    rows: str | Path | None = None,
) -> list[Row]:
    """Ask a model tasks: what it still answers over its cache, and how many bytes that cache takes.

    Args:
        model: a compiled model; or a causal LM of transformers, which is left as it is and keeps its whole cache.
        tasks: names, as `kvcompile ls tasks` lists them; tasks; or a mapping of names to options.
        tokenizer: the model's own.
        question: `seen` (in sight while the cache is made), `hidden` (it comes afterwards), or `both`.
        rows: a folder of rows. What lies there is not measured again, what is measured is written there. None: nothing
            is read or written.

    Returns:
        A row for each task and setting of the question, with every answer, its score and the bytes of its cache.

    Raises:
        KvcompileError: for an unknown task, option or setting, and for samples that this model cannot read.

    Examples:
        >>> small = kvcompile.compile(model, "streaming", "budget=0.5")
        >>> options = {"tokens": 64, "scored": 8, "windows": 2, "texts": ["library"]}
        >>> (row,) = kvcompile.evaluate(small, {"perplexity": options}, tokenizer)
        >>> [(record.sample, record.size.tokens) for record in row.records]
        [('library 1', 64), ('library 2', 64)]
        >>> size = row.records[0].size
        >>> size.held / size.dense
        0.5
    """
    if question not in (*QUESTIONS, "both"):
        raise KvcompileError("unknown question", repr(question), suggest(question, (*QUESTIONS, "both")))
    if isinstance(tasks, Mapping):
        chosen = build_tasks(tasks)
    else:
        chosen = tuple(task if isinstance(task, Task) else build_tasks({task: {}})[0] for task in tasks)
    questions = [each for each in QUESTIONS if question in (each, "both")]
    wanted = trials(of_model(model, tokenizer), chosen, questions)
    if rows is None:
        return [trial.measure(lambda unit, compute: compute(), silent) for trial in wanted]
    return Measured(_folder(rows)).all(wanted)
