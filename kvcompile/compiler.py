"""The corridor: recipe -> stack -> plan -> graph -> model, and around it proof, measurement and the artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.build import build, identity_plan
from kvcompile.config.compose import compose
from kvcompile.config.recipe import to_recipe
from kvcompile.config.schema import Config
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan
from kvcompile.progress import Progress, silent
from kvcompile.stack import StackPlan, apply_stack, plan_stack

if TYPE_CHECKING:
    from kvcompile.config.schema import ModelConfig


def assemble(
    model: Any,
    config: Config,
    tokenizer: Any = None,
    progress: Progress = silent,
    workspace: Path | None = None,
    stack: StackPlan | None = None,
) -> Any:
    """Compile a loaded model in place by a config: calibrate what needs it, plan, heal, build. Nothing is measured.

    Structural policies calibrate on the original model and convert it, then it is healed if the config says so; the
    others calibrate on what came out. Only what a policy learns there leads to another plan than `stack`'s.
    workspace: folder for the checkpoints of a healing (None: it keeps none). stack: of `plan_config`, where the model's
    configuration was planned before its weights were read (None: it is planned here).
    Raises KvcompileError for what is no causal LM, and wherever one of these steps does.
    """
    from kvcompile.adapters.architectures import require_as_configured
    from kvcompile.artifact.manifest import stamp
    from kvcompile.calibration.activations import calibration_ids
    from kvcompile.calibration.probe import ModelCalibrator
    from kvcompile.heal.repair import repair
    from kvcompile.models.loading import require_vocabulary
    from kvcompile.models.sharing import shared
    from kvcompile.plan.plan import text_wanted
    from kvcompile.structure.convert import convert, require_convertible
    from kvcompile.structure.rotate import fold_rotation

    _require_causal_lm(model)
    require_as_configured(model)
    if tokenizer is not None:
        require_vocabulary(model, tokenizer)
    teacher = shared(model) if config.heal.tokens else None
    stack = _planned(model, config, stack)
    require_convertible(model, stack.plan)  # before anything is calibrated
    calibrator = ModelCalibrator(model, tokenizer, progress)
    structure = tuple(p.calibrated(calibrator) for p in stack.structure)
    shape = stack.shape if structure == stack.structure else apply_stack(stack.identity, structure)
    tokens = text_wanted(shape)
    convert(model, shape, calibration_ids(tokenizer, tokens, "align") if tokens else None)
    healed = repair(model, teacher, shape, config, tokenizer, progress, workspace) if teacher is not None else None
    calibrator = ModelCalibrator(model, tokenizer, progress, shape)
    others = tuple(p.calibrated(calibrator) for p in stack.others)
    plan = stack.plan if structure + others == stack.policies else apply_stack(shape, others)
    fold_rotation(model, plan)
    built = build(model, plan, config.kernels, to_recipe(config.with_policies(structure + others)))
    built.config.kvcompile, built.kvcompile.healed = stamp(plan, built.config), healed
    return built


def _planned(model: Any, config: Config, stack: StackPlan | None) -> StackPlan:
    """The stack planned for a loaded model, whose dtype is known now."""
    dtype = str(model.dtype).removeprefix("torch.")
    if stack is None:
        return plan_stack(identity_plan(model.config, dtype, config), config.policies())
    if stack.identity.dtype != dtype:
        return plan_stack(replace(stack.identity, dtype=dtype), stack.policies)
    return stack


def compile_plan(model: Any, plan: Plan, kernels: str = "auto") -> Any:
    """Compile a loaded model in place to a plan made by hand: weights are converted, then the model is built.

    Raises KvcompileError where a conversion, an adapter, a pass or the wiring check fails.
    """
    from kvcompile.structure.convert import convert
    from kvcompile.structure.rotate import fold_rotation

    convert(model, plan)
    fold_rotation(model, plan)
    return build(model, plan, kernels)


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


def plan_config(config: Config, architecture: Any = None) -> StackPlan:
    """The stack of a config, planned from the model's configuration alone.

    architecture: that configuration, where it has been read (`config_of`).
    Raises KvcompileError for an unknown model or architecture, and where the stack cannot work on it or the result
    not be exported.
    """
    from kvcompile.exporters.registry import require_open
    from kvcompile.models.loading import config_of

    architecture = architecture or config_of(config.model)
    dtype = cache_dtype(config.model, getattr(architecture, "dtype", None))
    stack = plan_stack(identity_plan(architecture, dtype, config), config.policies())
    require_open(config.exporters(), stack.plan, architecture)
    return stack


def cache_dtype(model: ModelConfig, own: object) -> str:
    """The cache's dtype: as asked; `auto` is float32 on a CPU and the checkpoint's `own` on an accelerator."""
    if model.dtype != "auto":
        return model.dtype
    import torch

    on_cpu = model.device == "cpu" or (model.device == "auto" and not torch.cuda.is_available())
    return "float32" if on_cpu or own is None else str(own).removeprefix("torch.")
