"""Recipes side by side: each answers a prompt over the cache that it leaves, by steps of its own graph."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompile.adapters.architectures import describe
from kvcompile.analysis.compare.branching import Branching, Room
from kvcompile.analysis.compare.entry import Entry, Question
from kvcompile.build import identity_plan, plan_of
from kvcompile.calibration.probe import Remembering
from kvcompile.compiler import assemble, compile_plan
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import DTYPE_BYTES, Plan, centred, converts
from kvcompile.progress import Progress, silent
from kvcompile.runtime.cache import KVCache
from kvcompile.stack import plan_stack

GIB = 1 << 30
FREE = 1 / 3  # of the memory that is free, for prefills, where nothing is said


@dataclass(frozen=True)
class Runner:
    """A recipe at work: its plan, the model that runs its steps, and what reads prompts for it.

    reader: None where the recipe reads prompts in a way of its own.
    """

    plan: Plan
    model: Any
    reader: Branching | None

    @torch.no_grad()
    def cache(self, ids: Sequence[int], shared: int = 0) -> KVCache:
        """What it holds after a prompt. shared: so many of its first tokens begin other prompts too."""
        if self.reader is not None:
            self.reader.read(ids, shared)
            return self.reader.branch(self.plan)
        cache: KVCache = self.model(_row(ids, self.model.device), logits_to_keep=1).past_key_values
        return cache

    def step(self, cache: KVCache, *tokens: int) -> Tensor:
        """Logits `[vocabulary]` after one more token, or more of them read as one piece."""
        return self.read(cache, tokens, 1)[-1]

    @torch.no_grad()
    def read(self, cache: KVCache, tokens: Sequence[int], keep: int = 0) -> Tensor:
        """Logits `[keep, vocabulary]` after the last of more tokens, read as one piece (0: after each of them)."""
        logits: Tensor = self.model(_row(tokens, self.model.device), past_key_values=cache, logits_to_keep=keep).logits
        return logits[0]


class Contest:
    """One original model and any recipes over it; those that leave its weights alone share one prefill of a prompt.

    room: of how many beginnings of prompts the prefill stays in memory (`Branching`), those of other bases counted too.
    """

    def __init__(
        self, model: Any, tokenizer: Any, kernels: str = "auto", progress: Progress = silent, room: int = 1
    ) -> None:
        self.model, self.tokenizer, self.kernels, self.progress = model, tokenizer, kernels, progress
        self.room = Room(room)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.dense = describe(model.config, self.dtype)
        self.stop = stop_tokens(model, tokenizer)
        self._calibrator = Remembering(model, tokenizer, progress)
        self._readers: dict[tuple[bool, int], Branching] = {}
        self._runners: dict[Entry, Runner] = {}

    def require_possible(self, entries: Iterable[Entry]) -> None:
        """Raise KvcompileError for a recipe that cannot be on this model, before anything is measured."""
        for entry in entries:
            config = entry.config(self.kernels)
            stack = plan_stack(identity_plan(self.model.config, self.dtype, config), config.policies())
            for policy in stack.policies:
                policy.require_calibratable(self.tokenizer)

    def runner(self, entry: Entry) -> Runner:
        """The recipe at work; it is built, and calibrated where it asks for that, when it is first wanted."""
        if entry not in self._runners:
            self._runners[entry] = self._built(entry)
        return self._runners[entry]

    def forget(self, entry: Entry) -> None:
        """Let a recipe's model go, where it was built."""
        self._runners.pop(entry, None)

    @torch.inference_mode()
    def answer(self, entry: Entry, ids: Sequence[int], read: int, count: int) -> dict[str, Any]:
        """What a recipe answers to a prompt of which it reads the first `read` tokens at once, and the rest in steps.

        Every token of the answer is so predicted by a step over the recipe's own cache.

        Args:
            entry: the recipe.
            ids: the prompt, its last token at least is left to a step.
            read: how many tokens come before the recipe makes its cache.
            count: tokens to answer with, at most; an end token ends it before.

        Returns:
            `text`; bytes after the prompt, `held` (index and host memory included) and of the uncompressed cache
            (`dense`); bytes that the first step reads, `read`, and of the uncompressed cache (`dense_read`).
        """
        runner = self.runner(entry)
        cache = runner.cache(ids[:read])
        held, cache.reads = cache.nbytes() + cache.index_bytes(), {}
        logits = runner.step(cache, ids[read])
        step_reads, cache.reads = sum(cache.reads.values()), None
        for token in ids[read + 1 :]:
            logits = runner.step(cache, token)
        said = [int(logits.argmax())]
        while said[-1] not in self.stop and len(said) < count:
            said.append(int(runner.step(cache, said[-1]).argmax()))
        layers = self.dense.bytes(1, read)
        return {
            "text": self.tokenizer.decode([token for token in said if token not in self.stop]),
            "held": held,
            "read": step_reads,
            "dense": sum(layer.dense_bytes for layer in layers),
            "dense_read": sum(layer.dense_read for layer in layers),
        }

    def _built(self, entry: Entry) -> Runner:
        config = entry.config(self.kernels)
        stack = plan_stack(identity_plan(self.model.config, self.dtype, config), config.policies())
        if converts(stack.plan):
            own = assemble(copy.deepcopy(self.model), config, self.tokenizer, self.progress, stack=stack)
            return Runner(own.kvcompile.plan, own, None)
        self._calibrator.stored = stack.plan
        policies = tuple(policy.calibrated(self._calibrator) for policy in stack.policies)
        plan = plan_of(self.model.config, self.dtype, config, policies)
        reader = self._reader(any(p.storage.rotated for p in plan.layers), centred(plan))
        model = compile_plan(shared(self.model), plan, config.kernels, self.tokenizer)
        return Runner(plan, model, reader if reader.serves(plan) else None)

    def _reader(self, rotated: bool, centred: int) -> Branching:
        if (rotated, centred) not in self._readers:
            reader = Branching(
                self.model,
                rotated=rotated,
                centred=centred,
                kernels=self.kernels,
                room=self.room,
                tokenizer=self.tokenizer,
            )
            self._readers[rotated, centred] = reader
        return self._readers[rotated, centred]


def room(architecture: Any, dtype: str, tokens: int, memory: float | None) -> int:
    """How many contexts of so many tokens `memory` GiB hold: keys, values and queries. At least one.

    None: a third of the memory that is free.
    """
    import psutil

    free = psutil.virtual_memory().available * FREE if memory is None else memory * GIB
    layers = describe(architecture, dtype).layers
    numbers = sum(p.head_dim * (p.kv_heads + p.query_heads) + p.value_dim * p.kv_heads for p in layers)
    return max(1, int(free / (numbers * tokens * DTYPE_BYTES[dtype])))


def tokens_read(ids: Sequence[int], context: int, question: Question) -> int:
    """How many tokens come before the cache is made: all but the last (seen), or those before the question (hidden)."""
    return context if question == "hidden" else len(ids) - 1


def _row(ids: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([list(ids)], dtype=torch.int64, device=device)


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """What ends an answer: the end tokens of the model's generation settings, and of its tokenizer."""
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    every = [*(ends if isinstance(ends, (list, tuple)) else [ends]), getattr(tokenizer, "eos_token_id", None)]
    return frozenset(int(token) for token in every if token is not None)
