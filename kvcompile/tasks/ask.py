"""A stack at work is asked a sample: what it says over the cache that it has made, and the bytes of that cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kvcompile.analysis.compare.contest import Runner, stop_tokens
from kvcompile.runtime.cache import KVCache
from kvcompile.stores import factory
from kvcompile.stores.base import POSITION_TYPE
from kvcompile.tasks.base import Question, Sample, Task, Turn
from kvcompile.tasks.rows import Record, Size

BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class Respondent:
    """A recipe at work that answers, greedily.

    Attributes:
        runner: its model, and what reads prompts for it.
        tokenizer: of the model.
        stop: tokens that end an answer.
    """

    runner: Runner
    tokenizer: Any
    stop: frozenset[int]

    @torch.inference_mode()
    def ask(self, task: Task, sample: Sample, question: Question) -> list[Record]:
        """What it makes of a sample: a record for each turn, or one of the text that follows.

        hidden: the cache is made of the context alone, and a turn then comes as that of a chat does, in one piece.
        seen: the cache is made of the context and a turn, but for its last token, which a step reads. So every token of
        an answer is predicted over the compressed cache.
        Chained turns share one cache with their answers; of those only the first can be seen.
        """
        context = sample.context
        if sample.rest:
            cache = self.runner.cache(context, len(context))
            size = self._size(cache, context)
            return [Record(sample.name, sample.part, None, size, nll=self._losses(cache, sample.rest))]
        if sample.chained:
            return list(self._chained(task, sample, question))
        if question == "hidden":
            cache = self.runner.cache(context, len(context))
            size, records = self._size(cache, context), []
            for i, turn in enumerate(sample.turns):
                copy = cache.fork() if i + 1 < len(sample.turns) else cache
                said = self._answer(copy, self.runner.read(copy, turn.ids, 1)[-1], turn)
                records.append(self._record(task, sample, i, said, size))
            return records
        records = []
        for i, turn in enumerate(sample.turns):
            _, size, said = self._seen(context, turn, shared=len(context))
            records.append(self._record(task, sample, i, said, size))
        return records

    def _seen(self, context: Sequence[int], turn: Turn, shared: int = 0) -> tuple[KVCache, Size, str]:
        ids = (*context, *turn.ids)
        cache = self.runner.cache(ids[:-1], shared)
        size = self._size(cache, ids[:-1])
        return cache, size, self._answer(cache, self.runner.step(cache, ids[-1]), turn)

    def _chained(self, task: Task, sample: Sample, question: Question) -> Iterator[Record]:
        turns = list(enumerate(sample.turns))
        if question == "seen":
            cache, size, text = self._seen(sample.context, turns.pop(0)[1])
            yield self._record(task, sample, 0, text, size)
        else:
            cache = self.runner.cache(sample.context, len(sample.context))
            size = self._size(cache, sample.context)
        for i, turn in turns:
            text = self._answer(cache, self.runner.read(cache, turn.ids, 1)[-1], turn)
            yield self._record(task, sample, i, text, size)

    def _answer(self, cache: KVCache, logits: Tensor, turn: Turn) -> str:
        """The answer as text; of it the cache has read all but what ended it."""
        said: list[int] = []
        while len(said) < turn.tokens and (token := int(logits.argmax())) not in self.stop:
            said.append(token)
            if len(said) < turn.tokens:
                logits = self.runner.step(cache, token)
        return str(self.tokenizer.decode(said, skip_special_tokens=True))

    def _losses(self, cache: KVCache, rest: Sequence[int]) -> float:
        """Mean negative log-likelihood in nats of `rest` but the first, token by token as generation reads."""
        losses = []
        for token, wanted in itertools.pairwise(rest):
            logits = self.runner.step(cache, token)
            target = torch.tensor(wanted, dtype=torch.int64, device=logits.device)
            losses.append(cross_entropy(logits.float(), target))
        return float(torch.stack(losses).double().mean())

    def _record(self, task: Task, sample: Sample, number: int, said: str, size: Size) -> Record:
        turn = sample.turns[number]
        return Record(sample.name, task.part(sample, number), number, size, said, task.score(said, turn, sample))

    def _size(self, cache: KVCache, read: Sequence[int]) -> Size:
        """Bytes held after `read`, true positions of the entries apart, and those of the uncompressed cache."""
        entries, held16 = 0, cache.index_bytes()
        for p, layer in zip(cache.plan.layers, cache.layers, strict=True):
            if layer.store is not None:
                lengths, lows = layer.store.lengths, factory.low(layer.store)
                entries += sum(lengths)
                held16 += sum(p.nbytes(n, BFLOAT16, low) for n, low in zip(lengths, lows, strict=True))
        whole = self.runner.plan.bytes(1, len(read))
        whole16 = replace(self.runner.plan, dtype=BFLOAT16).bytes(1, len(read))
        return Size(
            tokens=len(read),
            held=cache.nbytes() + cache.index_bytes(),
            held16=held16,
            positions=entries * POSITION_TYPE.itemsize,
            dense=sum(layer.dense_bytes for layer in whole),
            dense16=sum(layer.dense_bytes for layer in whole16),
        )


def respondent(runner: Runner, tokenizer: Any) -> Respondent:
    """A recipe at work that stops where its model or its tokenizer says."""
    return Respondent(runner, tokenizer, stop_tokens(runner.model, tokenizer))
