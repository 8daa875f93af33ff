"""What the doors that write programs of fixed shape have in common: their limits, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvcompile.doors.door import Door
from kvcompile.program.room import Limits

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from kvcompile.plan import Plan

FACTS = "program.json"
SHAPES = """\
`program.json` tells the limits (sequences at once, tokens of a prompt, tokens after it), each cache tensor, and how
many entries each layer has room for. Where layers or heads split a budget by the scores of each prompt, `mean` is what
a head gets on average, and `capacity` has room for the most that the recipe allows (zigzag: its `share_cap`). Prompts
are not padded: all sequences of a batch have one length. A token too many is an error, never a wrong answer."""


@dataclass(frozen=True)
class ProgramDoor(Door):
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
        self.require(self.prompt >= 2, "prompt", "2 or more")
        self.require(self.new >= 1, "new", "1 or more")

    def refuse(self, plan: Plan, model_config: Any) -> None:
        """Raise KvcompileError for what fixed shapes cannot express."""
        from kvcompile.program.refuse import refuse

        refuse(plan, model_config)

    def save(self, traced: ExportedProgram, path: Path) -> None:
        """Write one traced module."""
        raise NotImplementedError

    def write(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Both programs, and the facts that a caller needs. Raises KvcompileError where a layer cannot be traced."""
        from kvcompile.program.lower import Program
        from kvcompile.program.modules import MODULES, described, exported

        program = Program(model, Limits(self.batch, self.prompt, self.new))
        for name, module in zip(self.programs, MODULES[self.cache], strict=True):
            self.save(exported(module(program), program), folder / name)
        (folder / FACTS).write_text(json.dumps(described(program), indent=2) + "\n", encoding="utf-8")
