"""From a recipe or a plan to a compiled model: stack, plan, conversion, graph. Nothing is measured or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.adapters.around import AROUND
from kvcompile.build import build, identity_plan, require_alike
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
    Of a model that reads images too, its text stack is compiled, and runs in its place.
    Raises KvcompileError for what is no causal LM, and wherever one of these steps does.
    """
    around = AROUND.get(getattr(getattr(model, "config", None), "model_type", ""))
    if around is None:
        return _assembled(model, config, tokenizer, progress, workspace, stack)
    from kvcompile.adapters.inside import put_around, text_stack

    converting = next((p.name for p in config.policies() if p.family == "structure"), None)
    if config.heal.tokens or converting:
        raise KvcompileError(
            f"the weights of a {model.config.model_type} stay as they are: its text stack alone is compiled",
            converting or f"heal.tokens={config.heal.tokens}",
            "policies that act on the cache",
        )
    text = _assembled(text_stack(model, around.stack), config, tokenizer, progress, workspace, stack)
    return put_around(model, text, around)


def _assembled(
    model: Any, config: Config, tokenizer: Any, progress: Progress, workspace: Path | None, stack: StackPlan | None
) -> Any:
    """`assemble` of a model of text."""
    from kvcompile.artifact.manifest import stamp
    from kvcompile.calibration.activations import calibration_ids
    from kvcompile.calibration.probe import ModelCalibrator
    from kvcompile.heal.repair import repair
    from kvcompile.models.loading import require_vocabulary
    from kvcompile.models.sharing import shared
    from kvcompile.plan.plan import text_wanted
    from kvcompile.structure.center import center_keys
    from kvcompile.structure.convert import convert
    from kvcompile.structure.pack import pack_weights
    from kvcompile.structure.rotate import fold_rotation

    _require_compilable(model, config.model.architecture)
    if tokenizer is not None:
        require_vocabulary(model, tokenizer)
    teacher = shared(model) if config.heal.tokens else None
    stack = _planned(model, config, stack)
    _require_possible(model, stack, config, tokenizer)
    calibrator = ModelCalibrator(model, tokenizer, progress)
    structure = tuple(p.calibrated(calibrator) for p in stack.structure)
    shape = stack.shape if structure == stack.structure else apply_stack(stack.identity, structure)
    tokens = text_wanted(shape)
    convert(model, shape, calibration_ids(tokenizer, tokens, "align") if tokens else None)
    healed = repair(model, teacher, shape, config, tokenizer, progress, workspace) if teacher is not None else None
    calibrator = ModelCalibrator(model, tokenizer, progress, shape, stack.plan)
    others = tuple(p.calibrated(calibrator) for p in stack.others)
    plan = stack.plan if structure + others == stack.policies else apply_stack(shape, others)
    center_keys(model, plan, tokenizer)
    fold_rotation(model, plan)
    if config.model.weights:
        pack_weights(model, config.model.weights, plan)
    built = build(model, plan, config.kernels, to_recipe(config.with_policies(structure + others)))
    built.config.kvcompile, built.kvcompile.healed = stamp(plan, built.config), healed
    return built


def _require_possible(model: Any, stack: StackPlan, config: Config, tokenizer: Any) -> None:
    """Raise KvcompileError for what would fail later, before anything is calibrated or converted."""
    from kvcompile.adapters.architectures import require_turnable
    from kvcompile.heal.repair import require_healable
    from kvcompile.structure.convert import require_convertible

    require_turnable(stack.plan, model.config)
    require_convertible(model, stack.plan)
    if config.heal.tokens:
        require_healable(stack.plan, config.heal, tokenizer)
    for policy in stack.policies:
        policy.require_calibratable(tokenizer)


def _planned(model: Any, config: Config, stack: StackPlan | None) -> StackPlan:
    """The stack planned for a loaded model, whose dtype is known now."""
    dtype = str(model.dtype).removeprefix("torch.")
    if stack is None:
        return plan_stack(identity_plan(model.config, dtype, config), config.policies())
    if stack.identity.dtype != dtype:
        return plan_stack(replace(stack.identity, dtype=dtype), stack.policies)
    return stack


def compile_plan(model: Any, plan: Plan, kernels: str = "auto", tokenizer: Any = None) -> Any:
    """Compile a loaded model to a plan made by hand, without recipe and config. Nothing is calibrated but mean keys.

    Such a model cannot be saved as an artifact, which holds a recipe.

    Args:
        model: a loaded transformers causal LM, which is rewritten in place: its weights are converted where the plan
            asks for that.
        plan: made from `kvcompile.adapters.architectures.describe(model.config)`, which keeps everything.
        kernels: which kernels attend: `auto`, `cpp`, `triton`, `sdpa` or `reference`.
        tokenizer: the model's own, wanted where the plan stores keys centred.

    Returns:
        The compiled model, still its transformers class.

    Raises:
        KvcompileError: where the plan does not fit the model.

    Examples:
        >>> from kvcompile.adapters.architectures import describe
        >>> from kvcompile.compiler import compile_plan
        >>> from kvcompile.policies.snapkv import SnapKV
        >>> plan = SnapKV(budget=50).apply(describe(model.config))
        >>> model = compile_plan(model, plan)
        >>> model(ids).past_key_values.lengths()[0]
        [50, 50]
    """
    from kvcompile.adapters.architectures import require_turnable
    from kvcompile.structure.center import center_keys
    from kvcompile.structure.convert import convert
    from kvcompile.structure.rotate import fold_rotation

    require_turnable(plan, model.config)
    convert(model, plan)
    center_keys(model, plan, tokenizer)
    fold_rotation(model, plan)
    return build(model, plan, kernels)


def _require_compilable(model: Any, architecture: str | None) -> None:
    """Raise KvcompileError for what is no causal LM of a known architecture, or of the one that it is named as."""
    from transformers import PreTrainedModel

    from kvcompile.adapters.architectures import architecture_of
    from kvcompile.models.forks import name_as
    from kvcompile.models.loading import require_one_device, require_weights

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise KvcompileError(
            "only a causal LM of transformers can be compiled",
            type(model).__name__,
            "AutoModelForCausalLM.from_pretrained(...), adapters merged into it",
        )
    require_one_device(model)
    require_weights(model)
    name_as(model.config, architecture)
    require_alike(model)
    architecture_of(model.config).require_as_configured(model)


def compile(
    model: Any,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    tokenizer: Any = None,
) -> Any:
    """Give a model a smaller KV cache, in memory: nothing is written and nothing is measured.

    Args:
        model: a loaded transformers causal LM, which is rewritten in place; or the name of a model that `kvcompile ls`
            lists, such as `"llama"`, which is then loaded with its tokenizer.
        recipe: the name of a recipe. None: what `overrides` say alone, and without any the model's whole cache.
        overrides: settings as on the command line, `["policy=[snapkv,kivi]", "budget=0.25"]`, or one such string.
        tokenizer: the model's own. Only policies that calibrate on text need it.

    Returns:
        The compiled model. It keeps its class, config and weights (but those that a policy converts), `generate` works
        as before, and `model.kvcompile.plan` says what each layer keeps.

    Raises:
        KvcompileError: for an unknown name or setting, and for a stack that cannot work on this model.

    Examples:
        >>> model = kvcompile.compile(model, recipe="snapkv", overrides=["budget=0.5"])
        >>> cache = model(ids).past_key_values  # ids [1, 100]
        >>> cache.lengths()[0]  # tokens held in the first layer, by KV head
        [50, 50]
        >>> type(model).__name__
        'LlamaForCausalLM'
    """
    named = isinstance(model, str)
    wanted = [f"recipe={recipe}"] if recipe else []
    changes = [overrides] if isinstance(overrides, str) else overrides
    config = compose([*wanted, *([f"model={model}"] if named else []), *changes])
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
    from kvcompile.adapters.architectures import require_turnable
    from kvcompile.exporters.registry import require_open
    from kvcompile.models.loading import config_of

    architecture = architecture or config_of(config.model)
    dtype = cache_dtype(config.model, getattr(architecture, "dtype", None))
    stack = plan_stack(identity_plan(architecture, dtype, config), config.policies())
    require_turnable(stack.plan, architecture)
    require_open(config.exporters(), stack.plan, architecture)
    return stack


def cache_dtype(model: ModelConfig, own: object) -> str:
    """The cache's dtype: as asked; `auto` is float32 on a CPU and the checkpoint's `own` on an accelerator."""
    if model.dtype != "auto":
        return model.dtype
    import torch

    on_cpu = model.device == "cpu" or (model.device == "auto" and not torch.cuda.is_available())
    return "float32" if on_cpu or own is None else str(own).removeprefix("torch.")
