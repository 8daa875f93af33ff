"""Exporter `torch`: `torch.export` programs that any PyTorch steps, without kvcompile and without transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from kvcompile.exporters.programs import SHAPES, ProgramDoor

if TYPE_CHECKING:
    from torch.export import ExportedProgram

USAGE = f"""\
`prefill.pt2` reads a prompt, `decode.pt2` one token; both give the logits of the next token and hold the compressed
cache as buffers. They need PyTorch alone:

```python
import torch


def load(folder):
    # one cache for both programs, and one copy of the weights
    prefill, decode = (torch.export.load(f"{{folder}}/{{name}}.pt2").module() for name in ("prefill", "decode"))
    decode.load_state_dict(prefill.state_dict(), strict=False, assign=True)
    return prefill, decode


@torch.no_grad()
def generate(prefill, decode, prompt, count):
    # prompt [B, T], int64; yields count tokens [B, 1], greedily
    logits = prefill(prompt)
    for _ in range(count):
        token = logits[:, -1].argmax(-1, keepdim=True)
        yield token
        logits = decode(token)
```

{SHAPES}"""


@dataclass(frozen=True)
class TorchProgram(ProgramDoor):
    """Programs whose cache is theirs: buffers `cache.<name>`, replaced by a prefill and changed by a decode."""

    name: ClassVar[str] = "torch"
    summary: ClassVar[str] = "torch.export programs of prefill and decode, with the compressed cache as buffers"
    usage: ClassVar[str] = USAGE
    cache: ClassVar[Literal["resident", "handed"]] = "resident"

    def save(self, traced: ExportedProgram, path: Path) -> None:
        """As `torch.export.load` reads it."""
        import torch

        torch.export.save(traced, path)
