"""vLLM engines over served folders of the small real model, in this process, and what this project itself would say.

Imported only where vLLM is installed: `pytest.importorskip("vllm")` first.
"""

from __future__ import annotations

import os

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompile
from kvcompile.compiler import compile_plan
from kvcompile.plan.selection import Allocation
from kvcompile.serving.vllm.rules import PromptRule, rules

MODEL = Path(os.environ.get("KVCOMPILE_SERVED_MODEL", "~/.cache/kvcompile/SmolLM2-135M-Instruct")).expanduser()
ROOT = Path(__file__).resolve().parents[1]
BLOCK = 32
POLICIES = {
    "keydiff": ["policy=[keydiff]", "budget=0.25"],
    "knorm": ["policy=[knorm]", "budget=0.25"],
    "snapkv": ["policy=[snapkv]", "budget=0.25"],
    "dropkv": ["policy=[dropkv]", "budget=0.25"],
    "streaming": ["policy=[streaming]", "budget=0.25", "stack.streaming.decode_every=0"],
    "pyramidkv": ["policy=[pyramidkv]", "budget=0.25"],
    "expected_attention": ["policy=[expected_attention]", "budget=0.25"],
    "ghost": ["policy=[ghost]", "budget=0.25"],
    "h2o": ["policy=[h2o]", "budget=0.25", "stack.h2o.decode_every=0"],
}
COUNTING = ("expected_attention", "ghost", "h2o")  # scores of every query, without prefix caching
WHOLE = ["policy=[keydiff]", "budget=1.0"]

sys.path.insert(0, str(ROOT / "benchmarks"))
from serve_engine import FORCED, Forced  # noqa: E402 (a benchmark is no package)

FORCING = {"logits_processors": [Forced]}  # options of an engine; not with drafts


@dataclass(frozen=True)
class Whole(Allocation):
    """What vLLM keeps, for a compiled model: as many tokens as leave whole blocks free."""

    rule: PromptRule
    block: int

    def static(self, layer: int, layers: int, heads: int, budget: int, tokens: int, floor: int) -> tuple[int, ...]:
        return (self.rule.kept(tokens, self.block),) * heads


def require_model() -> None:
    """Skip where the small real model is not on disk."""
    if not (MODEL / "config.json").is_file():
        pytest.skip(f"no model in {MODEL}")


def loaded(dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)


def compiled(overrides: Sequence[str], load: Callable[[], Any] = loaded) -> Any:
    return kvcompile.compile(load(), overrides=[*overrides, "kernels=sdpa"], tokenizer=tokenizer())


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def export(overrides: Sequence[str], folder: Path, dtype: str = "float32") -> Path:
    """A served folder of the model."""
    model = kvcompile.compile(
        loaded(getattr(torch, dtype)), overrides=[*overrides, "kernels=sdpa"], tokenizer=tokenizer()
    )
    kvcompile.export(model, "vllm", folder, tokenizer=tokenizer())
    return folder


class Reference:
    """The compiled model of a stack that keeps what vLLM keeps, one prompt at a time."""

    def __init__(
        self, overrides: Sequence[str], classes: int = 3, block: int = BLOCK, load: Callable[[], Any] = loaded
    ) -> None:
        plan = compiled(overrides, load).kvcompile.plan
        by_layer = rules(plan, classes)

        def whole(p: Any) -> Any:
            rule = by_layer[p.index]
            return p if rule is None else replace(p, selection=replace(p.selection, allocation=Whole(rule, block)))

        self.model = compile_plan(load(), plan.map(whole), kernels="sdpa")
        self.model.generation_config.eos_token_id = None

    def __call__(self, ids: list[int], new: int) -> list[int]:
        prompt = torch.tensor([ids])
        mask = torch.ones_like(prompt)
        out = self.model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False)
        return [int(token) for token in out[0, len(ids) :]]


def prompts(count: int, words: int, start: int = 0, by: Any = None) -> list[list[int]]:
    """Questions about a passcode in a text of so many words, each another one. by: a tokenizer (None: the model's)."""
    text, t = (ROOT / "docs" / "policies.md").read_text("utf-8").split(), by or tokenizer()
    out = []
    for i in range(start, start + count):
        part = text[i * 97 : i * 97 + words]
        half = len(part) // 2
        secret = f"The secret passcode is {10000 + i * 1237}. Remember it."
        body = " ".join([*part[:half], secret, *part[half:]])
        question = [{"role": "user", "content": body + "\n\nWhat is the secret passcode?"}]
        out.append(
            t(
                t.apply_chat_template(question, add_generation_prompt=True, tokenize=False), add_special_tokens=False
            ).input_ids
        )
    return out


@dataclass
class Ran:
    """What an engine did: tokens by request, and by step (running, waiting, blocks in use)."""

    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    steps: list[tuple[int, int, int]] = field(default_factory=list)
    preempted: int = 0

    @property
    def peak(self) -> int:
        return max(step[2] for step in self.steps)


class Engine:
    """One engine in this process; `close` frees it."""

    def __init__(self, model: Path, **options: Any) -> None:
        from vllm import LLM

        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "block_size": BLOCK,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 2048,
            "disable_log_stats": True,
        }
        self.llm = LLM(model=str(model), **(defaults | options))
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.total = self.pool.get_num_free_blocks()

    def run(self, ids: Sequence[list[int]], new: int, abort: dict[int, int] | None = None, **sampling: Any) -> Ran:
        """All prompts at once. abort: prompts by the step before which they are aborted."""
        from vllm import SamplingParams

        engine, ran = self.llm.llm_engine, Ran()
        stock, names = self.scheduler._preempt_request, {}

        def counted(*args: Any, **kwargs: Any) -> Any:
            ran.preempted += 1
            return stock(*args, **kwargs)

        self.scheduler._preempt_request = counted
        options = {"temperature": 0, "max_tokens": new, "ignore_eos": True} | sampling
        for i, prompt in enumerate(ids):
            names[i] = engine.add_request(str(i), {"prompt_token_ids": prompt}, SamplingParams(**options)) or str(i)
        while engine.has_unfinished_requests():
            for i, step in (abort or {}).items():
                if step == len(ran.steps):
                    engine.abort_request([names[i]])
            for output in engine.step():
                if output.finished:
                    ran.tokens[output.request_id] = [list(o.token_ids) for o in output.outputs]
                    ran.cached[output.request_id] = output.num_cached_tokens
            used = self.total - self.pool.get_num_free_blocks()
            ran.steps.append((len(self.scheduler.running), len(self.scheduler.waiting), used))
        self.scheduler._preempt_request = stock
        return ran

    def log_probabilities(self, ids: Sequence[list[int]], answers: Sequence[list[int]]) -> torch.Tensor:
        """Logarithms of the probabilities of given answers, token by token, in one row; wants FORCING."""
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=0, max_tokens=len(a), ignore_eos=True, logprobs=0, extra_args={FORCED: a})
            for a in answers
        ]
        outputs = self.llm.generate([{"prompt_token_ids": i} for i in ids], params, use_tqdm=False)
        assert [list(o.outputs[0].token_ids) for o in outputs] == list(answers)
        rows = [
            [step[token].logprob for step, token in zip(o.outputs[0].logprobs, answer, strict=True)]
            for o, answer in zip(outputs, answers, strict=True)
        ]
        return torch.tensor(rows).flatten()

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        del self.llm, self.scheduler, self.pool
        gc.collect()
        cleanup_dist_env_and_memory()


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Engine]:
    """An engine that is closed at the end."""
    running = Engine(folder, **options)
    try:
        yield running
    finally:
        running.close()


def words(ran: Ran) -> list[list[int]]:
    """The first answer to each prompt, in order."""
    return [ran.tokens[str(i)][0] for i in range(len(ran.tokens))]
