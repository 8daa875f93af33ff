"""Which kernels each recipe needs, and who attends to its layers here: from plans alone, no weights are read."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import torch

from kvcompile.compiler import plan_config
from kvcompile.config.compose import compose
from kvcompile.errors import KvcompileError
from kvcompile.kernels.backend import Backend
from kvcompile.kernels.dispatch import choose, named, serving
from kvcompile.kernels.spec import KernelSpec
from kvcompile.models.loading import config_of, device_of
from kvcompile.plan.plan import Plan
from kvcompile.progress import Progress, silent
from kvcompile.stores.plan_kernels import PlanKernels


@dataclass(frozen=True)
class Needs:
    """What one recipe runs on a device. plan: None where it cannot be made; `problem` says why."""

    recipe: str
    plan: Plan | None
    backend: Backend
    device: torch.device
    problem: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Of keys, values and queries."""
        return torch.float32 if self.plan is None else getattr(torch, self.plan.dtype)

    @cached_property
    def specs(self) -> list[KernelSpec]:
        """Every kernel of attention that the backend may run for it, whatever a check says of them."""
        if self.plan is None:
            return []
        return list(dict.fromkeys(_all(self.plan, PlanKernels(self.plan, named(self.backend.name)))))

    def served(self) -> dict[str, int]:
        """Layers by the backend that attends to them while decoding. What was not checked yet is checked for that."""
        if self.plan is None:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of wrong kernels: they are among the problems
            kernels = PlanKernels(self.plan, self.backend)
            specs = [kernels.expected(p.index)[0] for p in self.plan.decoder.layers]
            return dict(Counter(serving(self.backend, spec, self.dtype).name for spec in specs))


def names() -> list[str]:
    """All recipes that are shipped."""
    folder = files("kvcompile.recipes").joinpath("recipe")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def needs(recipes: Iterable[str], settings: Sequence[str], progress: Progress = silent) -> Iterator[Needs]:
    """What each recipe needs with the same settings of a command line, such as `model=qwen2` or `kernels=triton`.

    Raises KvcompileError for settings that are none, a model that is not there, and a backend that cannot run.
    """
    config = compose(list(settings))
    device, architecture = device_of(config.model), config_of(config.model)
    backend = choose(config.kernels, device)
    recipes = list(recipes)
    for done, recipe in enumerate(recipes):
        progress("recipes", done, len(recipes))
        yield _of(recipe, settings, architecture, backend, device)


def _of(recipe: str, settings: Sequence[str], architecture: Any, backend: Backend, device: torch.device) -> Needs:
    try:
        plan = plan_config(compose([f"recipe={recipe}", *settings]), architecture).plan
    except KvcompileError as error:
        return Needs(recipe, None, backend, device, str(error))
    return Needs(recipe, plan, backend, device)


def _all(plan: Plan, kernels: PlanKernels) -> Iterator[KernelSpec]:
    """Every kernel of attention that the layers of a plan may need."""
    for p in plan.decoder.layers:
        usual = [*kernels.first(p.index), *kernels.expected(p.index)]
        yield from usual
        yield from kernels.recalling(p.index)
        if p in plan.selected and p.selection is not None and p.selection.averages:
            yield from (kernels.window_spec(p.index, spec.parts) for spec in usual)
