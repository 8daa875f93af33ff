"""What an analysis is: a frozen dataclass whose fields are its options, one measurement, how it reads and looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.options import options_of
from kvcompile.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvcompile.analysis.parts import Parts
    from kvcompile.analysis.prompts import Prompt
    from kvcompile.config.schema import Config


@dataclass(frozen=True)
class Subject:
    """What an analysis looks at: the original model, in eval mode, with its tokenizer, and prompts.

    config: the whole job. parts: what is measured already. progress: of the bar on the terminal.
    """

    model: Any
    tokenizer: Any
    config: Config
    parts: Parts
    progress: Progress

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts of `config.prompts`. Raises KvcompileError for a source that has none."""
        from kvcompile.analysis.prompts import prompts
        from kvcompile.evaluation.heldout import longest

        return prompts(self.tokenizer, self.config.prompts, longest(self.model))

    def part(self, unit: object, compute: Callable[[], Any]) -> Any:
        """One part of a measurement: as an earlier run of the same settings left it, else computed and kept.

        Args:
            unit: what it is of, as plain data, e.g. a prompt's digest; the model and the options count by themselves.
            compute: its value, plain data.
        """
        return self.parts.of(unit, compute)


@dataclass(frozen=True)
class Analysis:
    """Base of all analyses. `name` is how `analysis=` calls it, `summary` the one line `kvcompile ls` prints.

    The module of an analysis imports neither torch nor matplotlib at its top: its fields are the options
    `analysis.<name>.<field>`, which `kvcompile --help` needs.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    def part_options(self) -> dict[str, Any]:
        """The options that every part depends on (default: all); a part's unit says the others."""
        return options_of([self])[self.name]

    def refuse(self, subject: Subject) -> None:
        """Raise KvcompileError for what cannot be measured on this model and these prompts, before anything is."""

    def measure(self, subject: Subject) -> dict[str, Any]:
        """The result as plain data, what `section`, `draw` and `numbers` read; long work in parts (`Subject.part`)."""
        raise NotImplementedError

    def section(self, result: dict[str, Any]) -> str:
        """The result as Markdown, without a heading and the picture, which stand above it."""
        raise NotImplementedError

    def draw(self, result: dict[str, Any], figure: Figure) -> None:
        """Put the result as axes into an empty figure."""
        raise NotImplementedError

    def numbers(self, result: dict[str, Any]) -> dict[str, float | int | str | None]:
        """The few numbers that stand for the result in the summary of a sweep (default: none)."""
        return {}

    def require(self, ok: bool, field: str, rule: str) -> None:
        """Range check of a field, for `__post_init__`. Raises KvcompileError naming `analysis.<name>.<field>`."""
        if not ok:
            raise KvcompileError(f"analysis.{self.name}: {field} must be {rule}", repr(getattr(self, field)))
