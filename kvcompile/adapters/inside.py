"""A model of images and text around a compiled stack of text: images, embeddings and head stay transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from kvcompile.adapters.around import Around
from kvcompile.adapters.rows import Rows, rows_of
from kvcompile.errors import KvcompileError
from kvcompile.runtime.model import CompiledMixin
from kvcompile.runtime.prompt import Sight, ends_of_runs

MASK, SIGHT = "kvcompile", "sight"  # under which a padding mask passes by a model that would make masks of it


class TextStack(PreTrainedModel):  # type: ignore[misc]
    """The text model inside, as a causal LM whose logits are its last hidden states."""

    base_model_prefix = "model"
    model: nn.Module

    def __init__(self, stack: PreTrainedModel, rows: Rows) -> None:
        nn.Module.__init__(self)  # nothing of the stack is to be initialised again
        self.config, self.model, self.lm_head, self.rows = stack.config, stack, nn.Identity(), rows
        self.whole = {"logits_to_keep": None} if "logits_to_keep" in signature(stack.forward).parameters else {}
        self.train(stack.training)

    def get_output_embeddings(self) -> nn.Module:
        """What stands for the head."""
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        """Those of the stack, and what goes with them."""
        return self.rows

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Hidden states `[B, kept, hidden]` in place of logits, of token ids or rows of the stack."""
        rows = self.rows(input_ids) if inputs_embeds is None else inputs_embeds
        states = self.model(**self.rows.parted(rows), **self.whole, **kwargs).last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.lm_head(states[:, kept]))


@dataclass
class StackOutput(BaseModelOutputWithPast):  # type: ignore[misc]
    """What the models around may look for besides: nothing is in it."""

    shared_kv_states: Any = None
    router_logits: Any = None


class InsideMixin:
    """Mixed in front of the text model's class: its forward is the compiled graph."""

    compiled: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> StackOutput:
        """As the text model's; positions may be of time, height and width, `[3 or 4, B, Q]`."""
        mask, sight = attention_mask, None
        if isinstance(attention_mask, dict):
            mask, sight = attention_mask.get(MASK), attention_mask.get(SIGHT)
        if position_ids is not None and position_ids.ndim == 3:
            position_ids = position_ids[-3:].movedim(0, -1)
        kwargs.pop("return_dict", None)
        if isinstance(kwargs.get("logits_to_keep"), Tensor):  # the model around keeps these itself
            kwargs.pop("logits_to_keep")
        if inputs_embeds is not None:
            inputs_embeds = self.compiled.rows.joined(inputs_embeds, kwargs)
        cache = self.compiled._own(past_key_values)
        tokens = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
        with _seeing(cache, sight):
            out = self.compiled(**tokens, attention_mask=mask, past_key_values=cache, return_dict=True, **kwargs)
        return StackOutput(out.logits, out.past_key_values, out.hidden_states)


class AroundMixin(CompiledMixin):
    """Mixed in front of the whole model's class: its cache is ours, its forward transformers'."""

    kvcompile_around: Around

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        around, original = self.kvcompile_around, super(CompiledMixin, self).forward  # type: ignore[misc]
        if args:
            kwargs |= dict(zip(signature(original).parameters, args, strict=False))
        if around.masks:
            config: Any = self.config  # type: ignore[attr-defined]
            sight = _sight(around.both_ways(config), kwargs.get(around.types), config)
            kwargs["attention_mask"] = {MASK: kwargs.get("attention_mask"), SIGHT: sight}
        return original(**kwargs)


def _sight(layers: str, types: Tensor | None, config: Any) -> Sight | None:
    """What tokens of images and videos, of type 1 and 2 in `types [B, past + Q]`, see behind them.

    Raises KvcompileError where the model's own masks would not be of one window.
    """
    if not layers or types is None or not bool(types.any()):
        return None
    seen = (types == 1) | (types == 2)
    sight, window = Sight(ends_of_runs(seen), layers == "sliding"), config.get_text_config().sliding_window
    columns = torch.arange(types.shape[1], dtype=torch.int64, device=types.device)
    longest = int((sight.ends - columns).max()) + 1
    if layers == "all" and window and longest > window:
        raise KvcompileError(
            "an image has no more tokens than a sliding window", f"{longest} tokens of {window}", "use smaller images"
        )
    return sight


@contextmanager
def _seeing(cache: Any, sight: Sight | None) -> Iterator[None]:
    """For one pass: its new tokens see these later ones too."""
    cache.sight = sight
    try:
        yield
    finally:
        cache.sight = None


def text_stack(model: Any, place: str) -> TextStack:
    """The text stack of a whole model, over the same modules. Raises KvcompileError for one that is compiled."""
    stack = model.get_submodule(place)
    if isinstance(stack, InsideMixin):
        raise KvcompileError("a model is compiled once", "one that is compiled already", "load it afresh")
    return TextStack(stack, rows_of(model, stack))


def _as(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` with the signature of `original`, in which `generate` looks up what it may pass on."""

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    return forward


def put_around(model: Any, compiled: Any, around: Around) -> Any:
    """The whole model in whose text stack `compiled` runs, in place: same class name, same weights, same config."""
    for inner, mixin, facts in (
        (compiled.model, InsideMixin, {"compiled": compiled}),
        (model, AroundMixin, {"kvcompile": compiled.kvcompile, "kvcompile_around": around}),
    ):
        original = type(inner)
        own = {"__module__": original.__module__, "forward": _as(original.forward, mixin.forward)}
        inner.__class__ = type(original.__name__, (mixin, original), own)
        for name, fact in facts.items():  # no submodules: nothing is to be there twice
            object.__setattr__(inner, name, fact)
    compiled.kvcompile.warned = True  # hidden states of a whole prompt are no logits
    return model
