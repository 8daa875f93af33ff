"""Perplexity and log-likelihood of text read through the cache: prefill, then one token at a time, as in generation."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    return cached_log_likelihoods(model, context, [continuation])[0]


@torch.inference_mode()
def cached_log_likelihoods(
    model: Any, context: Tensor, continuations: Sequence[Tensor], batch: int | None = None
) -> list[tuple[float, bool]]:
    """`cached_log_likelihood` of several continuations of one context, which is read once.

    Args:
        model: a compiled model, or any causal LM of transformers.
        context: token ids `[n]`, at least one.
        continuations: token ids `[m]` of each, at least one.
        batch: how many continuations are read at once, each over its copy of the cache (None: all).

    Returns:
        For each continuation the log-likelihood in nats, and whether greedy decoding gives it.

    Raises:
        KvcompileError: if the context or a continuation is empty.
    """
    context = context.reshape(1, -1).to(model.device)
    continuations = [ids.reshape(-1).to(model.device) for ids in continuations]
    shortest = min(map(len, continuations))
    if not context.numel() or not shortest:
        raise KvcompileError(
            "context and continuation must hold a token each",
            f"{context.numel()} and {shortest}",
            "give an empty context the token that texts begin with",
        )
    cache = forward(model, context[:, :-1])[1] if context.numel() > 1 else None
    logits, cache = forward(model, context[:, -1:], cache)  # predicts the first token of every continuation
    nats, likeliest = logits[0].float().log_softmax(-1), int(logits[0].argmax())
    scores = [(float(nats[ids[0]]), int(ids[0]) == likeliest) for ids in continuations]
    longer = [n for n, ids in enumerate(continuations) if len(ids) > 1]
    size = batch or len(continuations)
    for start in range(0, len(longer), size):
        numbers = longer[start : start + size]
        own = copy.deepcopy(cache) if start + size < len(longer) else cache
        for n, (more, greedy) in zip(numbers, _read_on(model, own, [continuations[n] for n in numbers]), strict=True):
            scores[n] = scores[n][0] + more, scores[n][1] and greedy
    return scores


def _read_on(model: Any, cache: Any, continuations: Sequence[Tensor]) -> list[tuple[float, bool]]:
    """Scores of all but the first token of each continuation, read as one batch over a cache of one sequence."""
    rows = pad_sequence(list(continuations), batch_first=True)
    if len(rows) > 1:
        cache.batch_repeat_interleave(len(rows))
    nats = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    greedy = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    lengths = torch.tensor([len(ids) for ids in continuations], dtype=torch.int64, device=rows.device)
    for i in range(1, rows.shape[1]):
        logits, cache = forward(model, rows[:, i - 1 : i], cache)
        target, over = rows[:, i], lengths <= i  # rows that are over read on, and are not scored
        nats += logits.float().log_softmax(-1).gather(1, target.unsqueeze(1))[:, 0].double().masked_fill(over, 0)
        greedy &= (logits.argmax(-1) == target) | over
    return list(zip(nats.tolist(), greedy.tolist(), strict=True))


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
