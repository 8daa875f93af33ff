"""A model of images and text around a compiled stack of text: images, embeddings and head stay transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from kvcompile.adapters.around import Around
from kvcompile.errors import KvcompileError
from kvcompile.runtime.model import CompiledMixin

IMAGES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
MASK = "kvcompile"  # under which a padding mask passes by a model that would make masks of it


class TextStack(PreTrainedModel):  # type: ignore[misc]
    """The text model inside, as a causal LM whose logits are its last hidden states."""

    base_model_prefix = "model"
    model: nn.Module

    def __init__(self, stack: PreTrainedModel) -> None:
        nn.Module.__init__(self)  # nothing of the stack is to be initialised again
        self.config, self.model, self.lm_head = stack.config, stack, nn.Identity()
        self.train(stack.training)

    def get_output_embeddings(self) -> nn.Module:
        """What stands for the head."""
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        """Those of the stack."""
        embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return embeddings

    def forward(self, *args: Any, logits_to_keep: int | Tensor = 0, **kwargs: Any) -> CausalLMOutputWithPast:
        """Hidden states `[B, kept, hidden]` in place of logits."""
        states = self.model(*args, **kwargs).last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.lm_head(states[:, kept]))


class InsideMixin:
    """Mixed in front of the text model's class: its forward is the compiled graph."""

    compiled: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the text model's; positions may be of time, height and width, `[3 or 4, B, Q]`."""
        mask = attention_mask.get(MASK) if isinstance(attention_mask, dict) else attention_mask
        if position_ids is not None and position_ids.ndim == 3:
            position_ids = position_ids[-3:].movedim(0, -1)
        kwargs.pop("return_dict", None)
        out = self.compiled(input_ids, mask, position_ids, return_dict=True, **kwargs)
        return BaseModelOutputWithPast(out.logits, out.past_key_values, out.hidden_states)


class AroundMixin(CompiledMixin):
    """Mixed in front of the whole model's class: its cache is ours, its forward transformers'."""

    kvcompile_around: Around

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's. Raises KvcompileError for images where they are not compiled."""
        around, original = self.kvcompile_around, super(CompiledMixin, self).forward  # type: ignore[misc]
        if args:
            kwargs |= dict(zip(signature(original).parameters, args, strict=False))
        types = kwargs.get("token_type_ids")
        images = [name for name in IMAGES if _given(kwargs.get(name))]
        if around.images and (images or (types is not None and bool(types.any()))):
            raise KvcompileError(
                f"images are not compiled in a {type(self).__name__}: {around.images}",
                images[0] if images else "token_type_ids of images",
                "give it text alone, or compile another model",
            )
        if around.masks:
            kwargs["attention_mask"] = {MASK: kwargs.get("attention_mask")}
            kwargs.pop("token_type_ids", None)
        return original(**kwargs)


def _given(images: Any) -> bool:
    """Whether there is a tensor, or one among encoded images."""
    if isinstance(images, dict):
        return any(image is not None for image in images.values())
    return images is not None


def text_stack(model: Any, place: str) -> TextStack:
    """The text stack of a whole model, over the same modules. Raises KvcompileError for one that is compiled."""
    stack = model.get_submodule(place)
    if isinstance(stack, InsideMixin):
        raise KvcompileError("a model is compiled once", "one that is compiled already", "load it afresh")
    return TextStack(stack)


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
