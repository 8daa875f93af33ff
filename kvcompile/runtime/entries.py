"""Other ways into and out of a compiled graph: from embeddings, and with the hidden states between layers."""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from kvcompile.runtime.live import LiveGraph


def from_embeddings(graph: LiveGraph) -> LiveGraph:
    """The graph that takes embeddings `[B, Q, hidden]` in place of token ids."""
    made = graph.twin()
    ids = next(node for node in made.graph.nodes if node.op == "placeholder")
    (embedded,) = (node for node in ids.users if node.op == "call_module")
    embedded.replace_all_uses_with(ids)
    made.graph.erase_node(embedded)
    made.recompile()
    return made


def with_states(graph: LiveGraph) -> LiveGraph:
    """The graph that returns `(logits, states)`: what enters each decoder layer, and the normed output of the last."""
    made = graph.twin()
    model: Any = made.model
    base = f"model.{model.base_model_prefix}"
    calls = [node for node in made.graph.nodes if node.op == "call_module" and str(node.target).startswith(f"{base}.")]
    states: list[Any] = [_first(calls, f"{base}.layers.{i}.").args[0] for i in range(model.config.num_hidden_layers)]
    (end,) = (node for node in made.graph.nodes if node.op == "output")
    end.args = ((end.args[0], (*states, calls[-1])),)  # the norm is the last module that the base model calls
    made.recompile()
    return made


def _first(calls: list[fx.Node], inside: str) -> fx.Node:
    """The first call of a module below a name."""
    return next(node for node in calls if str(node.target).startswith(inside))
