"""The attention that a compiled model runs: one shape for all families, transparent to the tracer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor, nn

from kvcompile.adapters.center import Center
from kvcompile.adapters.latent import Latent
from kvcompile.adapters.layout import Layout
from kvcompile.errors import KvcompileError
from kvcompile.graph import ops
from kvcompile.plan.plan import LayerPlan
from kvcompile.runtime.cache import Step


class Attention(nn.Module):
    """Base adapter: keeps the original's submodules under their names and calls the graph's ops in between.

    A family overrides `keeps` (its submodules), `optional` (modules and parameters that a config may leave out),
    `norms` (the ones that norm queries and keys), `learned` (its own parameters; `sinks [H_q]` are logits that weigh
    in every softmax), `out`, `project`, `angles`, `rotate`, `finish` and `layout` (None: its weights cannot be
    converted). `pairs`: the channels that turn together lie side by side, not half a head apart. `in_float`: queries
    and keys are turned in float32 at least, then cast back. `turnable`: stored keys can be turned on to another
    position, which nothing between rotation and product forbids. `native`: the model caches latents itself. `rotary` is
    False for layers without position embedding, `reads` is True for those without keys and values of their own, which
    are traced, then dropped: they read another layer's cache, or compress into a `latent`. Numbers of heads are read
    off the tensors, never off the plan: heads may be sharded. `readers_lack`: the submodules that layers of the model
    have not which read another layer's keys and values.
    Raises KvcompileError where the original has other submodules or parameters than its family.
    """

    layout: ClassVar[type[Layout] | None] = None
    kvcompile_traced: ClassVar[bool] = True  # see `graph.tracer.TRACED`
    keeps: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")
    optional: ClassVar[tuple[str, ...]] = ()
    norms: ClassVar[tuple[str, ...]] = ()
    out: ClassVar[str] = "o_proj"
    learned: ClassVar[tuple[str, ...]] = ()
    pairs: ClassVar[bool] = False
    in_float: ClassVar[bool] = False
    turnable: ClassVar[bool] = True
    native: ClassVar[bool] = False
    readers_lack: ClassVar[tuple[str, ...]] = ()
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    latent: Latent
    center: Center
    sinks: nn.Parameter

    def __init__(self, original: nn.Module, plan: LayerPlan) -> None:
        super().__init__()
        children = dict(original.named_children())
        if plan.shared:
            children |= {name: Absent() for name in self.readers_lack}
        added = (("latent", plan.latent and not plan.latent.native), ("center", plan.storage.centred))
        keeps = {*self.keeps, *(name for name, there in added if there)}
        own = dict(original.named_parameters(recurse=False))
        may = {*self.optional}
        if {*children} - may != keeps - may or {*own} - may != {*self.learned} - may:
            raise KvcompileError(
                f"layer {plan.index}: the attention must have exactly {', '.join(sorted({*keeps, *self.learned}))}",
                f"{type(original).__name__} with {', '.join((*children, *own))}",
                "compile the model as transformers builds it",
            )
        for name, child in children.items():
            self.add_module(name, child)
        for name, parameter in own.items():
            self.register_parameter(name, parameter)
        self.layer_idx, self.head_dim, self.group, self.rotary = plan.index, plan.head_dim, plan.group, plan.rotates
        self.turning, self.value_dim = plan.rotary, plan.value_dim
        self.compresses, self.centred = plan.latent is not None, plan.storage.centred > 0
        self.reads = plan.owner != plan.index or self.compresses
        self.train(original.training)

    def heads(self, states: Tensor) -> Tensor:
        """`[B, Q, H * D]` to `[B, H, Q, D]`."""
        return torch.unflatten(states, -1, (-1, self.head_dim)).transpose(1, 2)

    def value_heads(self, states: Tensor) -> Tensor:
        """`[B, Q, H * D_v]` to `[B, H, Q, D_v]`, where a value has other channels than a key."""
        return torch.unflatten(states, -1, (-1, self.value_dim)).transpose(1, 2)

    def project(self, states: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values `[B, H, Q, D]` of `states [B, Q, hidden]`, normed, before rotation.

        A fourth, `[B, Q, H_q * D]` or `[B, Q, H_q]`, is what attended values are multiplied by.
        """
        return self.heads(self.q_proj(states)), self.heads(self.k_proj(states)), self.heads(self.v_proj(states))

    @classmethod
    def angles(cls, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """cos and sin `[B, Q, D_rot]`, half-split, of what the model's rotary module gives."""
        cos, sin = position_embeddings
        return cos, sin

    def rotate(self, queries: Tensor, keys: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """Rotary position embedding of queries and keys."""
        cos, sin = self.angles(position_embeddings)
        if not self.in_float:
            return ops.rope(queries, cos, sin), ops.rope(keys, cos, sin)
        return (
            ops.rope(ops.wide(queries), cos, sin).type_as(queries),
            ops.rope(ops.wide(keys), cos, sin).type_as(keys),
        )

    def finish(self, queries: Tensor, keys: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What is done to queries and keys behind their rotation: nothing in most families.

        kwargs: what else the decoder layer hands to its attention, `position_ids` among it.
        """
        return queries, keys

    def close(self, attended: Tensor) -> Tensor:
        """What the output projection reads of the attended values `[B, Q, H_q * D]`: themselves in most families."""
        return attended

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of new tokens to the cache; `attention_mask` carries the `Step` of this pass."""
        if not isinstance(attention_mask, (Step, fx.Proxy)):
            raise KvcompileError(
                "the layers of a compiled model run in its graph only",
                "a call of its base model or of a layer alone",
                "call the compiled model; its hidden states come with output_hidden_states=True",
            )
        if self.compresses:
            return self._through_latent(hidden_states, position_embeddings, attention_mask, past_key_values), None
        step: Any = attention_mask
        layer = self.layer_idx
        unrotated, keys, values, *gates = self.project(hidden_states)
        if self.pairs and self.rotary:
            unrotated, keys = ops.halves(unrotated, self.turning), ops.halves(keys, self.turning)
        queries = unrotated
        if self.rotary:
            queries, keys = self.rotate(queries, keys, position_embeddings)
        queries, keys = self.finish(queries, keys, **kwargs)
        if self.centred:
            keys = self.center(keys)
        kv, sinks = ops.kv_append(past_key_values, keys, values, step, layer), self._sinks()
        states = ops.attend(queries, kv, step, layer, **sinks)
        ops.observe(kv, queries, unrotated, step, layer, **sinks)
        for gate in gates:
            states = ops.gated(states, gate)
        return getattr(self, self.out)(self.close(states)), None

    def _sinks(self) -> dict[str, Any]:
        """The argument that an attention with sinks hands on, in the dtype that kernels read."""
        return {"sinks": self.sinks.float()} if "sinks" in self._parameters else {}

    def compressed(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Absorbed queries `[B, H_q, Q, d_R + d_c]` and rows `[k_R; c]` `[B, 1, Q, d_R + d_c]`, before rotation.

        And the `Expansion` that attention needs besides.
        """
        plain = self.project(hidden_states)[0]
        return self.latent.absorb(plain), self.latent.down(hidden_states).unsqueeze(1), self.latent(plain)

    def turned(self, queries: Tensor, rows: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """Rotary position embedding of absorbed queries and rows: of k_R alone."""
        frequencies = self.latent.frequencies
        if not frequencies:
            return queries, rows
        cos, sin = position_embeddings
        cos, sin = ops.frequencies(cos, frequencies), ops.frequencies(sin, frequencies)
        return ops.rope(queries, cos, sin), ops.rope(rows, cos, sin)

    def gates(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """What attended values of a latent are multiplied by, as `project` gives it: nothing in most families."""
        return ()

    def up(self) -> Tensor:
        """What makes values of a latent, `[H_kv, D_v, d_c]`."""
        weight: Tensor = self.latent.up.weight
        return weight

    def _through_latent(self, hidden_states: Tensor, position_embeddings: Any, step: Any, cache: Any) -> Tensor:
        """Absorbed queries over rows `[k_R; c]`, the same for all heads (see `kvcompile.adapters.latent`)."""
        layer, sinks = self.layer_idx, self._sinks()
        unrotated, rows, expansion = self.compressed(hidden_states)
        queries, rows = self.turned(unrotated, rows, position_embeddings)
        kv = ops.kv_append(cache, rows, rows, step, layer)
        states = ops.attend(queries, kv, step, layer, expansion, **sinks)
        ops.observe(kv, queries, unrotated, step, layer, **sinks)
        for gate in self.gates(hidden_states):
            states = ops.gated(states, gate)
        attended: Tensor = getattr(self, self.out)(states)
        return attended


def prune(model: nn.Module) -> None:
    """Take away what stood for projections that the graph turned out not to need."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Absent):
                delattr(module, name)


class Absent(nn.Module):
    """Stands where a projection was whose layer reads another layer's keys and values, until the graph is traced."""
