"""A plan and a model become a compiled model; weights are converted before, by the caller."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan
from kvcompile.stack import apply_stack

if TYPE_CHECKING:
    from kvcompile.config.schema import Config
    from kvcompile.plan.policy import Policy


def identity_plan(model_config: Any, dtype: str, config: Config) -> Plan:
    """The plan of a model as it is, from its config alone, read in the chunks that `config` asks for.

    Raises KvcompileError for an architecture that is not known.
    """
    from kvcompile.adapters.architectures import describe

    return replace(describe(model_config, dtype), prefill_chunk=config.prefill_chunk)


def plan_of(model_config: Any, dtype: str, config: Config, policies: Iterable[Policy]) -> Plan:
    """The checked plan of a stack on a model, from the model's config alone."""
    return apply_stack(identity_plan(model_config, dtype, config), policies)


def build(model: Any, plan: Plan, kernels: str = "auto", recipe: str = "") -> Any:
    """Rewrite `model` in place to what `plan` says: swap attention, trace, passes, wiring check.

    Its weights are those of the plan already: `structure.convert.convert` makes them so.
    Where the backend has a kernel for them, its linear layers run that from then on.
    Raises KvcompileError where an adapter, a pass or the wiring check fails.
    """
    from kvcompile.adapters.architectures import architecture_of
    from kvcompile.adapters.base import prune
    from kvcompile.adapters.latent import latent_rotations
    from kvcompile.graph.blocks import inside_blocks
    from kvcompile.graph.passes import rewrite
    from kvcompile.graph.tracer import skeleton, trace
    from kvcompile.graph.wiring import outputs, verify
    from kvcompile.kernels.dispatch import choose
    from kvcompile.models.loading import align_weights
    from kvcompile.runtime.model import Compiled, adopt

    backend = choose(kernels, model.device)  # one that cannot run here fails before any work
    _require_prompts(model, plan)
    align_weights(model)
    architecture = architecture_of(model.config)
    rotaries = latent_rotations(architecture.rotations(model), plan)
    architecture.swap(model, plan)
    graph = trace(model, plan.state_bytes > 0, architecture.grid)
    changes = rewrite(graph, plan).changes
    verify(graph.graph, plan)
    prune(model)
    if backend.linear is not None:
        changes["DecodeLinear"] = backend.linear(model)
    inside = inside_blocks(graph) if plan.blocks is not None else None
    facts = plan, graph, skeleton(model), rotaries, kernels, recipe, changes
    return adopt(model, Compiled(*facts, inside=inside, outputs=outputs(graph.graph)))


def _require_prompts(model: Any, plan: Plan) -> None:
    """Raise KvcompileError where a replay has no prompts of the model's own tokens."""
    replay = None if plan.replayed is None else plan.replayed.replay
    if replay is None:
        return
    if replay.first is None or replay.later is None or replay.closing is None:
        raise KvcompileError(
            "a replay asks the model to repeat a text, in token ids",
            "no tokenizer has made them",
            "compile with tokenizer=, or give the ids (stack.kvzip.ids, stack.attention_matching.ids)",
        )
    known, most = model.get_input_embeddings().num_embeddings, max((*replay.first, *replay.later, *replay.closing, 0))
    if most >= known:
        raise KvcompileError(f"prompts of a replay are tokens of the model, 0 to {known - 1}", most)
