"""Answers that a recipe is made to give: whether it would have, and how likely they are over the cache that it left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kvcompile.analysis.compare.contest import Runner
from kvcompile.runtime.cache import KVCache


@dataclass(frozen=True)
class Forced:
    """exact: greedy decoding gives this answer. nll: mean negative log-likelihood of its tokens, in nats."""

    exact: bool
    nll: float


def forced(
    runner: Runner, cache: KVCache, question: Sequence[int], answer: Sequence[int], together: bool = False
) -> Forced:
    """Read a question into a cache, then an answer token by token of which each is given, whatever was predicted.

    Every token of the answer is predicted over the cache that the recipe has left.

    Args:
        runner: the recipe.
        cache: what it holds; it is read on.
        question: at least one token.
        answer: at least one token.
        together: read both as one piece, so that nothing is dropped between them. Else the question is a prompt of
            its own, as the next turn of a chat is, and the recipe compresses after it.
    """
    if together:
        logits = runner.read(cache, [*question, *answer[:-1]], len(answer))
    else:
        logits = runner.read(cache, question, 1)
        if len(answer) > 1:
            logits = torch.cat([logits, runner.read(cache, answer[:-1], len(answer) - 1)])
    wanted = torch.tensor(answer, dtype=torch.int64, device=logits.device)
    return Forced(bool((logits.argmax(-1) == wanted).all()), float(_losses(logits, wanted).mean()))


def continued(runner: Runner, cache: KVCache, ids: Sequence[int]) -> float:
    """Mean negative log-likelihood in nats of `ids` but the first, read as one piece after a context.

    The first token is fed, not scored: the prefill predicts it before anything is dropped.
    """
    logits = runner.read(cache, ids[:-1], len(ids) - 1)
    return float(_losses(logits, torch.tensor(ids[1:], dtype=torch.int64, device=logits.device)).mean())


def _losses(logits: Tensor, wanted: Tensor) -> Tensor:
    return cross_entropy(logits.float(), wanted, reduction="none")
