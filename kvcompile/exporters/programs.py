"""What the exporters that write programs of fixed shape have in common: their limits, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvcompile.errors import KvcompileError
from kvcompile.exporters.base import Exporter
from kvcompile.exporters.static.capacity import Limits

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from kvcompile.plan.plan import LayerPlan, Plan

FACTS = "program.json"
LONGEST = 2**20  # tokens: a program holds tables of what stays of so many
SHAPES = """\
`program.json` tells the limits (sequences at once, tokens of a prompt, tokens after it), each cache tensor, and how
many entries each layer has room for. Where layers or heads split a budget by the scores of each prompt, `mean` is what
a head gets on average, and `capacity` has room for the most that the recipe allows (zigzag: its `share_cap`). Prompts
are not padded: all sequences of a batch have one length. A token too many is an error, never a wrong answer."""


@dataclass(frozen=True)
class ProgramDoor(Exporter):
    """Base: two programs, `prefill` and `decode`, over a cache of fixed capacity.

    batch: sequences at once. prompt: longest prompt. new: most tokens after it.
    """

    programs: ClassVar[tuple[str, ...]] = ("prefill.pt2", "decode.pt2")
    cache: ClassVar[Literal["resident", "handed"]]  # who holds it: the programs or their caller
    batch: int = 1
    prompt: int = 1024
    new: int = 256

    def __post_init__(self) -> None:
        self.require(self.batch >= 1, "batch", "1 or more")
        self.require(2 <= self.prompt <= LONGEST, "prompt", f"2 to {LONGEST}")
        self.require(1 <= self.new <= LONGEST, "new", f"1 to {LONGEST}")

    def refuse(self, plan: Plan, model_config: Any) -> None:
        """Raise KvcompileError for what fixed shapes cannot express, and for a cache that this machine cannot hold."""
        from kvcompile.exporters.static.supports import refuse

        refuse(plan, model_config)
        self._refuse_size(plan)

    def _refuse_size(self, plan: Plan) -> None:
        """By what the cache takes at least: what a selection leaves of a prompt is not counted."""
        import psutil

        from kvcompile.report.units import size

        least = self.batch * sum(p.kv_heads * p.nbytes(self._entries(p), plan.dtype) for p in plan.owners)
        memory = psutil.virtual_memory().total
        if least > memory:
            raise KvcompileError(
                f"the cache of a program must fit into this machine's {size(memory)}",
                f"{size(least)} or more for batch={self.batch}, prompt={self.prompt}, new={self.new}",
                f"smaller export.{self.name}.batch, prompt or new",
            )

    def _entries(self, p: LayerPlan) -> int:
        """How many a row has room for, at least."""
        if p.selection is None:
            return p.span(self.prompt + self.new)
        return 0 if p.selection.schedule.decode_every else p.span(self.new)

    def save(self, traced: ExportedProgram, path: Path) -> None:
        """Write one traced module."""
        raise NotImplementedError

    def write(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Both programs, and the facts that a caller needs. Raises KvcompileError where a layer cannot be traced."""
        from kvcompile.exporters.static.lower import Program
        from kvcompile.exporters.static.modules import MODULES, described, exported

        program = Program(model, Limits(self.batch, self.prompt, self.new))
        for name, module in zip(self.programs, MODULES[self.cache], strict=True):
            self.save(exported(module(program), program), folder / name)
        (folder / FACTS).write_text(json.dumps(described(program), indent=2) + "\n", encoding="utf-8")
