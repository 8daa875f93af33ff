"""The one configuration: what a recipe, the command line and the Python API all end in, and its YAML form."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvcompile.errors import KvcompileError, first_line
from kvcompile.stack import build_stack, options_of, policy_class, suggest

if TYPE_CHECKING:
    from kvcompile.exporters.base import Door
    from kvcompile.policies.base import Policy

DTYPES = ("auto", "float32", "bfloat16", "float16")
KERNELS = ("auto", "cpp", "triton", "sdpa", "reference")
MODES = ("run", "only")
RECIPE_NODES = 20_000  # in a recipe of 126 layers and 128 heads, each named, there are fewer


@dataclass
class ModelConfig:
    """Which model: `pretrained` is a local folder, a GGUF file or a hub id (None: the default model, offline)."""

    name: str = "llama"
    pretrained: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"


@dataclass
class NeedleConfig:
    """Needle-in-a-haystack score before and after: `samples` per length in `tokens`, at `depths` in [0, 1]."""

    enabled: bool = True
    tokens: list[int] = field(default_factory=lambda: [1024])
    samples: int = 4
    depths: list[float] = field(default_factory=lambda: [0.1, 0.35, 0.6, 0.85])
    seed: int = 0


@dataclass
class PerplexityConfig:
    """Perplexity before and after, read through the cache: `tokens` scored after each of `windows` contexts.

    source: a text file (None: the end of the offline text, which nothing is trained on).
    """

    enabled: bool = True
    context: int = 512
    tokens: int = 96
    windows: int = 4
    source: str | None = None


@dataclass
class GateConfig:
    """What makes a compile fail, its report kept: None asks for nothing.

    max_ppl_increase: largest relative increase of perplexity (0.1: a tenth more). min_needle: least needle score, as a
    fraction of the uncompressed model's.
    """

    max_ppl_increase: float | None = None
    min_needle: float | None = None


@dataclass
class SpeedConfig:
    """Tokens per second before and after: decode `tokens` after a prompt of `context`."""

    enabled: bool = True
    context: int = 1024
    tokens: int = 16


@dataclass
class HealConfig:
    """Training that repairs converted weights, before anything is selected or encoded.

    tokens: how many are trained on (0: nothing is); minutes: of wall clock, if those are over first.
    loss: `distill` (towards the original model) or `lm` (the text alone). layers: share of the budget in which each
    attention learns alone what the original's gave; hidden: weight of hidden states beside logits after that.
    weights: `full`, or `lora` of `rank`; scope: `attention` or `all` weights. length, batch, accumulate: tokens a
    sequence, sequences a step and process, steps summed up. lr: peak, end to end; layers_lr: of the layers alone.
    dataset: None (offline text), a file (json, jsonl, txt, csv, parquet), a folder or a hub name, with its `subset`,
    `split` and text `column`. checkpoint_minutes: between two; resume: go on where an interrupted training stopped.
    """

    tokens: int = 0
    minutes: float | None = None
    loss: str = "distill"
    layers: float = 0.3
    hidden: float = 1.0
    temperature: float = 1.0
    weights: str = "full"
    scope: str = "attention"
    rank: int = 16
    lr: float = 3e-4
    layers_lr: float = 1e-3
    length: int = 256
    batch: int = 4
    accumulate: int = 1
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    bf16: bool = False
    checkpoint_minutes: float = 5.0
    resume: bool = True
    seed: int = 0


@dataclass
class PlanConfig:
    """`only`: print the plan for a `batch` of prompts of `context` tokens, and what fits in `memory` GiB; then stop."""

    mode: str = "run"
    batch: int = 1
    context: int = 4096
    memory: float | None = None


@dataclass
class Config:
    """Everything a compile depends on. `stack` maps each policy, in order, to its fields, `export` each door.

    budget: shortcut, sets the budget of every policy in the stack that has one; folded into `stack` when resolved.
    prefill_chunk: prompt tokens per prefill step (0: all at once). kernels: attention route. output: artifact folder.
    artifact: nothing is compiled, what lies in this folder is exported, into `output`.
    """

    recipe: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    stack: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    artifact: str | None = None
    budget: float | None = None
    prefill_chunk: int = 0
    kernels: str = "auto"
    output: str | None = None
    heal: HealConfig = field(default_factory=HealConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    @property
    def label(self) -> str:
        """`<recipe, or the policies joined by +>-<model>`."""
        return f"{self.recipe or '+'.join(self.stack) or 'dense'}-{self.model.name}"

    def policies(self) -> tuple[Policy, ...]:
        """The stack as policies. Raises KvcompileError (see `build_stack`)."""
        return build_stack(list(self.stack), self.stack)

    def doors(self) -> tuple[Door, ...]:
        """The doors to export through. Raises KvcompileError (see `build_doors`)."""
        from kvcompile.exporters.registry import build_doors

        return build_doors(self.export)

    def with_policies(self, policies: Iterable[Policy]) -> Config:
        """The config with these policies, e.g. after calibration."""
        return replace(self, stack=options_of(policies))


def finish(config: Config) -> Config:
    """The config with the budget shortcut folded in, every policy's fields filled in, and an output folder.

    Raises KvcompileError where a value is of the wrong type or out of range.
    """
    config = replace(_budgeted(_typed(config)), budget=None)
    config = replace(config.with_policies(config.policies()), export=options_of(config.doors()))
    _check(config)
    given = f"{config.artifact.rstrip('/')}-export" if config.artifact else f"outputs/{config.label}"
    return replace(config, output=config.output or given)


def _typed(config: Config) -> Config:
    """The config with every setting of its type and every `${...}` resolved; `build_stack` does so for policies."""
    try:
        plain = OmegaConf.to_object(OmegaConf.structured(replace(config, stack={}, export={})))
    except OmegaConfBaseException as error:
        where, said = getattr(error, "full_key", None), first_line(error)
        raise KvcompileError(f"{where}: {said}" if where else said) from error
    return replace(cast(Config, plain), stack=config.stack, export=config.export)


def _budgeted(config: Config) -> Config:
    if config.budget is None:
        return config
    takers = [n for n in config.stack if "budget" in {f.name for f in dataclasses.fields(policy_class(n))}]
    if not takers:
        raise KvcompileError(
            "budget needs a policy that has one in the stack",
            f"budget={config.budget:g} with policy=[{','.join(config.stack)}]",
            "choose a recipe, e.g. recipe=zigzag, or drop budget",
        )
    given = {name: {**config.stack[name], "budget": config.budget} for name in takers}
    return replace(config, stack={**config.stack, **given})


def _check(config: Config) -> None:
    m, n, s, p = config.model, config.needle, config.speed, config.plan
    _one_of("model.dtype", m.dtype, DTYPES)
    _one_of("kernels", config.kernels, KERNELS)
    _one_of("plan", p.mode, MODES)
    if config.artifact and not config.export:
        raise KvcompileError(
            "artifact=<folder> only exports what is compiled, so it needs export=[...]",
            f"artifact={config.artifact}",
            "export=[hf]",
        )
    if config.artifact and p.mode == "only":
        raise KvcompileError(
            "plan=only plans a compile, and an artifact is compiled already",
            f"plan=only with artifact={config.artifact}",
            "plan=run",
        )
    if config.artifact and (config.stack or config.recipe):
        raise KvcompileError(
            "an artifact is compiled already",
            f"artifact={config.artifact} with {f'recipe={config.recipe}' if config.recipe else 'policies'}",
            "drop one of the two",
        )
    _require(config.prefill_chunk >= 0, "prefill_chunk", config.prefill_chunk, "0 (whole prompt at once) or more")
    _require(len(n.tokens) > 0 and min(n.tokens) >= 64, "needle.tokens", n.tokens, "a list of lengths of 64 or more")
    _require(n.samples >= 1, "needle.samples", n.samples, "1 or more")
    _require(len(n.depths) > 0 and all(0 <= d <= 1 for d in n.depths), "needle.depths", n.depths, "a list in [0, 1]")
    _check_quality(config.perplexity, config.gate, n.enabled)
    _check_heal(config.heal)
    _require(s.context >= 1, "speed.context", s.context, "1 or more")
    _require(s.tokens >= 1, "speed.tokens", s.tokens, "1 or more")
    _require(p.batch >= 1, "plan.batch", p.batch, "1 or more")
    _require(p.context >= 1, "plan.context", p.context, "1 or more")
    _require(p.memory is None or p.memory > 0, "plan.memory", p.memory, "more than 0 GiB")


def _check_quality(p: PerplexityConfig, gate: GateConfig, needle: bool) -> None:
    for name in ("context", "tokens", "windows"):
        _require(getattr(p, name) >= 1, f"perplexity.{name}", getattr(p, name), "1 or more")
    most, least = gate.max_ppl_increase, gate.min_needle
    _require(most is None or most >= 0, "gate.max_ppl_increase", most, "0 or more, as a fraction: 0.1 is a tenth more")
    _require(least is None or 0 <= least <= 1, "gate.min_needle", least, "in [0, 1], a fraction of the score before")
    for name, wanted, measured in (("perplexity", most, p.enabled), ("needle", least, needle)):
        if wanted is not None and not measured:
            raise KvcompileError(
                "a gate needs what it judges to be measured", f"{name}.enabled=false", f"{name}.enabled=true"
            )


def _check_heal(h: HealConfig) -> None:
    _one_of("heal.loss", h.loss, ("distill", "lm"))
    _one_of("heal.weights", h.weights, ("full", "lora"))
    _one_of("heal.scope", h.scope, ("attention", "all"))
    _require(h.minutes is None or h.minutes > 0, "heal.minutes", h.minutes, "more than 0")
    _require(0 <= h.layers <= 1, "heal.layers", h.layers, "in [0, 1], a share of the budget")
    _require(h.temperature > 0, "heal.temperature", h.temperature, "more than 0")
    _require(h.length >= 2, "heal.length", h.length, "2 or more")
    for name in ("tokens", "hidden", "lr", "layers_lr", "checkpoint_minutes"):
        _require(getattr(h, name) >= 0, f"heal.{name}", getattr(h, name), "0 or more")
    for name in ("batch", "accumulate", "rank"):
        _require(getattr(h, name) >= 1, f"heal.{name}", getattr(h, name), "1 or more")


def _require(ok: bool, name: str, got: object, rule: str) -> None:
    if not ok:
        raise KvcompileError(f"{name} must be {rule}", got)


def _one_of(name: str, got: str, known: Iterable[str]) -> None:
    if got not in known:
        raise KvcompileError(f"unknown {name}", repr(got), suggest(got, known))


def to_recipe(config: Config) -> str:
    """YAML that recreates exactly this config with `from_recipe`."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=120)
    return f"# Written by kvcompile. Read it again with kvcompile.config.schema.from_recipe.\n{text}"


def from_recipe(text: str) -> Config:
    """The config that `to_recipe` wrote. Data only: no Hydra, no interpolation, nothing executed.

    Raises KvcompileError for broken YAML, unknown keys, wrong types and values out of range.
    """
    try:
        _require_small(text)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise KvcompileError("a recipe must be YAML", first_line(error)) from error
    if not isinstance(data, dict):
        raise KvcompileError("a recipe must be a YAML mapping", type(data).__name__)
    _refuse_interpolation(data)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), data)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise KvcompileError(f"recipe: {first_line(error)}", getattr(error, "full_key", None)) from error
    return finish(config)


def _require_small(text: str) -> None:
    """Refuse what a few bytes blow up to millions of values, and lists that no model has layers or heads for."""
    nodes = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        nodes += isinstance(event, yaml.NodeEvent)
        if isinstance(event, yaml.AliasEvent):
            raise KvcompileError("a resolved recipe holds plain values", f"the alias *{event.anchor}", "write it out")
        if nodes > RECIPE_NODES:
            raise KvcompileError(f"a recipe has at most {RECIPE_NODES:,} values", "more")


def _refuse_interpolation(value: Any) -> None:
    if isinstance(value, str) and "${" in value:
        raise KvcompileError("a resolved recipe holds plain values", value, "replace the interpolation by its value")
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        _refuse_interpolation(item)
