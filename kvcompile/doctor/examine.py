"""The whole examination: the machine, what recipes run on it, and whether the kernels that they need are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvcompile.doctor.machine import Line, machine
from kvcompile.doctor.recipes import Needs, names, needs
from kvcompile.kernels.backend import Backend
from kvcompile.kernels.dispatch import named
from kvcompile.kernels.selfcheck.trust import verdict
from kvcompile.kernels.selfcheck.verdict import Verdict
from kvcompile.kernels.spec import KernelSpec
from kvcompile.progress import Progress, silent

Checked = tuple[KernelSpec, torch.dtype, Verdict]


@dataclass(frozen=True)
class Examination:
    """What was found. kernels: those of all recipes together, empty where nothing was checked."""

    machine: list[Line]
    device: torch.device
    backend: Backend
    recipes: list[Needs]
    kernels: list[Checked]

    @property
    def problems(self) -> list[str]:
        """What is not well, a line each."""
        lines = [wrong for _, _, wrong in self.machine if wrong]
        lines += [f"recipe {each.recipe}: {each.problem}" for each in self.recipes if each.problem]
        for spec, dtype, found in self.kernels:
            if not found.right:
                report = f". Please send the bug report {found.report}" if found.report else ""
                name = f"{self.backend.name} kernel {spec.name} for {str(dtype).removeprefix('torch.')}"
                instead = "" if self.backend.checked else ". Until it is mended: kernels=sdpa"
                lines.append(f"the {name}: {found.problem}{report}{instead}")
        return lines


def examine(
    settings: Sequence[str] = (), checks: bool = True, again: bool = False, progress: Progress = silent
) -> Examination:
    """Examine this machine; no weights are read.

    Args:
        settings: of a command line, for all recipes: `model=qwen2`, `kernels=triton`.
        checks: run each kernel that the recipes need, where there is one for it.
        again: also those whose verdicts are known.
        progress: told of recipes and kernels.

    Raises KvcompileError for settings that are none, a model that is not there, and a backend that cannot run.
    """
    recipes = list(needs(names(), settings, progress))
    backend, device = recipes[0].backend, recipes[0].device
    wanted = dict.fromkeys((spec, each.dtype) for each in recipes for spec in each.specs)
    run = [(spec, dtype) for spec, dtype in wanted if backend.supports(spec, dtype)] if checks else []
    checked = []
    for done, (spec, dtype) in enumerate(run):
        progress("kernels", done, len(run))
        checked.append((spec, dtype, verdict(named(backend.name), device, spec, dtype, again)))
    return Examination(machine(), device, backend, recipes, checked)
