"""A plan and a model become a compiled model; weights are converted before, by the caller."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvcompile.errors import KvcompileError, wrapped_errors
from kvcompile.plan.plan import Plan
from kvcompile.stack import apply_stack

if TYPE_CHECKING:
    from kvcompile.config.schema import Config
    from kvcompile.plan.policy import Policy


PROBE, STRIDE = 64, 7919  # tokens that a fork is tried on: every 7919th of the vocabulary
ALIKE, ALIKE_HALF = 1e-4, 3e-2  # largest error of their logits, in float32 and in 16 bits


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
    Where the backend has kernels for them, its linear layers and its decode steps run those from then on.
    Raises KvcompileError where an adapter, a pass or the wiring check fails.
    """
    from kvcompile.adapters.architectures import architecture_of
    from kvcompile.adapters.base import prune
    from kvcompile.adapters.latent import latent_rotations
    from kvcompile.graph.blocks import inside_blocks
    from kvcompile.graph.fused.rewrite import fused_steps
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
    steps = None
    if backend.layers is not None and plan.blocks is None:
        steps = fused_steps(backend.layers)
        if places := steps.of(graph).places:
            changes["FuseSteps"] = places
    inside = inside_blocks(graph) if plan.blocks is not None else None
    facts = plan, graph, skeleton(model), rotaries, kernels, recipe, changes
    compiled = Compiled(*facts, inside=inside, outputs=outputs(graph.graph), steps=steps)
    _require_outputs(plan, compiled.outputs, architecture)
    compiled.restarts = architecture.restarts
    return adopt(model, compiled)


def require_alike(model: Any) -> None:
    """Raise KvcompileError where a model is compiled as one of another type, and does not compute what that does.

    A copy over the same weights is compiled to keep everything, and both read a few tokens.
    """
    import torch

    from kvcompile.adapters.architectures import FORK, describe
    from kvcompile.models.forks import compiled_as
    from kvcompile.models.sharing import shared

    name = compiled_as(model.config)
    if name == model.config.model_type:
        return
    rule = f"{model.config.model_type!r} is compiled as {name!r} only where it computes what that does"
    words = model.get_input_embeddings().num_embeddings
    ids = torch.arange(PROBE, dtype=torch.int64, device=model.device)[None] * STRIDE % words
    with wrapped_errors(rule, FORK), torch.no_grad():
        plan = describe(model.config, str(model.dtype).removeprefix("torch."))
        expected = model(ids, use_cache=False).logits.float()
        error = (build(shared(model), plan, "reference")(ids).logits - expected).norm()
        error = float(error / expected.norm())
        if not error <= (ALIKE if model.dtype == torch.float32 else ALIKE_HALF):
            raise KvcompileError("their logits are the same", f"{error:.0e} of their size apart")


def _require_outputs(plan: Plan, outputs: dict[int, str], architecture: Any) -> None:
    """Raise KvcompileError where a score asks how far a value moves its state, and W_O v is not what is added to it."""
    for p in plan.selected:
        if p.selection is None or not p.selection.score.needs.norms:
            continue
        last = outputs.get(p.index, "").rpartition(".")[2]
        if last != architecture.adapter.out or architecture.in_layer > 1:
            gate = f"a gate or a norm before {architecture.adapter.out}"
            raise KvcompileError(
                f"{p.selection.policy}: layer {p.index}: attention is weighed by what its output projection makes of a "
                "value, and adds to the state that its decoder layer was given",
                gate if architecture.in_layer == 1 else "two attentions in one decoder layer",
                f"stack.{p.selection.policy}.normalise=false",
            )


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
