"""The nodes of a compiled graph. Each is one call in the trace: the tracer records it and does not look inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
import torch.fx
from torch import Tensor
from torch.fx.node import has_side_effect

from kvcompile.kernels.pointers import opaque
from kvcompile.plan.selection import Schedule
from kvcompile.plan.storage import FLUSH
from kvcompile.runtime import eviction as selections
from kvcompile.runtime.cache import KVCache, Step
from kvcompile.runtime.layer import LayerCache
from kvcompile.stores.base import Chosen
from kvcompile.stores.encoded.hadamard import turn_basis

if TYPE_CHECKING:
    from kvcompile.runtime.attention import Expansion

P = ParamSpec("P")
R = TypeVar("R")


# what a node is recorded as: the function itself, for graphs that nobody traces
DIRECT: dict[Callable[..., Any], Callable[..., Any]] = {}


def _node(function: Callable[P, R], hidden: bool) -> Callable[P, R]:
    @wraps(function)
    def node(*args: P.args, **kwargs: P.kwargs) -> R:
        for arg in args:
            if isinstance(arg, torch.fx.Proxy):
                return arg.tracer.create_proxy("call_function", recorded, args, kwargs)  # type: ignore[return-value]
        return function(*args, **kwargs)

    recorded: Callable[P, R] = opaque(node) if hidden else node
    DIRECT[recorded] = function
    return recorded


def leaf(function: Callable[P, R]) -> Callable[P, R]:
    """A function that a trace records as one node, however it was imported."""
    return _node(function, hidden=False)


def at_the_cache(function: Callable[P, R]) -> Callable[P, R]:
    """The same of a function that reads or changes the cache: torch.compile calls it as it is."""
    return _node(function, hidden=True)


@at_the_cache
def begin(cache: KVCache, input_ids: Tensor, attention_mask: Tensor | None) -> Step:
    """Open a forward pass: true positions of the new tokens and which of them are padding."""
    return cache.begin(input_ids, attention_mask)


@at_the_cache
def states(cache: KVCache) -> Any:
    """Transformers' own cache of the layers that keep a state: what these are given."""
    return cache.states


@at_the_cache
def padding(step: Step) -> Tensor | None:
    """Which of several new tokens are real `[B, Q]`, for layers that keep a state; None: all are."""
    return None if step.valid is None or step.valid.shape[1] == 1 else step.valid


@at_the_cache
def positions(step: Step) -> Tensor:
    """True positions of the new tokens, `[B, Q]`."""
    return step.positions


@leaf
def grid(positions: Tensor) -> Tensor:
    """Positions `[4, B, Q]` of text, time, height and width: in text `[B, Q]` one, among images given `[B, Q, 3]`."""
    if positions.ndim == 3:
        return torch.cat((positions[..., :1], positions), -1).movedim(-1, 0)
    return positions.expand(4, *positions.shape)


@leaf
def rope(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[B, H, Q, D]` by `cos, sin [B, Q, D_rot]` (half-split layout); channels past `D_rot` pass through."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width = cos.shape[-1]
    half = width // 2
    turned = states if width == states.shape[-1] else states[..., :width]
    out = turned * cos
    # half by half, where x cos lies: to the bit what adding a rotated copy gives, in less time
    out[..., :half].sub_(turned[..., half:] * sin[..., :half])
    out[..., half:].add_(turned[..., :half] * sin[..., half:])
    return out if width == states.shape[-1] else torch.cat((out, states[..., width:]), -1)


@leaf
def wide(states: Tensor) -> Tensor:
    """In float32, or as they are where that is more."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


@leaf
def halves(states: Tensor, width: int) -> Tensor:
    """`[B, H, Q, D]` whose first `width` channels turn in adjacent pairs, in the half-split layout that `rope` turns.

    Queries and keys alike, so that their products stay.
    """
    pairs = torch.unflatten(states[..., :width], -1, (-1, 2))
    return torch.cat((pairs[..., 0], pairs[..., 1], states[..., width:]), -1)


@leaf
def gated(attended: Tensor, gate: Tensor) -> Tensor:
    """Attended values `[B, Q, H_q * D]` times a gate of each number, or of each head `[B, Q, H_q]`."""
    if gate.shape[-1] == attended.shape[-1]:
        return attended * gate
    by_head = torch.unflatten(attended, -1, (gate.shape[-1], -1))
    return (by_head * gate.unsqueeze(-1)).flatten(-2)


@leaf
def frequencies(angles: Tensor, chosen: tuple[int, ...]) -> Tensor:
    """`cos` or `sin [B, Q, D_rot]` of some frequencies only, half-split: `[B, Q, 2 F]`."""
    return angles.index_select(-1, _twice(chosen, angles.device))


@cache
def _twice(chosen: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(chosen + chosen, dtype=torch.long, device=device)


@leaf
def hadamard(states: Tensor) -> Tensor:
    """`[B, H, Q, D]` in the Hadamard basis: queries and keys alike, so that their products stay."""
    return turn_basis(states)


@at_the_cache
def kv_append(cache: KVCache, keys: Tensor, values: Tensor, step: Step, layer: int) -> LayerCache:
    """Store new keys and values `[B, H_kv, Q, D]`; the result is the edge that `attend` and `compress` read."""
    kv: LayerCache = cache.layers[layer]
    if step.prefill and kv.plan.selection is not None:
        kv.ungroup()
    # a prefill that is about to be compressed or encoded needs no room behind it
    shrinks = kv.plan.selection is not None or kv.plan.storage.quantized
    kv.append(keys, values, step.positions, step.valid, 0 if step.prefill and shrinks else cache.headroom)
    return kv


@at_the_cache
def observe(
    kv: LayerCache, queries: Tensor, unrotated: Tensor, step: Step, layer: int, sinks: Tensor | None = None
) -> selections.SequenceScores:
    """Let the layer's selection see the new queries `[B, H_q, Q, D]`; scores per sequence where a selection is due."""
    return selections.observe(kv, queries, unrotated, step, step.cache.plan.layers[layer], sinks)


@at_the_cache
def together(kv: LayerCache, *queries: Tensor) -> Tensor:
    """Queries `[B, H_q, Q, D]` of layers that read one `kv`, as those of one layer with larger groups."""
    by_head = [torch.unflatten(x, 1, (kv.held.heads, -1)) for x in queries]
    return torch.cat(by_head, 2).flatten(1, 2)


@at_the_cache
def sinks_together(kv: LayerCache, *sinks: Tensor) -> Tensor:
    """Sink logits `[H_q]` of layers that read one `kv`, in the order of `together`."""
    return torch.cat([torch.unflatten(x, 0, (kv.held.heads, -1)) for x in sinks], 1).flatten()


@at_the_cache
def attend(
    queries: Tensor,
    kv: LayerCache,
    step: Step,
    layer: int,
    expansion: Expansion | None = None,
    sinks: Tensor | None = None,
    chosen: Chosen | None = None,
) -> Tensor:
    """Attention of the new queries `[B, H_q, Q, D]` to what `kv` holds, or what of it is `chosen`: `[B, Q, H_q * D]`.

    Where `kv` holds latents, queries are absorbed ones and the `expansion` brings results back to heads of values.
    `sinks [H_q]`: what each query head has learned to weigh beside the entries (None: nothing).
    """
    if expansion is not None:
        return expansion.attended(queries, kv, step, layer, sinks, chosen)
    out = kv.attend(queries, step, layer, chosen, sinks)
    if out.shape[2] == 1:
        return out.reshape(out.shape[0], 1, -1)  # the same numbers, in one call
    return out.transpose(1, 2).flatten(2)


@at_the_cache
def recall(queries: Tensor, kv: LayerCache, step: Step, layer: int) -> Chosen | None:
    """The entries of each row that the queries `[B, H_q, Q, D]` of a layer read; None: all of them."""
    return kv.recall(queries, step, layer)


@at_the_cache
def index(kv: LayerCache, step: Step, layer: int) -> None:
    """Put entries that are no longer among the newest into groups."""
    kv.group_new(step)


@at_the_cache
def compress(kv: LayerCache, scores: selections.SequenceScores, step: Step, layer: int) -> None:
    """Drop what the layer's selection does not keep (nothing where none is due)."""
    selections.compress(step, {layer: scores})


@at_the_cache
def allocate(step: Step, layers: Sequence[int], *scores: selections.SequenceScores) -> None:
    """Split one budget over all the given layers by their scores, then drop what is not kept."""
    selections.compress(step, dict(zip(layers, scores, strict=True)))


@at_the_cache
def trim(kv: LayerCache, step: Step, layer: int) -> None:
    """Free what a sliding layer can never see again."""
    selections.trim(kv, step, step.cache.plan.layers[layer])


@at_the_cache
def flush(kv: LayerCache, step: Step, layer: int) -> None:
    """Encode the tokens that are older than the residual: after a selection, a prefill, or every few decoded tokens.

    Layers take turns, so that no token waits for all of them; a schedule by tokens decoded, not by how full a row is,
    encodes all rows in one go and does not depend on who else is in the batch.
    """
    s = kv.plan.selection
    schedule = Schedule() if s is None else s.schedule
    turn = not step.prefill and (step.tick + layer) % FLUSH == 0
    if (turn or step.due(schedule.decode_every, schedule.between_chunks)) and kv.flush(
        step.cache.headroom, step.prefill, step.concerned
    ):
        step.cache.encoded()


@at_the_cache
def prefetch(step: Step, layer: int) -> None:
    """Begin to bring an offloaded layer's store to the device, beside what is computed until its `fetch`.

    A layer that chooses what it reads leaves it where it is, and brings that alone.
    """
    step.cache.layers[layer].prefetch(step)


@at_the_cache
def fetch(step: Step, layer: int) -> None:
    """An offloaded layer's store is on the device from here on."""
    step.cache.layers[layer].fetch(step)


@at_the_cache
def to_host(step: Step, layer: int) -> None:
    """Put an offloaded layer's store into host memory until the next pass."""
    step.cache.layers[layer].to_host()


EFFECTS = (begin, states, kv_append, observe, recall, compress, allocate, trim, index, flush, prefetch, fetch, to_host)
for op in EFFECTS:
    has_side_effect(op)

NAMES: dict[Any, str] = {
    f: f.__name__ for f in (*EFFECTS, rope, halves, gated, frequencies, hadamard, together, attend)
}
