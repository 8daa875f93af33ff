"""vLLM's scheduler and block pool under random requests, without a model: no block lost, shared wrongly, freed twice.

A shadow cache plays the worker. Each slot remembers what a kernel would have written there: a token with all tokens
before it, or the entry of a compacted prompt. Each step reads what attention would read, and finds it or fails.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

import kvcompile

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
pytestmark = pytest.mark.filterwarnings("ignore")

BLOCK = 16
STACKS = {
    "keydiff": ["policy=[keydiff]", "budget=0.25"],
    "snapkv": ["policy=[snapkv]", "budget=0.1", "stack.snapkv.window=12"],
    "pyramidkv": ["policy=[pyramidkv]", "budget=0.25"],
    "whole": ["policy=[knorm]", "budget=1.0"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("served")
    for name, overrides in STACKS.items():
        model = kvcompile.compile(tiny_model(num_hidden_layers=6), overrides=[*overrides, "kernels=sdpa"])
        kvcompile.export(model, "vllm", place / name)
    return {name: place / name for name in STACKS}


def scheduler(folder: Path, blocks: int, step: int) -> Any:
    """vLLM's scheduler over a served folder with so many blocks, as the engine core makes it."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from kvcompile.serving.vllm.plugin import PLAN
    from kvcompile.serving.vllm.scheduler import SplitScheduler
    from kvcompile.serving.vllm.spec import KeptSpec

    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=512,
        block_size=BLOCK,
        max_num_seqs=8,
        max_num_batched_tokens=step,
        enable_prefix_caching=True,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = blocks
    init_none_hash(get_hash_fn_by_name("sha256"))
    rules = dict.fromkeys(getattr(config.model_config.hf_config, PLAN).rules)
    specs = [
        KeptSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32, rule=rule, granularity=BLOCK)
        for rule in rules
    ]
    groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)]
    return SplitScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks, [], groups),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
        log_stats=False,
    )


class Shadow:
    """What the slots of one group's blocks hold, and what each step must find in them."""

    def __init__(self, manager: Any) -> None:
        self.manager, self.slots = manager, {}

    def step(self, request: Any, start: int, count: int) -> None:
        rule, n, tokens = self.manager.kv_cache_spec.rule, request.num_prompt_tokens, request.all_token_ids
        blocks = [b.block_id for b in self.manager.req_to_blocks[request.request_id]]
        gap, end = rule.gap(n, BLOCK), start + count

        def slot(at: int) -> int:
            return blocks[at // BLOCK] * BLOCK + at % BLOCK

        for at in range(start, end):
            self.slots[slot(at)] = tuple(tokens[: at + 1])
        shrunk = gap and start >= n
        for at in range(gap * BLOCK if shrunk else 0, end):
            entry = ("kept", request.request_id) if shrunk and at < n else tuple(tokens[: at + 1])
            assert self.slots[slot(at)] == entry, (request.request_id, at, start, n)
        if gap and start < n <= end:
            assert end == n  # no token of the answer has seen the whole prompt
            assert count >= min(rule.last_chunk, n)
            for at in range(gap * BLOCK, n):
                self.slots[slot(at)] = "kept", request.request_id


def owned(s: Any) -> Counter[int]:
    """How often each block is in a request's row."""
    managers = s.kv_cache_manager.coordinator.single_type_managers
    rows = [row for manager in managers for row in manager.req_to_blocks.values()]
    return Counter(block.block_id for row in rows for block in row if not block.is_null)


def check(s: Any) -> None:
    """Blocks count the rows that they are in, and those in none are free."""
    pool, rows = s.kv_cache_manager.block_pool, owned(s)
    free = {block.block_id for block in pool.free_block_queue.get_all_free_blocks()}
    assert len(free) == pool.get_num_free_blocks()
    for block in pool.blocks:
        if not block.is_null:
            assert block.ref_cnt == rows[block.block_id]
            assert (block.block_id in free) == (block.ref_cnt == 0)


def request(name: str, prompt: list[int], new: int) -> Any:
    """One request, as the engine core makes it."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    hasher = get_request_block_hasher(BLOCK, get_hash_fn_by_name("sha256"))
    sampling = SamplingParams(max_tokens=new, ignore_eos=True)
    return Request(name, prompt, sampling, None, block_hasher=hasher)


def drive(s: Any, count: int, seed: int) -> dict[str, int]:
    """So many random requests, some with a common start, some aborted, in a pool that makes some wait or start over."""
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import RequestStatus

    draw = random.Random(seed)
    shadows = [Shadow(m) for m in s.kv_cache_manager.coordinator.single_type_managers]
    starts = [[draw.randrange(1000) for _ in range(240)] for _ in range(2)]
    seen = Counter[str]()
    waiting = [
        request(
            str(i),
            draw.choice(starts)[: draw.randrange(100, 240)]
            + [draw.randrange(1000) for _ in range(draw.randint(1, draw.choice([8, 150])))],
            draw.randint(1, 110),
        )
        for i in range(count)
    ]
    live: dict[str, Any] = {}
    begun: set[str] = set()
    while waiting or s.has_unfinished_requests():
        for _ in range(draw.randrange(3) if waiting else 0):
            if waiting and len(live) < 20:
                coming = waiting.pop()
                live[coming.request_id] = coming
                s.add_request(coming)
        if live and draw.random() < 0.03:
            gone = draw.choice(list(live))
            s.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
            del live[gone]
            seen["aborted"] += 1
        before = {i: r.num_preemptions for i, r in live.items()}
        out = s.schedule()
        seen["preempted"] += sum(r.num_preemptions - before[i] for i, r in live.items())
        check(s)
        scheduled = out.num_scheduled_tokens
        sampled = []
        for i, new in scheduled.items():
            start = live[i].num_computed_tokens - new  # `schedule` counts them already
            seen["hits"] += i not in begun and start > 0
            begun.add(i)
            for shadow in shadows:
                shadow.step(live[i], start, new)
            done = live[i].num_computed_tokens >= live[i].num_tokens
            sampled.append([draw.randrange(1000)] if done else [])
        ids = list(scheduled)
        s.update_from_output(out, ModelRunnerOutput(ids, {i: k for k, i in enumerate(ids)}, sampled))
        live = {i: r for i, r in live.items() if not r.is_finished()}
        seen["steps"] += 1
    check(s)
    return dict(seen)


@pytest.mark.parametrize("name", STACKS)
def test_random_requests_lose_share_and_free_no_block_wrongly(name: str, folders: dict[str, Path]) -> None:
    groups = 3 if name == "pyramidkv" else 1
    s = scheduler(folders[name], blocks=1 + 36 * groups, step=128)
    assert len(s.kv_cache_manager.coordinator.single_type_managers) == groups
    seen = drive(s, count=500, seed=5)
    assert s.kv_cache_manager.block_pool.get_num_free_blocks() == 36 * groups
    assert min(seen["aborted"], seen["preempted"], seen["hits"]) > 0, seen


def test_a_resumed_request_takes_no_shared_block_that_its_prompt_will_overwrite(folders: dict[str, Path]) -> None:
    """Its answer counts when hits are looked for, so that they could reach further than its prompt allows."""
    from vllm.v1.outputs import ModelRunnerOutput

    s, long = scheduler(folders["keydiff"], blocks=100, step=512), list(range(400))
    s.add_request(request("long", long, 2))
    while s.has_unfinished_requests():
        out = s.schedule()
        s.update_from_output(out, ModelRunnerOutput(["long"], {"long": 0}, [[7]]))
    resumed = request("resumed", long[:200], 200)
    resumed.append_output_token_ids(long[200:350])
    (manager,) = s.kv_cache_manager.coordinator.single_type_managers
    rule = manager.kv_cache_spec.rule
    assert rule.reach(200, BLOCK) < rule.reach(350, BLOCK) <= rule.reach(400, BLOCK)
    _, hit, *_ = s._get_local_prefix_cache_hit(resumed)
    assert hit == rule.reach(200, BLOCK)
