"""vLLM's CPU blocks are read and written as its kernels read and write them; rows and gaps of a step are right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_config

from kvcompile.adapters.architectures import describe
from kvcompile.serving.vllm.rules import rules
from kvcompile.stack import apply_stack, build_stack

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
pytestmark = pytest.mark.filterwarnings("ignore")
BLOCK = 32


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("auto", "float32"), ("auto", "bfloat16"), ("auto", "float16"), ("fp8", "float32"), ("fp8_e5m2", "bfloat16")],
)
def test_blocks_are_read_as_the_kernels_wrote_them_and_written_back(kind: str, dtype: str, dim: int) -> None:
    from vllm import _custom_ops as ops

    from kvcompile.serving.vllm import cpu

    like: torch.dtype = getattr(torch, dtype)
    cache = torch.zeros(6, 2, BLOCK, 2 * dim, dtype=like if kind == "auto" else torch.uint8)
    keys, values = torch.randn(2, 50, 2, dim).to(like)
    blocks = torch.tensor([4, 1])
    slots = torch.tensor([int(blocks[t // BLOCK]) * BLOCK + t % BLOCK for t in range(50)])
    stock = cache.view(6, 2, 2 * BLOCK, -1).chunk(2, 2)
    ops.cpu_attn_reshape_and_cache(keys, values, *stock, slots, cpu.ISA, k_scale=1.0, v_scale=1.0, kv_cache_dtype=kind)
    read = cpu.read_blocks(cache, blocks, 50)
    for stored, wrote in zip(read, (keys, values), strict=True):
        if kind == "auto":
            assert torch.equal(stored, wrote.transpose(0, 1))
        else:  # the kernels round otherwise than torch: one step at most
            codes = stored.view(cpu.FORMATS[kind]).float()
            assert (
                (codes - wrote.transpose(0, 1).float()).abs() <= wrote.transpose(0, 1).float().abs() / 4 + 1e-2
            ).all()
    chosen = torch.stack([torch.randperm(50)[:20].sort().values for _ in range(2)]).unsqueeze(-1)
    before = cache.clone()
    cpu.write_last(cache, blocks, 50, *(x.take_along_dim(chosen, 1) for x in read))
    after = cpu.read_blocks(cache, blocks, 50)
    for new, old in zip(after, read, strict=True):
        assert torch.equal(new[:, 30:], old.take_along_dim(chosen, 1))
        assert torch.equal(new[:, :30], old[:, :30])
    assert torch.equal(cache[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


def test_a_step_sees_each_prompt_without_what_was_freed() -> None:
    from kvcompile.serving.vllm.cpu import compacted
    from kvcompile.serving.vllm.spec import KeptSpec

    plan = apply_stack(describe(tiny_config("llama")), build_stack(["knorm"], {"knorm": {"budget": 0.25}}))
    rule = rules(plan, 1)[0]
    assert rule is not None
    spec = KeptSpec(block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.float32, rule=rule, granularity=BLOCK)
    n = 200  # of 7 blocks, 4 are freed
    assert rule.gap(n, BLOCK) == 4
    rows = [(n, 100, 60), (n, 200, 100), (n, 201, 1), (n, 230, 30), (10, 10, 10)]  # prompt, tokens, of them new
    table = torch.arange(5 * 8, dtype=torch.int32).view(5, 8)
    starts = torch.tensor([0, *torch.tensor([new for *_, new in rows]).cumsum(0)], dtype=torch.int32)

    class Step(SimpleNamespace):
        def replace(self, **changes: Any) -> Any:
            return Step(**{**vars(self), **changes})

    step = Step(
        rswa_prefix_lens=torch.tensor([prompt for prompt, *_ in rows]),
        seq_lens=torch.tensor([tokens for _, tokens, _ in rows], dtype=torch.int32),
        query_start_loc_cpu=starts,
        block_table_tensor=table,
    )
    seen, endings = compacted(step, spec)
    assert seen.seq_lens.tolist() == [100, 200, 201 - 128, 230 - 128, 10]
    assert seen.seq_lens.dtype == torch.int32
    assert torch.equal(seen.block_table_tensor[[0, 1, 4]], table[[0, 1, 4]])
    assert seen.block_table_tensor[2, :4].tolist() == table[2, 4:].tolist()
    assert [(e.row, e.tokens, e.kept, e.blocks.tolist()) for e in endings] == [(1, n, 72, table[1, :7].tolist())]
