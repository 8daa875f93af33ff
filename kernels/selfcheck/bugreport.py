"""What there is to report where a kernel is wrong: facts, how to see it again, and the kernel's text."""

from __future__ import annotations

import torch

from kvcompile.kernels.backend import Backend
from kvcompile.kernels.selfcheck.verdict import Verdict
from kvcompile.kernels.spec import KernelSpec


def text(
    backend: Backend, spec: KernelSpec, dtype: torch.dtype, device: torch.device, facts: dict[str, str], found: Verdict
) -> str:
    """A page of Markdown, ready to be sent. facts: the identity that the verdict holds for."""
    name = str(dtype).removeprefix("torch.")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    sources = {**backend.sources.attention(spec, name, gpu)}
    if spec.scores:
        sources |= backend.sources.column_sums(spec, name, gpu)
    lines = [
        f"# Kernel {spec.name} of kernels={backend.name} is not right",
        "",
        f"{found.problem}.",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
        f"- scale: {spec.scale!r}",
        "",
        "To see it again:",
        "",
        "```python",
        "import torch",
        "from kvcompile.kernels.dispatch import named",
        "from kvcompile.kernels.selfcheck.check import check",
        "from kvcompile.kernels.spec import KernelSpec, Part",
        "from kvcompile.plan.storage import Codec",
        "",
        f"spec = {spec!r}",
        f'print(check(named("{backend.name}"), spec, {dtype}, torch.device("{device}")))',
        "```",
    ]
    for end, source in sources.items():
        lines += ["", f"## {end}", "", "```", source.rstrip("\n"), "```"]
    return "\n".join(lines) + "\n"
