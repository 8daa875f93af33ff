"""One engine of vLLM, for `serve_vllm.py`: reads what to run from a file, runs it in this process, writes what it saw.

    python benchmarks/serve_engine.py SPEC.json OUT.json

SPEC: model, options (of `LLM`), seen (prompts), hidden (pairs of context and question), new and answer (tokens).
A request whose question is hidden has the context as its prompt, which is compacted when it ends. The tokens of the
question come behind it as the first tokens of the answer, whatever the model would have said: each is read by a decode
step over what stayed, as a question of a later turn is.
"""

from __future__ import annotations

import os

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED = "forced"
WARM_UP = 300  # tokens of a prompt that is read before anything is timed


class Forced(AdapterLogitsProcessor):
    """The first tokens of an answer are those that the request asks for."""

    def is_argmax_invariant(self) -> bool:
        """It changes the greedy token."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        """None: the request asks for none."""
        wanted = (params.extra_args or {}).get(FORCED)
        return None if wanted is None else lambda output, logits: _forced(wanted, output, logits)


def _forced(wanted: Sequence[int], output: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
    if len(output) >= len(wanted):
        return logits
    only = torch.full_like(logits, -float("inf"))
    only[wanted[len(output)]] = 0.0
    return only


class Watched:
    """An engine, and what it does."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.llm = LLM(model=model, logits_processors=[Forced], disable_log_stats=True, **options)
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.blocks = self.pool.get_num_free_blocks()
        self.preempted = 0
        stock = self.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return stock(*args, **kwargs)

        self.scheduler._preempt_request = counted

    def run(self, prompts: Sequence[list[int]], new: Sequence[int], forced: Sequence[list[int]] = ()) -> dict[str, Any]:
        """All prompts at once, none of them seen before, with `new` tokens each."""
        self.llm.reset_prefix_cache()
        self.preempted, start = 0, time.perf_counter()
        first, tokens, steps, place = {}, {}, [], {}
        for i, (prompt, count) in enumerate(zip(prompts, new, strict=True)):
            extra = {FORCED: forced[i]} if forced else None
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, extra_args=extra)
            place[self.engine.add_request(str(i), {"prompt_token_ids": prompt}, params) or str(i)] = i
            place[str(i)] = i
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                i, said = place[output.request_id], list(output.outputs[0].token_ids)
                if said:
                    first.setdefault(i, now)
                if output.finished:
                    tokens[i] = said
            steps.append((len(self.scheduler.running), self.blocks - self.pool.get_num_free_blocks()))
        return {
            "seconds": time.perf_counter() - start,
            "first": [first[i] for i in range(len(prompts))],
            "tokens": [tokens[i] for i in range(len(prompts))],
            "steps": len(steps),
            "most": max(step[0] for step in steps),
            "mean": statistics.mean(step[0] for step in steps),
            "peak": max(step[1] for step in steps),
            "preempted": self.preempted,
            "left": self.blocks - self.pool.get_num_free_blocks(),
        }


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """What one engine did: alone (one prompt, one token, the faster of two times), seen, hidden if asked for."""
    watched = Watched(spec["model"], spec["options"])
    longest = max(spec["seen"], key=len)
    watched.run([longest[-WARM_UP:]], [4])
    alone = min((watched.run([longest], [1]) for _ in range(2)), key=lambda ran: ran["seconds"])
    found = {"blocks": watched.blocks, "alone": alone}
    found["seen"] = watched.run(spec["seen"], [spec["new"]] * len(spec["seen"]))
    if spec["hidden"]:
        contexts, questions = zip(*spec["hidden"], strict=True)
        found["hidden"] = watched.run(contexts, [len(q) + spec["answer"] for q in questions], questions)
        found["hidden"]["tokens"] = [
            said[len(q) :] for said, q in zip(found["hidden"]["tokens"], questions, strict=True)
        ]
    return found


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(run(json.loads(source.read_text(encoding="utf-8")))), encoding="utf-8")
