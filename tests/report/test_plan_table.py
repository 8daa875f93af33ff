"""`plan=only`: the numbers it prints are the plan's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from io import StringIO
from typing import Any

import contract_table
import pytest
from rich.console import Console

from kvcompile import compiler
from kvcompile.config.compose import compose
from kvcompile.config.schema import Config, ModelConfig, PlanConfig
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.policy import Policy
from kvcompile.plan.selection import Budget, Score, Selection
from kvcompile.report import plan_table, units

LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 8
TOKEN_BYTES = LAYERS * KV_HEADS * HEAD_DIM * 2 * 4  # keys and values, float32


def plan(budget: float | None = None) -> Plan:
    keep = Selection("test", Score(), Budget(budget)) if budget else None
    layers = (LayerPlan(i, 4, KV_HEADS, HEAD_DIM, i, 1.0, selection=keep) for i in range(LAYERS))
    return Plan("llama", "float32", tuple(layers))


def shown(p: Plan, config: Config, policies: Iterable[Policy] = ()) -> str:
    out = StringIO()
    plan_table.show(p, config, Console(file=out, width=140), policies)
    return out.getvalue()


def test_bytes_and_ratio() -> None:
    assert plan_table.cache_bytes(plan(), 3, 100) == (300 * TOKEN_BYTES, 300 * TOKEN_BYTES)
    assert plan_table.cache_bytes(plan(0.25), 3, 100) == (75 * TOKEN_BYTES, 300 * TOKEN_BYTES)


@pytest.mark.parametrize(("budget", "batch"), [(None, 1), (0.25, 1), (0.3, 4)])
def test_tokens_that_fit_is_the_largest_number_that_does(budget: float | None, batch: int) -> None:
    p, memory = plan(budget), 0.01
    fit = plan_table.tokens_that_fit(p, batch, memory)
    assert fit is not None
    assert plan_table.cache_bytes(p, batch, fit)[0] <= memory * 2**30 < plan_table.cache_bytes(p, batch, fit + 1)[0]


def test_a_budget_in_tokens_fits_any_prompt() -> None:
    assert plan_table.tokens_that_fit(plan(64.0), 1, 0.01) is None
    assert plan_table.tokens_that_fit(plan(64.0), 1, 0.01, dense=True) == int(0.01 * 2**30 // TOKEN_BYTES)
    assert plan_table.tokens_that_fit(plan(), 1, 1e-9) == 0


def test_table_groups_layers_alike_and_shows_owners() -> None:
    p = plan(0.25)
    shared = replace(p.layers[3], owner=2)
    p = replace(p, layers=(replace(p.layers[0], selection=None), *p.layers[1:3], shared))
    text = shown(p, Config(plan=PlanConfig(context=1000, batch=2, memory=1)))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["0", "2", "1,000", "float32", "250 KiB", "100.0%"],
        ["1-2", "2", "250", "float32", "62.5 KiB", "25.0%"],
        ["3", "2", "reads layer 2", "", "0 B", "0.0%"],
    ]
    assert "total 375 KiB, uncompressed 1,000 KiB: 37.5%" in text
    assert "1 GiB hold prompts of" in text


def test_what_is_kept_and_what_is_read_stand_side_by_side() -> None:
    """A plan that recalls: all is kept, and what a step reads is its index, its budget, sinks and newest tokens."""
    quest = {"budget": 64, "page": 16, "sinks": 16, "recent": 32, "skip_layers": [0]}
    p = contract_table.plan_of({"quest": quest})
    text = shown(p, Config(plan=PlanConfig(context=2096)))
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in text.splitlines() if row.startswith("│")]
    entry, groups = 2 * 16 * 4, 2048 // 16
    index = groups * 2 * (2 * 16 * 4 + 8)
    read = index + 2 * (64 + 16 + 32 + 1) * entry
    dense = 2 * 2097 * entry
    assert rows == [
        ["0", "2", "2,096", "float32", "524 KiB", "100.0%", "0 B", "524 KiB", "100.0%"],
        [
            "1-3",
            "2",
            "2,096",
            "float32",
            "524 KiB",
            "100.0%",
            units.size(index),
            units.size(read),
            f"{read / dense:.1%}",
        ],
    ]
    share = (dense + 3 * read) / (4 * dense)
    assert f"kept 100.0%, read {share:.1%}" in text
    assert f"(index of groups {units.size(3 * index)}), in host memory 0 B" in text
    row = plan_table.summary(p, Config(plan=PlanConfig(context=2096)))
    assert (row["ratio"], row["read"], row["read_bytes"]) == (1.0, share, dense + 3 * read)
    assert (row["device_bytes"], row["host_bytes"]) == (4 * 2 * 2096 * entry + 3 * index, 0)
    assert "read" not in plan_table.headings(plan(0.25))


def test_an_index_counts_in_what_fits() -> None:
    """Also of prompts in chunks and of any length, without counting the chunks."""
    p = contract_table.plan_of({"quest": {"skip_layers": []}}, prefill_chunk=64)
    fit = plan_table.tokens_that_fit(p, 1, 0.01)
    assert fit is not None
    assert plan_table.places(p, 1, fit)[0] <= 0.01 * 2**30 < plan_table.places(p, 1, fit + 1)[0]


@pytest.mark.parametrize(("given", "said"), [([], True), (["stack.retrieval_heads.heads=[[0,1],[7,2]]"], False)])
def test_a_plan_that_calibration_may_change_says_so(given: list[str], said: bool) -> None:
    """Which heads retrieve is found in the loaded model; a plan without one only guesses where they are."""
    config = compose(["recipe=retrieval_heads", *given])
    stack = compiler.plan_config(config)
    text = " ".join(shown(stack.plan, config, stack.policies).split())
    assert ("not calibrated: retrieval_heads finds out which heads retrieve when a model is compiled" in text) == said


@pytest.mark.parametrize(
    ("stack", "chunk", "said"),
    [
        ({"int8": {}}, 64, True),
        ({"snapkv": {"between_chunks": True}, "kivi": {}}, 64, True),
        ({"snapkv": {"between_chunks": False}, "kivi": {}}, 64, False),
        ({"int8": {}}, 0, False),
        ({"snapkv": {}}, 64, False),
    ],
)
def test_a_plan_whose_prompts_are_read_over_codes_says_so(
    stack: dict[str, dict[str, Any]], chunk: int, said: bool
) -> None:
    found = plan_table.notes(contract_table.plan_of(stack, prefill_chunk=chunk))
    assert [("prefill_chunk=64" in note, "codes" in note) for note in found] == [(True, True)] * said


@pytest.mark.parametrize(("chunk", "says"), [(64, "read what they choose of earlier ones"), (0, "read at once")])
def test_a_plan_whose_prompts_look_up_blocks_says_so(chunk: int, says: str) -> None:
    (note,) = plan_table.notes(contract_table.plan_of({"infllm": {}}, prefill_chunk=chunk))
    assert says in note


def test_summary_row_has_the_totals() -> None:
    row = plan_table.summary(plan(0.25), Config(plan=PlanConfig(context=100, memory=0.01)))
    assert row["cache_bytes"] == 25 * TOKEN_BYTES
    assert row["ratio"] == 0.25
    assert row["tokens_that_fit"] == plan_table.tokens_that_fit(plan(0.25), 1, 0.01)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (1000 << 10, "1,000 KiB"), (-(1536 << 10), "-1.5 MiB")),
        *((5 << 30, "5 GiB"), (5000 << 40, "5,000 TiB")),
    ],
)
def test_sizes_read_well(number: int, text: str) -> None:
    assert units.size(number) == text


def test_cache_dtype_follows_the_model() -> None:
    assert compiler.cache_dtype(ModelConfig(dtype="bfloat16"), "torch.float32") == "bfloat16"
    assert compiler.cache_dtype(ModelConfig(device="cpu"), "torch.bfloat16") == "float32"
    assert compiler.cache_dtype(ModelConfig(device="cuda"), "torch.bfloat16") == "bfloat16"


def test_plan_of_the_default_model_needs_no_weights() -> None:
    p = compiler.plan_config(compose(["policy=[snapkv]", "budget=0.5", "prefill_chunk=256"])).plan
    assert (len(p.layers), p.layers[0].kv_heads, p.layers[0].head_dim, p.prefill_chunk) == (30, 3, 64, 256)
    held, dense = plan_table.cache_bytes(p, 1, 1000)
    assert held * 2 == dense


def test_a_plan_that_reads_a_text_again_says_so() -> None:
    (note,) = plan_table.notes(contract_table.plan_of({"kvzip": {"chunk": 512}}))
    assert "read again before tokens are dropped, in pieces of 512" in note
