"""The two models of a distillation over their compiled graphs: the original that is looked at, the copy that learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from kvcompile.heal.budget import Stage
from kvcompile.heal.losses import divergence, next_token, relative_error
from kvcompile.heal.taps import attentions_alone, tapped
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import Plan
from kvcompile.runtime.model import CompiledMixin

Targets = dict[str, Any]  # "states", "outputs" and "logits" of the original


class Teacher:
    """The original model: what its attentions get and give, and its logits."""

    def __init__(self, original: Any, plan: Plan) -> None:
        from kvcompile.build import build

        self.model = build(shared(original), plan, "sdpa")
        self.graph = tapped(self.model.kvcompile.graph)

    @torch.no_grad()
    def targets(self, ids: Tensor, stage: Stage) -> Targets:
        """What the student learns in this stage; only the last token's logits where they are not wanted."""
        if self.model.device != ids.device:
            self.model.to(ids.device)
        keep = (
            torch.tensor([ids.shape[1] - 1], device=ids.device, dtype=torch.int64) if stage == "layers" else slice(None)
        )
        logits, states, outputs = _run(self.model, self.graph, ids, keep)
        if stage == "layers":
            return {"states": states, "outputs": outputs}
        return {"states": states, "logits": logits}


class StudentMixin(CompiledMixin):
    """A compiled model whose forward gives a loss; mixed in front of the compiled class, so that it saves like one."""

    graphs: Mapping[Stage, fx.GraphModule]
    hidden: float
    temperature: float

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, labels: Tensor | None = None, targets: Targets | None = None
    ) -> dict[str, Tensor]:
        """`{"loss"}` of `input_ids [B, Q]` against the targets, or of the labels where there are none."""
        if targets is None:
            logits = _run(self, self.kvcompile.graph, input_ids, slice(None))
            return {"loss": next_token(logits, input_ids if labels is None else labels)}
        if "outputs" in targets:
            outputs = _run(self, self.graphs["layers"], input_ids, slice(None), targets["states"])
            return {"loss": relative_error(outputs, targets["outputs"])}
        logits, states, _ = _run(self, self.graphs["model"], input_ids, slice(None))
        loss = divergence(logits, targets["logits"], self.temperature)
        if self.hidden and len(states) > 1:  # the first layer's are the embeddings of both
            loss = loss + self.hidden * relative_error(states[1:], targets["states"][1:])
        return {"loss": loss}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Weights and config as transformers writes them: a checkpoint of the training is no artifact."""
        super(CompiledMixin, self).save_pretrained(*args, **kwargs)  # type: ignore[misc]


def student(model: Any, plan: Plan, hidden: float, temperature: float) -> Any:
    """A trainable model over the weights of the converted, uncompiled `model` (LoRA may be in it already)."""
    copied = trainable(model, plan, StudentMixin, hidden, temperature)
    graph = copied.kvcompile.graph
    # not submodules, as with the graph of a compiled model: all share the model's own modules
    object.__setattr__(copied, "graphs", {"layers": attentions_alone(graph), "model": tapped(graph)})
    return copied


def trainable(model: Any, plan: Plan, mixin: type[StudentMixin], hidden: float, temperature: float) -> Any:
    """The uncompiled `model`, compiled to `plan` in place, with the forward of `mixin`."""
    from kvcompile.build import build

    copied = build(model, plan, "sdpa")
    compiled = type(copied)
    copied.__class__ = type(compiled.__name__, (mixin, compiled), {"__module__": compiled.__module__})
    copied.hidden, copied.temperature = hidden, temperature
    return copied


def _run(model: Any, graph: nn.Module, ids: Tensor, keep: Any, *more: Any) -> Any:
    """One pass over whole sequences with a cache of their own, which goes when the pass is done."""
    cache = model.new_cache()
    cache.chunk(prompting=True, last=True)
    positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int64).expand(ids.shape)
    return graph(ids, None, positions, cache, keep, *more)
