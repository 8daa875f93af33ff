"""The corridor: recipe -> stack -> plan -> graph -> model, and around it proof, measurement and the artifact."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.artifact.manifest import RECIPE
from kvcompile.config.compose import compose
from kvcompile.config.schema import Config, from_recipe, to_recipe
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan
from kvcompile.progress import Progress, progress_bar, silent
from kvcompile.stack import apply_stack

if TYPE_CHECKING:
    from kvcompile.policies.base import Policy


@dataclass(frozen=True)
class Outcome:
    """What one compile left: the artifact's folder and the numbers of its summary row."""

    path: str
    summary: dict[str, float | int | str | None]


def plan_of(model_config: Any, dtype: str, config: Config, policies: Sequence[Policy]) -> Plan:
    """The checked plan of a stack on a model, from the model's config alone."""
    from dataclasses import replace

    from kvcompile.adapters.architectures import describe

    plan = replace(describe(model_config, dtype), prefill_chunk=config.prefill_chunk)
    return apply_stack(plan, policies)


def build(model: Any, plan: Plan, kernels: str = "auto", recipe: str = "", converted: bool = False) -> Any:
    """Rewrite `model` in place to what `plan` says: convert weights, swap attention, trace, passes, wiring check.

    On a CPU with a compiler its linear layers run the decode kernel of `kernels.linear` from then on.
    converted: the weights are those of the plan already.
    Raises KvcompileError where a conversion, an adapter, a pass or the wiring check fails.
    """
    from kvcompile.adapters.architectures import rotations, swap
    from kvcompile.adapters.latent import latent_rotations
    from kvcompile.graph.passes import rewrite
    from kvcompile.graph.tracer import skeleton, trace
    from kvcompile.graph.wiring import verify
    from kvcompile.kernels.dispatch import choose
    from kvcompile.kernels.linear import lower
    from kvcompile.models.loading import align_weights
    from kvcompile.runtime.model import Compiled, adopt
    from kvcompile.structure.convert import convert, prune
    from kvcompile.structure.rotate import fold_rotation

    route = choose(kernels, model.device)  # one that cannot run here fails before any work
    align_weights(model)
    if not converted:
        convert(model, plan)
        fold_rotation(model, plan)
    rotaries = latent_rotations(rotations(model), plan)
    swap(model, plan)
    graph = trace(model)
    changes = rewrite(graph, plan).changes
    verify(graph.graph, plan)
    prune(model)
    if route == "cpp":
        changes["DecodeLinear"] = lower(model)
    return adopt(model, Compiled(plan, graph, skeleton(model), rotaries, kernels, recipe, changes))


def assemble(
    model: Any, config: Config, tokenizer: Any = None, progress: Progress = silent, workspace: Path | None = None
) -> Any:
    """Compile a loaded model in place by a config: calibrate what needs it, plan, heal, build. Nothing is measured.

    Structural policies calibrate on the original model and convert it, then it is healed if the config says so; the
    others calibrate on what came out. workspace: folder for the checkpoints of a healing (None: it keeps none).
    Raises KvcompileError for what is no causal LM, and wherever one of these steps does.
    """
    from kvcompile.adapters.architectures import require_as_configured
    from kvcompile.artifact.manifest import stamp
    from kvcompile.calibration.activations import calibration_ids
    from kvcompile.calibration.probe import ModelCalibrator, shared
    from kvcompile.heal.repair import repair
    from kvcompile.models.loading import require_vocabulary
    from kvcompile.structure.convert import convert, require_convertible, text_wanted
    from kvcompile.structure.rotate import fold_rotation

    _require_causal_lm(model)
    require_as_configured(model)
    if tokenizer is not None:
        require_vocabulary(model, tokenizer)
    teacher = shared(model) if config.heal.tokens else None
    dtype, original = str(model.dtype).removeprefix("torch."), copy.deepcopy(model.config)
    policies = config.policies()
    require_convertible(model, plan_of(original, dtype, config, policies))  # before anything is calibrated
    calibrator = ModelCalibrator(model, tokenizer, progress)
    structure = tuple(p.calibrated(calibrator) for p in policies if p.family == "structure")
    shape = plan_of(original, dtype, config, structure)
    tokens = text_wanted(shape)
    convert(model, shape, calibration_ids(tokenizer, tokens, "align") if tokens else None)
    healed = repair(model, teacher, shape, config, tokenizer, progress, workspace) if teacher is not None else None
    calibrator = ModelCalibrator(model, tokenizer, progress, shape)
    policies = structure + tuple(p.calibrated(calibrator) for p in policies if p.family != "structure")
    config = config.with_policies(policies)
    plan = plan_of(original, dtype, config, policies)
    fold_rotation(model, plan)
    built = build(model, plan, config.kernels, to_recipe(config), converted=True)
    built.config.kvcompile, built.kvcompile.healed = stamp(plan, built.config), healed
    return built


def _require_causal_lm(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise KvcompileError(
            "only a causal LM of transformers can be compiled",
            type(model).__name__,
            "AutoModelForCausalLM.from_pretrained(...), adapters merged into it",
        )


def compile(
    model: Any,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    tokenizer: Any = None,
) -> Any:
    """Compile a model in memory: no files, nothing measured.

    model: a loaded transformers causal LM (rewritten in place), or the name of a model group (`"llama"`).
    recipe: name of a recipe; overrides: as on the command line (`["stack.zigzag.budget=0.1"]`), or one of them.
    tokenizer: only needed by policies that calibrate. Returns the compiled model, still its transformers class.
    Raises KvcompileError for anything that would be an error on the command line.
    """
    named = isinstance(model, str)
    wanted = [f"recipe={recipe}"] if recipe else []
    given = [overrides] if isinstance(overrides, str) else overrides
    config = compose([*wanted, *([f"model={model}"] if named else []), *given])
    if named:
        from kvcompile.models.loading import load

        model, tokenizer = load(config.model)
    return assemble(model, config, tokenizer)


def compile_config(config: Config) -> Outcome:
    """One job of the command line: load, measure, compile, prove, measure again, report, save."""
    from kvcompile.job import compile_and_report
    from kvcompile.models.loading import load
    from kvcompile.report import plan_table

    target(config)  # what cannot work, or cannot be written, fails before weights are read
    plan_table.plan_of(config)
    with progress_bar() as progress:
        model, tokenizer = load(config.model, progress)
        return compile_and_report(model, tokenizer, config, progress)


def target(config: Config) -> Path:
    """Where the artifact goes. Raises KvcompileError for a place that is no folder of ours, or has another stack."""
    from kvcompile.artifact.artifact import place

    if config.output is None:
        raise KvcompileError("a compile needs an output folder", "none", "output=<folder>")
    folder = place(config.output)
    there, here = _stack_at(folder / RECIPE), list(config.stack)
    if there is not None and there != here:
        raise KvcompileError(
            "an artifact is replaced by one of the same policies only",
            f"policy=[{','.join(here)}] where {folder} holds policy=[{','.join(there)}]",
            "output=<another folder>, or remove the old one",
        )
    return folder


def _stack_at(recipe: Path) -> list[str] | None:
    """The policies of an artifact's recipe, in order; None where there is none that can be read."""
    try:
        return list(from_recipe(recipe.read_text(encoding="utf-8")).stack)
    except (OSError, UnicodeDecodeError, KvcompileError):
        return None  # what is broken may be replaced
