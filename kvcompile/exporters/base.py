"""What an exporter is: a frozen dataclass whose fields are its options, one question and one action."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kvcompile.errors import KvcompileError

if TYPE_CHECKING:
    from kvcompile.plan.plan import Plan


@dataclass(frozen=True)
class Exported:
    """What an exporter wrote: bytes by file, relative to the folder it was written to."""

    exporter: str
    files: dict[str, int]

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Exporter:
    """Base of all exporters. `name` is how `export=` calls it, `summary` the one line `kvcompile ls` prints.

    usage: Markdown for the model card that is put beside what was written: how to load and run it.
    The module of an exporter imports neither torch nor transformers at its top: its fields are the options
    `export.<name>.<field>`, which `kvcompile --help` needs.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    usage: ClassVar[str] = ""

    def refuse(self, plan: Plan, model_config: Any) -> None:
        """Raise KvcompileError, with the reason, for what this exporter cannot write (or not on this machine).

        Asked before weights are read, and again before `write`. What counts is the plan: the KV heads in `model_config`
        (the transformers config) may be those before the conversion or after it.
        Without a fix in it, the error is given one that names the exporters that can write it.
        """
        raise NotImplementedError

    def refuse_tokenizer(self, tokenizer: Any) -> None:
        """As `refuse`, of the model's tokenizer (None: there is none), once it is loaded (default: any will do)."""

    def write(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Write a compiled `model`, which `refuse` let pass, into the empty `folder`; leave the model as it was.

        tokenizer: may be None. Raises KvcompileError where it cannot be done.
        """
        raise NotImplementedError

    def require(self, ok: bool, name: str, rule: str) -> None:
        """Range check of a field, for `__post_init__`. Raises KvcompileError naming `export.<name>.<field>`."""
        if not ok:
            raise KvcompileError(f"export.{self.name}: {name} must be {rule}", repr(getattr(self, name)))
