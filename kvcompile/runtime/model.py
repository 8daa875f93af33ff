"""The compiled model: still its transformers class, with the graph as its forward and our cache in `generate`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvcompile.errors import KvcompileError
from kvcompile.kernels.dispatch import choose
from kvcompile.kernels.pointers import opaque
from kvcompile.plan.plan import Plan
from kvcompile.runtime.blocks.cache import BlockCache
from kvcompile.runtime.cache import KVCache, Rotary
from kvcompile.runtime.decode.steps import FusedSteps
from kvcompile.runtime.live import LiveGraph, Skeleton, from_embeddings, with_states
from kvcompile.runtime.prompt import Prompt
from kvcompile.runtime.replay.finish import replay_and_select

log = logging.getLogger(__name__)
if TYPE_CHECKING:
    from kvcompile.heal.record import HealRecord

# what `generate` and `Trainer` pass on to every model, and no model reads
IGNORED = {"cache_position", "token_type_ids", "num_items_in_batch", "tokenizer", "assistant_tokenizer"}


@dataclass
class Compiled:
    """What a compiled model carries besides its weights."""

    plan: Plan
    graph: LiveGraph
    skeleton: Skeleton
    rotaries: list[Rotary]
    kernels: str
    recipe: str
    changes: dict[str, int]
    healed: HealRecord | None = None
    inside: LiveGraph | None = None  # of a block transformer: for passes in which no block is completed
    outputs: dict[int, str] = field(default_factory=dict)  # output projections by layer
    steps: FusedSteps | None = None  # how a token is decoded, where the backend has kernels for that
    restarts: bool = False  # whether states would begin anew in a pass of several tokens behind others
    warned: bool = False  # that one pass over a text does not read its cache
    entries: dict[tuple[bool, bool, bool], LiveGraph] = field(default_factory=dict)

    def entry(self, embeddings: bool, states: bool, inside: bool = False) -> LiveGraph:
        """The graph (that of the token decoder alone, for a pass that stays `inside` blocks), or one that begins at
        embeddings, or that returns hidden states beside logits, or both.
        """
        whole = self.inside if inside and self.inside is not None else self.graph
        if not (embeddings or states):
            return whole
        graph = self.entries.get((embeddings, states, inside))
        if graph is None:
            graph = from_embeddings(whole) if embeddings else whole
            graph = self.entries[embeddings, states, inside] = with_states(graph) if states else graph
        return graph

    def decode_step(self) -> str:
        """For reports: which layers run as fused kernels, and why others do not; empty on backends without these."""
        return "" if self.steps is None else self.steps.of(self.graph).describe()


class CompiledMixin:
    """Forward and cache of a compiled causal LM; mixed in front of the model's own class."""

    kvcompile: Compiled

    @opaque
    def new_cache(self) -> KVCache:
        """Returns an empty cache of this model's plan, to keep between calls: pass it as `past_key_values`.

        Examples:
            >>> model = kvcompile.compile(model, recipe="snapkv", overrides=["budget=0.5"])
            >>> cache = model.new_cache()
            >>> out = model.generate(ids, past_key_values=cache, max_new_tokens=1)
            >>> cache.seen
            [100]
        """
        compiled = self.kvcompile
        backend = choose(compiled.kernels, self.device)  # type: ignore[attr-defined]
        if compiled.plan.blocks is not None:
            return BlockCache(compiled.plan, compiled.rotaries, backend)
        states = partial(DynamicCache, config=self.config) if compiled.plan.state_bytes else None  # type: ignore[attr-defined]
        return KVCache(compiled.plan, compiled.rotaries, backend, states)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """One forward pass over `input_ids [B, Q]`, or `inputs_embeds [B, Q, hidden]` in their place.

        A prompt is compressed at its end (and between its chunks). What is None is as the config says.
        Raises KvcompileError for inputs the compiled graph does not take.
        """
        config: Any = self.config  # type: ignore[attr-defined]
        _refuse({"output_attentions": config.output_attentions, **kwargs})
        self.kvcompile.skeleton.check()
        use_cache = config.use_cache if use_cache is None else use_cache
        states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        _require_in_blocks(self.kvcompile.plan, inputs_embeds is not None, states)
        tokens = _tokens(input_ids, inputs_embeds)
        cache = self._own(past_key_values)
        _require_tokens(attention_mask)
        if position_ids is None:
            position_ids = _positions(tokens, attention_mask, cache.seen)
        elif position_ids.shape[1] != tokens.shape[1]:
            raise KvcompileError(
                "every new token has a position, and a place in the attention mask",
                f"position_ids {list(position_ids.shape)} of new tokens {list(tokens.shape)}",
            )
        prompt = Prompt(tokens, position_ids, attention_mask)
        chunk = self.kvcompile.plan.prefill_chunk if use_cache else 0
        if self.kvcompile.restarts and any(cache.seen) and tokens.shape[1] > 1:
            _require_real(tokens, attention_mask)
            chunk = 1
        logits, hidden = self._run(prompt, cache, logits_to_keep, chunk, states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size)  # type: ignore[attr-defined]
        kept = cache if use_cache else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=kept, hidden_states=hidden or None)
        whole = config.return_dict if return_dict is None else return_dict
        return output if whole else output.to_tuple()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update({name: copy.deepcopy(x, memo) for name, x in vars(self).items()})
        return clone

    def __copy__(self) -> Any:
        clone = object.__new__(type(self))
        clone.__dict__.update(vars(self))
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: a pickle would hold code. Raises KvcompileError."""
        raise KvcompileError(
            "a compiled model is saved as an artifact, not pickled",
            f"a {type(self).__name__}",
            "kvcompile.save(model, folder); in another process kvcompile.load(folder)",
        )

    def save_pretrained(
        self, save_directory: str | Path, tokenizer: Any = None, is_main_process: bool = True, **others: Any
    ) -> None:
        """Write the model as an artifact, which `kvcompile.load` opens; `kvcompile.save` under transformers' name.

        Raises KvcompileError as that does, and for other keywords of transformers: an artifact is written in one way.
        """
        from kvcompile.artifact.artifact import save

        unsupported = next((name for name, value in others.items() if value not in (None, False)), None)
        if unsupported:
            raise KvcompileError(
                "a compiled model is saved with save_directory and tokenizer", unsupported, "leave it out"
            )
        if is_main_process:
            save(self, save_directory, tokenizer)

    def push_to_hub(self, repo_id: str, tokenizer: Any = None, **options: Any) -> str:
        """Upload the model as an artifact to the Hugging Face hub: see `kvcompile.artifact.artifact.push`."""
        from kvcompile.artifact.artifact import push

        return push(self, repo_id, tokenizer, **options)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: its pages are of transformers. Raises KvcompileError, as `generate_batch` does through it."""
        raise KvcompileError(
            "continuous batching of transformers brings a cache of its own",
            "generate_batch or init_continuous_batching",
            "use generate with a padded batch",
        )

    continuous_batching_context_manager = generate_batch = init_continuous_batching

    @opaque
    def _own(self, cache: Any) -> KVCache:
        if cache is None:
            return self.new_cache()
        if not isinstance(cache, KVCache):
            raise KvcompileError(
                "a compiled model needs its own cache", type(cache).__name__, "pass model.new_cache(), or none at all"
            )
        if cache.plan is not self.kvcompile.plan and cache.plan != self.kvcompile.plan:
            raise KvcompileError(
                "a cache belongs to the model that made it", "a cache of another plan", "use model.new_cache()"
            )
        return cache

    def _run(
        self, prompt: Prompt, cache: KVCache, keep: int | Tensor, chunk: int, states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The graph over the prompt in chunks of so many tokens (0: in one): logits of the wanted tokens only.

        Beside them what enters each layer and leaves the last, of all tokens; nothing unless `states` are asked for.
        """
        count, device = prompt.ids.shape[1], prompt.ids.device
        if 0 < chunk < count:
            prompt = prompt.aligned()
        wanted = _wanted(keep, count)
        if wanted is None and count > 1:
            self._tell_of_one_pass()
        columns = list(range(count)) if wanted is None else wanted
        holding = None if wanted is None and prompt.places is None else prompt.columns_holding(columns)
        pieces, inner = [], []
        for part in prompt.chunks(chunk or count):
            cache.chunk(count > 1, part.last, part.coming)
            logits_at: Any = slice(None)
            if holding is not None:
                here = [i - part.first for i in holding if part.first <= i < part.stop]
                logits_at = torch.tensor(here, dtype=torch.long, device=device)
            at = prompt.positions[:, part.first : part.stop]
            if cache.shift is not None:
                at = at - cache.shift.view(-1, *(1,) * (at.ndim - 1))
            seen = None if prompt.mask is None else prompt.mask[:, : prompt.mask.shape[1] - (count - part.stop)]
            tokens = prompt.ids[:, part.first : part.stop]
            out = self._graph(tokens, seen, cache, states)(tokens, seen, at, cache, logits_at)
            if cache.withheld is not None:
                self._replay(cache)
            logits, between = out if states else (out, ())
            pieces.append(logits)
            inner.append(between)
        logits = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        every = list(range(count))
        hidden = tuple(prompt.restored(torch.cat(x, 1), every, every) for x in zip(*inner, strict=True))
        return logits if holding is None else prompt.restored(logits, holding, columns), hidden

    def _graph(self, tokens: Tensor, mask: Tensor | None, cache: KVCache, states: bool) -> LiveGraph:
        """What runs over new tokens: the graph of a decode step where there is one, and the whole one elsewhere."""
        compiled = self.kvcompile
        if compiled.steps is not None and not (states or torch.compiler.is_compiling()):
            fused = compiled.steps.graph(compiled.graph, tokens, cache)
            if fused is not None:
                return fused
        return compiled.entry(tokens.ndim == 3, states, cache.stays_inside(tokens, mask))

    @opaque
    def _replay(self, cache: KVCache) -> None:
        replay_and_select(self.kvcompile, cache)

    def _tell_of_one_pass(self) -> None:
        """Log once that logits of every token of a prompt, as a benchmark may score them, say nothing of the stack."""
        compiled = self.kvcompile
        lossy = any(p.selection is not None or p.storage.quantized for p in compiled.plan.owners)
        if lossy and not compiled.warned and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            compiled.warned = True
            log.warning(
                "kvcompile: logits of a whole prompt are computed before its cache is compressed. A loss or benchmark "
                "made of them measures the uncompressed model; "
                "kvcompile.evaluation.perplexity reads the compressed cache."
            )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Hook of `generate`: put our cache in place of transformers'."""
        mode = str(getattr(generation_mode, "value", generation_mode))
        if "dola" in mode:
            raise KvcompileError("a compiled graph gives no logits of inner layers", f"generation mode {mode!r}")
        assists = "assisted" in mode or generation_config.is_assistant
        if assists and not self.new_cache().is_croppable:
            raise KvcompileError(
                "assisted decoding takes back tokens, which a cache that evicts, encodes, recalls or slides cannot",
                "an assistant model" if generation_config.is_assistant else f"generation mode {mode!r}",
                "use greedy search, sampling or beam search, or a stack that only appends (policy=[] or paged)",
            )
        if generation_config.cache_implementation is not None:
            raise KvcompileError(
                "a compiled model brings its own cache",
                f"cache_implementation={generation_config.cache_implementation!r}",
                "leave cache_implementation unset",
            )
        if generation_config.prefill_chunk_size is not None:
            raise KvcompileError(
                "the plan says how a prompt is cut into chunks",
                f"prefill_chunk_size={generation_config.prefill_chunk_size}",
                "compile with prefill_chunk=<tokens> instead",
            )
        if generation_config.use_cache is False:
            return
        past = model_kwargs.get("past_key_values")
        model_kwargs["past_key_values"] = self._own(past)
        if past is not None:
            past._is_user_defined = True


def _tokens(ids: Tensor | None, embeddings: Tensor | None) -> Tensor:
    """The new tokens, ids `[B, Q]` or embeddings `[B, Q, hidden]`, whichever were given. Raises KvcompileError."""
    if (ids is None) == (embeddings is None):
        got = "neither" if ids is None else "both"
        raise KvcompileError("a pass reads input_ids or inputs_embeds", got, "pass one of them")
    tokens, shape = (ids, "input_ids [B, Q]") if embeddings is None else (embeddings, "inputs_embeds [B, Q, hidden]")
    if tokens is None or tokens.ndim != shape.count(",") + 1 or not tokens.shape[1]:
        raise KvcompileError(
            f"a pass needs new tokens, {shape}",
            None if tokens is None else list(tokens.shape),
            "with the cache of a first turn, give generate the whole conversation",
        )
    return tokens


def _require_in_blocks(plan: Plan, embeddings: bool, states: bool) -> None:
    """Raise KvcompileError for what a block transformer, if it is one, cannot take or give."""
    if plan.blocks is not None and states:
        raise KvcompileError(
            "layers of a block transformer have no state for each token: they read blocks, or one block's tokens",
            "output_hidden_states=True",
            "leave it out",
        )
    if plan.blocks is not None and embeddings and plan.blocks.embedder == "lookup":
        raise KvcompileError(
            "embedder=lookup finds the vectors of a block by its token ids", "inputs_embeds", "pass input_ids"
        )


@opaque
def _positions(ids: Tensor, mask: Tensor | None, seen: Sequence[int]) -> Tensor:
    """True positions `[B, Q]` of new tokens: how many real ones each sequence had before; padding is not counted.

    mask `[B, past + Q]` says which tokens are real (None: all). `seen`: tokens of each sequence so far.
    """
    batch, count = ids.shape[:2]
    start = torch.tensor(seen if len(seen) == batch else [0] * batch, device=ids.device, dtype=torch.int64).unsqueeze(1)
    if mask is None or mask.ndim != 2 or mask.shape[0] != batch:  # of a wrong shape: the cache will say so
        return start + torch.arange(count, device=ids.device, dtype=torch.int64)
    return start + (mask[:, -count:].ne(0).cumsum(1) - 1).clamp(min=0)


@opaque
def _require_real(tokens: Tensor, mask: Tensor | None) -> None:
    """Raise KvcompileError for padding among tokens that go one by one into states."""
    if mask is not None and bool(mask[:, -tokens.shape[1] :].eq(0).any()):
        raise KvcompileError(
            "layers of this model keep a state, which tokens behind others enter one by one, without padding",
            "padding among them",
            "go on with each sequence alone, or give the whole text at once",
        )


def _require_tokens(mask: Tensor | None) -> None:
    if mask is not None and mask.ndim == 2 and not bool(mask.any(1).all()):
        raise KvcompileError("every sequence needs at least one token", "a row of padding only", "drop that row")


def _wanted(keep: int | Tensor, count: int) -> list[int] | None:
    """Which of `count` new tokens get logits, as transformers reads `logits_to_keep`; None: all of them."""
    if isinstance(keep, Tensor):
        chosen = keep.nonzero().flatten() if keep.dtype == torch.bool else keep
        return [int(i) % count for i in chosen]
    return list(range(count)[-keep:]) if keep else None


@opaque
def _refuse(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if name not in IGNORED and value is not None and value is not False:
            raise KvcompileError(
                "a compiled model takes tokens, attention_mask, position_ids, past_key_values, labels",
                f"{name}",
                "leave it out; the weights of attentions are never computed",
            )


def adopt(model: nn.Module, compiled: Compiled) -> nn.Module:
    """Turn `model` into its compiled self, in place: same class name, same weights, same config."""
    original = type(model)
    model.__class__ = type(original.__name__, (CompiledMixin, original), {"__module__": original.__module__})
    # not a submodule: the graph shares the model's own modules and must not appear twice in its state dict
    object.__setattr__(model, "kvcompile", compiled)
    return model
