"""Perplexity and log-likelihood of text read through the cache: prefill, then one token at a time, as in generation."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.progress import Progress, silent


def cached_perplexity(
    model: Any, ids: Tensor, context: int, tokens: int, windows: int = 1, progress: Progress = silent
) -> float:
    """Perplexity of text read through the cache, as generation reads it: a context, then one token at a time.

        exp( mean over windows and i of -log p(x[c+i+1] | cache of x[:c], x[c:c+i+1]) ),  c = context, i = 0..tokens-1

    One forward over a whole text never reads a compressed cache; this does for every scored token. The first token
    after the context is fed, not scored: prefill predicts it before anything is dropped.

    Args:
        model: a compiled model, or any causal LM of transformers.
        ids: the text, `[T]` or `[1, T]`.
        context: tokens of each window that are read before scoring begins.
        tokens: tokens of each window that are scored.
        windows: how many windows of `context + tokens + 1` tokens are spread evenly over the text, as one batch.
        progress: called with what is done and how far it is.

    Returns:
        The perplexity over all windows.

    Raises:
        KvcompileError: if the text is too short for one window.

    Examples:
        >>> from kvcompile.evaluation.perplexity import cached_perplexity
        >>> dense = cached_perplexity(model, ids, context=60, tokens=32)
        >>> small = cached_perplexity(kvcompile.compile(model, recipe="streaming"), ids, context=60, tokens=32)
        >>> small == dense  # what was dropped is missed
        False
    """
    return of_windows(model, spread(ids, context, tokens, windows), context, progress)


def of_windows(model: Any, rows: Tensor, context: int, progress: Progress = silent) -> float:
    """`cached_perplexity` of windows `[windows, context + tokens + 1]` (see `spread`)."""
    return math.exp(_losses(model, rows.to(model.device), context, progress).mean().item())


@torch.inference_mode()
def cached_log_likelihood(model: Any, context: Tensor, continuation: Tensor) -> tuple[float, bool]:
    """Log-likelihood of a continuation read through the cache, as benchmarks of multiple choice need it.

        sum over i of log p(y[i] | cache of x[:-1], x[-1], y[:i]),  x = context, y = continuation

    The prompt is compressed one token before its end, so that each token of the continuation, the first one too, is
    predicted by a query over the compressed cache.

    Args:
        model: a compiled model, or any causal LM of transformers.
        context: token ids `[n]`, at least one. A single token leaves nothing to compress.
        continuation: token ids `[m]`, at least one.

    Returns:
        The log-likelihood in nats, and whether greedy decoding gives this continuation.

    Raises:
        KvcompileError: if one of them is empty.

    Examples:
        >>> from kvcompile.evaluation.perplexity import cached_log_likelihood
        >>> model = kvcompile.compile(model, recipe="streaming")
        >>> nats, greedy = cached_log_likelihood(model, ids[0, :90], ids[0, 90:])
        >>> nats < 0, greedy
        (True, False)
    """
    context, continuation = (ids.reshape(1, -1).to(model.device) for ids in (context, continuation))
    if not context.numel() or not continuation.numel():
        raise KvcompileError(
            "context and continuation must hold a token each",
            f"{context.numel()} and {continuation.numel()}",
            "give an empty context the token that texts begin with",
        )
    cache = forward(model, context[:, :-1])[1] if context.numel() > 1 else None
    total, greedy, token = 0.0, True, context[:, -1:]
    for target in continuation[0]:
        logits, cache = forward(model, token, cache)
        total += float(logits[0].float().log_softmax(-1)[target])
        greedy = greedy and int(logits[0].argmax()) == int(target)
        token = target.reshape(1, 1)
    return total, greedy


def spread(ids: Tensor, context: int, tokens: int, windows: int) -> Tensor:
    """The windows `[windows, context + tokens + 1]` of `cached_perplexity`. Raises KvcompileError as it does."""
    ids, width = ids.reshape(-1), context + tokens + 1
    if context < 1 or tokens < 1 or windows < 1:
        raise KvcompileError("context, tokens and windows must be 1 or more", (context, tokens, windows))
    if len(ids) < width:
        raise KvcompileError("the text must hold context + tokens + 1 tokens", len(ids), f"{width} tokens or more")
    step = (len(ids) - width) // max(1, windows - 1)
    return torch.stack([ids[i * step : i * step + width] for i in range(windows)])


def forward(model: Any, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits `[B, vocabulary]` after the last of `ids [B, Q]`, and the cache; None lets the model make its own."""
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, **keep)
    return out.logits[:, -1], out.past_key_values


@torch.inference_mode()
def _losses(model: Any, ids: Tensor, context: int, progress: Progress) -> Tensor:
    """Negative log likelihoods, float32 `[tokens, B]`, of `ids[:, context + 1:]`."""
    _, cache = forward(model, ids[:, :context])
    losses, last = [], ids.shape[1] - 1
    for i in range(context, last):
        progress("perplexity", i - context, last - context)
        logits, cache = forward(model, ids[:, i : i + 1], cache)
        losses.append(F.cross_entropy(logits.float(), ids[:, i + 1], reduction="none"))
    progress("perplexity", 1, 1)
    return torch.stack(losses)
