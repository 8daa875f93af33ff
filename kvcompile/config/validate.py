"""A composed config becomes a checked one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvcompile.config.schema import (
    DTYPES,
    MODES,
    OPTIONS,
    QUESTION,
    Config,
    GateConfig,
    HealConfig,
    PerplexityConfig,
    PromptsConfig,
    SearchConfig,
)
from kvcompile.errors import KvcompileError, first_line
from kvcompile.kernels.names import WEIGHTS, names
from kvcompile.options import options_of, suggest
from kvcompile.stack import policy_class


def finish(config: Config) -> Config:
    """The config with the budget shortcut folded in, every policy's fields filled in, and an output folder.

    Raises KvcompileError where a value is of the wrong type or out of range.
    """
    config = replace(_budgeted(_typed(config)), budget=None)
    config = replace(config.with_policies(config.policies()), export=options_of(config.exporters()))
    config = replace(config, analysis=options_of(config.analyses()), tasks=options_of(config.built_tasks()))
    _check(config)
    if config.tasks:
        return config
    default = f"{config.artifact.rstrip('/')}-export" if config.artifact else f"outputs/{config.label}"
    return replace(config, output=config.output or default)


def _typed(config: Config) -> Config:
    """The config with every setting of its type and every `${...}` resolved; `build_stack` does so for policies."""
    nothing: dict[str, Any] = {name: {} for name in OPTIONS}
    options: dict[str, Any] = {name: getattr(config, name) for name in OPTIONS}
    try:
        plain = OmegaConf.to_object(OmegaConf.structured(replace(config, **nothing)))
    except OmegaConfBaseException as error:
        where, said = getattr(error, "full_key", None), first_line(error)
        raise KvcompileError(f"{where}: {said}" if where else said) from error
    return replace(cast(Config, plain), **options)


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
    budgeted = {name: {**config.stack[name], "budget": config.budget} for name in takers}
    return replace(config, stack={**config.stack, **budgeted})


def _check(config: Config) -> None:
    m, n, s, p = config.model, config.needle, config.speed, config.plan
    _one_of("model.dtype", m.dtype, DTYPES)
    _check_weights(config)
    _one_of("kernels", config.kernels, ("auto", *names()))
    _one_of("plan", p.mode, MODES)
    if config.artifact and not config.export and not config.tasks:
        raise KvcompileError(
            "artifact=<folder> exports or evaluates what is compiled, so it needs export=[...] or evaluate=[...]",
            f"artifact={config.artifact}",
            "export=[hf] or evaluate=[needle]",
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
    _require(len(n.haystacks) > 0, "needle.haystacks", n.haystacks, "one or more")
    _require(n.samples >= 1, "needle.samples", n.samples, "1 or more")
    _require(len(n.depths) > 0 and all(0 <= d <= 1 for d in n.depths), "needle.depths", n.depths, "a list in [0, 1]")
    if config.analysis:
        _check_analysis(config)
    _one_of("question", config.question, QUESTION)
    config.evaluate.part  # noqa: B018  refused where it is none
    memory = config.evaluate.memory
    _require(memory is None or memory > 0, "evaluate.memory", memory, "more than 0 GiB")
    if config.tasks:
        _check_evaluation(config)
    _check_prompts(config.prompts)
    _check_quality(config.perplexity, config.gate, n.enabled)
    _check_heal(config.heal)
    _check_search(config.search)
    _require(s.context >= 1, "speed.context", s.context, "1 or more")
    _require(s.tokens >= 1, "speed.tokens", s.tokens, "1 or more")
    _require(p.batch >= 1, "plan.batch", p.batch, "1 or more")
    _require(p.context >= 1, "plan.context", p.context, "1 or more")
    _require(p.memory is None or p.memory > 0, "plan.memory", p.memory, "more than 0 GiB")


def _check_weights(config: Config) -> None:
    weights = config.model.weights
    if weights is None:
        return
    _one_of("model.weights", weights, (*WEIGHTS, "null"))
    if config.export:
        raise KvcompileError(
            "weights in few bits run in kvcompile alone, in memory and as an artifact",
            f"model.weights={weights} with export=[{','.join(config.export)}]",
            "drop one of the two",
        )
    if config.analysis or config.evaluate.recipes:
        raise KvcompileError(
            "stacks are compared on the model as it is", f"model.weights={weights}", "evaluate=[...] with recipe=<one>"
        )


def _check_analysis(config: Config) -> None:
    """Raise KvcompileError where something else is asked for in the same job."""
    others = {
        f"recipe={config.recipe}": config.recipe,
        f"policy=[{','.join(config.stack)}]": config.stack,
        f"export=[{','.join(config.export)}]": config.export,
        f"artifact={config.artifact}": config.artifact,
        "plan=only": config.plan.mode == "only",
    }
    if asked := [text for text, given in others.items() if given]:
        raise KvcompileError(
            "an analysis is of the original model, and nothing is compiled",
            f"analysis=[{','.join(config.analysis)}] with {asked[0]}",
            "drop one of the two",
        )


def _check_evaluation(config: Config) -> None:
    """Raise KvcompileError where something else is asked for in the same job."""
    others = {
        f"analysis=[{','.join(config.analysis)}]": config.analysis,
        f"export=[{','.join(config.export)}]": config.export,
        "plan=only": config.plan.mode == "only",
        f"output={config.output}": config.output,
    }
    if config.evaluate.recipes:
        others |= {
            f"recipe={config.recipe}": config.recipe,
            f"policy=[{','.join(config.stack)}]": config.stack,
            f"artifact={config.artifact}": config.artifact,
            f"prefill_chunk={config.prefill_chunk}": config.prefill_chunk,
            f"heal.tokens={config.heal.tokens}": config.heal.tokens,
        }
    if given := [text for text, value in others.items() if value]:
        raise KvcompileError(
            "an evaluation asks tasks and writes rows into evaluate.rows, nothing else"
            + ("; each of evaluate.recipes has settings of its own" if config.evaluate.recipes else ""),
            f"evaluate=[{','.join(config.tasks)}] with {given[0]}",
            "drop one of the two",
        )


def _check_prompts(p: PromptsConfig) -> None:
    _require(p.count >= 1, "prompts.count", p.count, "1 or more")
    _require(p.tokens >= 1, "prompts.tokens", p.tokens, "1 or more")
    if p.template is not None:
        _require("{context}" in p.template, "prompts.template", p.template, "a text with {context} in it, and {input}")


def _check_quality(p: PerplexityConfig, gate: GateConfig, needle: bool) -> None:
    for name in ("context", "tokens", "windows"):
        _require(getattr(p, name) >= 1, f"perplexity.{name}", getattr(p, name), "1 or more")
    most, seen, hidden = gate.max_ppl_increase, gate.min_needle, gate.min_needle_hidden
    _require(most is None or most >= 0, "gate.max_ppl_increase", most, "0 or more, as a fraction: 0.1 is a tenth more")
    for field, least in (("min_needle", seen), ("min_needle_hidden", hidden)):
        _require(least is None or 0 <= least <= 1, f"gate.{field}", least, "in [0, 1], a fraction of the score before")
    for name, wanted, measured in (("perplexity", [most], p.enabled), ("needle", [seen, hidden], needle)):
        if wanted.count(None) < len(wanted) and not measured:
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


def _check_search(s: SearchConfig) -> None:
    _require(_is_share(s.bytes), "search.bytes", s.bytes, "a share of the bytes, above 0 and at most 1, as 1/24")
    _require(s.quality is None or 0 < s.quality <= 1, "search.quality", s.quality, "in (0, 1], as a share")
    _require(s.perplexity is None or s.perplexity >= 1, "search.perplexity", s.perplexity, "a multiple of 1 or more")
    _require(s.minutes >= 0, "search.minutes", s.minutes, "0 or more")
    _require(s.stacks is None or s.stacks >= 1, "search.stacks", s.stacks, "1 or more")
    _require(s.tokens >= 64, "search.tokens", s.tokens, "64 or more")
    rising = len(s.rungs) > 0 and min(s.rungs) >= 1 and s.rungs == sorted(set(s.rungs))
    _require(rising, "search.rungs", s.rungs, "a list of contexts, each more than the one before: [2,6,18]")
    _require(s.batch is None or s.batch >= 1, "search.batch", s.batch, "1 or more")
    _require(s.memory is None or s.memory > 0, "search.memory", s.memory, "more than 0 GiB")


def _is_share(text: str | None) -> bool:
    try:
        return text is None or 0 < Fraction(text) <= 1
    except (ValueError, ZeroDivisionError):
        return False


def _require(ok: bool, name: str, got: object, rule: str) -> None:
    if not ok:
        raise KvcompileError(f"{name} must be {rule}", got)


def _one_of(name: str, got: str, known: Iterable[str]) -> None:
    if got not in known:
        raise KvcompileError(f"unknown {name}", repr(got), suggest(got, known))
