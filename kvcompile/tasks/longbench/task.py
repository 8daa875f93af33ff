"""Task `longbench`: questions about long texts, of local files in the shape of LongBench's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvcompile.errors import KvcompileError
from kvcompile.options import suggest
from kvcompile.tasks.base import Sample, Task, Turn

if TYPE_CHECKING:
    from kvcompile.tasks.longbench.prompts import Writer

OPTION = "tasks.longbench.source"


@dataclass(frozen=True)
class LongBenchSample(Sample):
    """A row. dataset: whose metric scores it. classes: all labels of a classification."""

    dataset: str = ""
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LongBench(Task):
    """Rows of files in LongBench's shape, asked and scored as its code does for their dataset.

    source: .json or .jsonl files whose rows have `input`, `context` and `answers` (and `all_classes`, where labels are
    asked for); or `gold` and `distractors`, passages, in place of a context. dataset: whose rows they are; none: what
    the rows say in `dataset`, or the file in its name. tokens: of a prompt at most, the answer comes on top.
    first: rows of each file, none for all; skip: rows before them: choose settings on some, state scores on others.
    chat: in the tokenizer's chat template, where LongBench uses one. first_line: whether only the first line of an
    answer counts; none: as LongBench says. segment: what cuts Chinese answers into words, `characters`, or `jieba` (the
    package, as in the paper).
    """

    name: ClassVar[str] = "longbench"
    summary: ClassVar[str] = "LongBench: questions, summaries, labels and code over long texts, from local files"
    metric: ClassVar[str] = "LongBench's score"
    exact: ClassVar[bool] = False
    source: tuple[str, ...] = ()
    dataset: str | None = None
    tokens: int = 3500
    first: int | None = None
    skip: int = 0
    chat: bool = False
    first_line: bool | None = None
    segment: Literal["characters", "jieba"] = "characters"

    def __post_init__(self) -> None:
        self.require(self.tokens >= 1, "tokens", "1 or more")
        self.require(self.first is None or self.first >= 1, "first", "1 or more, or none for all rows")
        self.require(self.skip >= 0, "skip", "0 or more")
        if self.dataset is not None:
            _require_known(self.dataset, "tasks.longbench: unknown dataset")

    def make_samples(self, tokenizer: Any, longest: int) -> Sequence[Sample]:
        """The rows of every file."""
        from kvcompile.tasks.longbench.metrics import cutter
        from kvcompile.tasks.longbench.prompts import Writer

        self.require(len(self.source) > 0, "source", "one or more .json or .jsonl files of LongBench's shape")
        cutter(self.segment)
        self.require_short(self.tokens, longest)
        writer = Writer(tokenizer, self.tokens, self.chat)
        samples = [sample for path in self.source for sample in self._of(Path(path).expanduser(), writer)]
        self.require_short(max(len(s.context) + len(t.ids) + t.tokens for s in samples for t in s.turns), longest)
        return samples

    def score(self, said: str, turn: Turn, sample: Sample) -> float:
        """The metric of the sample's dataset, against the answer that fits best."""
        from kvcompile.tasks.longbench.datasets import DATASETS
        from kvcompile.tasks.longbench.metrics import score

        if not isinstance(sample, LongBenchSample):
            raise TypeError("LongBench scores its own samples only")
        dataset = DATASETS[sample.dataset]
        if dataset.first_line if self.first_line is None else self.first_line:
            said = said.lstrip("\n").split("\n")[0]
        return max(score(dataset.metric, said, answer, sample.classes, self.segment) for answer in turn.answers)

    def _of(self, path: Path, writer: Writer) -> Iterator[Sample]:
        from kvcompile.analysis.files import rows_of

        rows = rows_of(path, OPTION)
        end = len(rows) if self.first is None else self.skip + self.first
        if not self.skip < end <= len(rows):
            raise KvcompileError(
                "tasks.longbench: skip and first must be rows of each file",
                f"skip={self.skip}, first={self.first}, and {len(rows)} rows in {path.name}",
            )
        for number in range(self.skip, end):
            yield self._sample(rows[number], path, f"{path.name} {number + 1}", writer)

    def _sample(self, row: Mapping[str, Any], path: Path, name: str, writer: Writer) -> Sample:
        from kvcompile.tasks.longbench.datasets import DATASETS

        key = self.dataset or str(row.get("dataset") or path.stem).removesuffix("_e")
        _require_known(key, f"{name}: tasks.longbench.dataset must say whose row it is")
        dataset = DATASETS[key]
        answers, classes = _texts(row, "answers"), _texts(row, "all_classes")
        _require_scorable(name, dataset.metric, answers, classes)
        encoder = writer.encoder(dataset)
        context, ids = encoder.parted(writer.prompt(row, dataset, name))
        return LongBenchSample(name, key, context, (Turn(ids, answers, dataset.tokens),), dataset=key, classes=classes)


def _texts(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    items = row.get(key)
    return tuple(map(str, items)) if isinstance(items, list) else ()


def _require_known(dataset: str, rule: str) -> None:
    from kvcompile.tasks.longbench.datasets import DATASETS

    if dataset not in DATASETS:
        raise KvcompileError(rule, repr(dataset), suggest(dataset, DATASETS))


def _require_scorable(name: str, metric: str, answers: tuple[str, ...], classes: tuple[str, ...]) -> None:
    from kvcompile.tasks.longbench.metrics import PARAGRAPH, paragraph

    if not answers:
        raise KvcompileError(f"{name} must hold answers, a list of one or more")
    if metric == "classification" and not classes:
        raise KvcompileError(f"{name} must hold all_classes, the list of all labels")
    if metric in PARAGRAPH:
        for answer in answers:
            paragraph(metric, answer)
