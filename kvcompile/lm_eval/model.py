"""EleutherAI's lm_eval over a compressed cache: its model class `kvcompile`, and its command line with that known."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from kvcompile.errors import KvcompileError
from kvcompile.evaluation.perplexity import cached_log_likelihoods

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise KvcompileError(
        "kvcompile.lm_eval needs lm_eval", f"no module {error.name}", "pip install 'kvcompile[lm_eval]'"
    ) from error

log = logging.getLogger(__name__)
Tokens = list[int]
Request = tuple[Any, Tokens, Tokens]  # (texts, or None; context; continuation)


@register_model("kvcompile")
class CompiledLM(HFLM):  # type: ignore[misc]
    """lm_eval's `HFLM` with every log-likelihood read through the compressed cache.

    Log-likelihoods: the context is compressed but for its last token, which a decode step reads; continuations of one
    context share its cache. Rolling: the first `rolling_context` tokens of a text, which nothing has been dropped
    before, are scored in one pass; each later piece token by token over the compressed cache of as many tokens
    before it. Generation is `HFLM`'s, by `model.generate`.

    Args:
        model: a compiled model, or any causal LM of transformers, such as the uncompressed one to compare with.
        tokenizer: of the model.
        path: folder of an artifact, or its id on the hub, in the place of both.
        device, dtype: of what is opened from `path` (see `kvcompile.load`).
        rolling_context: tokens that each piece of a rolling task is read after.
        options: what `HFLM` takes, such as `batch_size` and `max_length`.

    Raises:
        KvcompileError: where neither a model and its tokenizer nor a path is given, or both.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        path: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        rolling_context: int = 512,
        **options: Any,
    ) -> None:
        parts = {"path": path, "model": model, "tokenizer": tokenizer}
        given = [name for name, value in parts.items() if value is not None]
        if given not in (["path"], ["model", "tokenizer"]):
            got = " and ".join(given) or "none of them"
            raise KvcompileError(
                "kvcompile in lm_eval takes a path, or a model and its tokenizer", got, "path=<artifact>"
            )
        if path is not None:
            model, tokenizer = _opened(path, device, dtype)
        if rolling_context < 1:
            raise KvcompileError("rolling_context must be 1 or more", rolling_context)
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        self.rolling_context = rolling_context

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(nats, greedy) of each request; a context is read once, and then `batch_size` continuations at a time."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            room = max(1, self.max_length + 1 - len(continuation))  # the last token is predicted, not read
            by_context.setdefault(tuple(context[-room:]), []).append(number)
        batch = None if self.batch_size == "auto" else int(self.batch_size)
        scores: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Log-likelihoods over the cache") as bar:
            for prompt, numbers in by_context.items():
                ends = [torch.tensor(requests[number][2], dtype=torch.int64, device="cpu") for number in numbers]
                context_ids = torch.tensor(prompt, dtype=torch.int64, device="cpu")
                scores |= zip(numbers, cached_log_likelihoods(self.model, context_ids, ends, batch), strict=True)
                bar.update(len(numbers))
        for number, (texts, _, _) in enumerate(requests):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, scores[number])
        return [scores[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts: each but its beginning is read over compressed caches, piece by piece."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        length = min(self.rolling_context, self.max_length // 2)
        first = [(number, (None, [self.prefix_token_id], text[:length])) for number, text in enumerate(texts) if text]
        later = [
            (number, (None, text[start - length : start], text[start : start + length]))
            for number, text in enumerate(texts)
            for start in range(length, len(text), length)
        ]
        _tell_rolling(sum(map(len, texts)), sum(len(tokens) for _, (_, _, tokens) in later), length)
        totals = [0.0] * len(texts)
        for read, pieces in ((super()._loglikelihood_tokens, first), (self._loglikelihood_tokens, later)):
            scores = read([piece for _, piece in pieces], disable_tqdm)
            for (number, _), (nats, _) in zip(pieces, scores, strict=True):
                totals[number] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals


def _tell_rolling(tokens: int, compressed: int, length: int) -> None:
    """Say which part of the texts is read over a compressed cache."""
    if compressed:
        log.info("rolling: %d of %d tokens are read over the compressed cache of %d tokens", compressed, tokens, length)
    else:
        log.warning("rolling: no text is longer than rolling_context=%d, so nothing compressed is read", length)


def _opened(path: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """The model of an artifact, on the accelerator if there is one and no other device is named, and its tokenizer."""
    from transformers import AutoTokenizer

    from kvcompile.artifact.artifact import load

    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        device = None  # lm_eval's command line says cuda:0 where its user says nothing
    model = load(path, device, dtype, device_map="auto" if device is None else None)
    return model, AutoTokenizer.from_pretrained(path)


def main(arguments: Sequence[str]) -> None:
    """`kvcompile lm_eval ...`: lm_eval's own command line, which finds no models of other packages by itself."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
