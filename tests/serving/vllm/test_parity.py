"""vLLM says what the compiled model says, token for token, however its requests are batched, cut, shared, preempted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
pytestmark = pytest.mark.filterwarnings("ignore")

import vllm_engine as vllm  # noqa: E402 (it imports vLLM's environment)

NEW = 32
Served = Callable[[str], Path]


@pytest.fixture(scope="module")
def ids() -> list[list[int]]:
    vllm.require_model()
    return [*vllm.prompts(2, 200), *vllm.prompts(1, 90, start=2)]


@pytest.mark.parametrize("name", vllm.POLICIES)
def test_tokens_are_those_of_the_compiled_model(name: str, served: Served, ids: list[list[int]]) -> None:
    reference = vllm.Reference(vllm.POLICIES[name])
    expected = [reference(prompt, NEW) for prompt in ids]
    with vllm.engine(served(name)) as running:
        together = running.run(ids, NEW)
        assert vllm.words(together) == expected
        again = running.run(ids, NEW)  # from cached blocks, but where every query counts
        assert vllm.words(again) == expected
        assert all((count > 0) is (name not in vllm.COUNTING) for count in again.cached.values())
        assert vllm.words(running.run(ids[:1], NEW)) == expected[:1]
        assert running.pool.get_num_free_blocks() == running.total
        after = together.steps[2][2]
        assert after < together.peak / 2  # the blocks of what was dropped are free two steps after the prompts


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", *vllm.COUNTING])
def test_chunks_preemption_and_aborts_change_no_token(name: str, served: Served, ids: list[list[int]]) -> None:
    several, new = [*ids, *vllm.prompts(2, 150, start=3)], 60
    with vllm.engine(served(name), enable_prefix_caching=False) as running:
        ample = running.run(several, new)
    options = {"max_model_len": 512, "max_num_batched_tokens": 80}
    blocks = 1 + 21 * (3 if name == "pyramidkv" else 1)
    with vllm.engine(served(name), num_gpu_blocks_override=blocks, **options) as running:
        gone = {1: 25, 0: 2}  # after its answer has begun, and in the middle of its prompt
        tight = running.run(several, new, abort=gone)
        assert tight.preempted > 0
        left = [str(i) for i in range(len(several)) if i not in gone]
        assert [tight.tokens[i] for i in left] == [ample.tokens[i] for i in left]
        assert running.pool.get_num_free_blocks() == running.total


def test_several_answers_to_one_prompt_share_its_head_alone(served: Served, ids: list[list[int]]) -> None:
    from vllm.sampling_params import RequestOutputKind

    with vllm.engine(served("keydiff")) as running:
        one = running.run(ids[:1], NEW)
        together = {"n": 3, "temperature": 1, "top_k": 1, "output_kind": RequestOutputKind.FINAL_ONLY}
        several = running.run(ids[:1], NEW, **together)
        assert several.tokens["0"] == one.tokens["0"] * 3
        assert running.pool.get_num_free_blocks() == running.total


def test_a_budget_of_all_is_stock_vllm_block_by_block(served: Served, ids: list[list[int]]) -> None:
    ran = {}
    whole = served("whole")
    for folder in (vllm.MODEL, whole):
        with vllm.engine(folder) as running:
            first, second = running.run(ids, NEW), running.run(ids, NEW)
            ran[folder] = [(r.tokens, r.steps, r.cached) for r in (first, second)]
    assert ran[whole] == ran[vllm.MODEL]


def test_a_model_whose_weights_were_converted_runs_as_a_stock_one(tmp_path: Path, ids: list[list[int]]) -> None:
    import kvcompile

    model = vllm.compiled(["policy=[mqa]"])
    kvcompile.export(model, "hf", tmp_path / "mqa", tokenizer=vllm.tokenizer())
    reference = vllm.Reference(["policy=[mqa]"])
    with vllm.engine(tmp_path / "mqa") as running:
        assert vllm.words(running.run(ids, NEW)) == [reference(prompt, NEW) for prompt in ids]


def test_without_the_plugin_the_folder_is_refused(served: Served) -> None:
    code = f"from vllm import LLM; LLM(model={str(served('keydiff'))!r})"
    environment = {**os.environ, "VLLM_PLUGINS": "none"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "serve with vllm and kvcompile[vllm]" in done.stderr


def test_what_would_see_a_compacted_prompt_as_a_whole_one_is_refused(served: Served) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from kvcompile.errors import KvcompileError

    folder = str(served("snapkv"))
    wrong = {"async_scheduling": True, "max_num_batched_tokens": 40}
    for option, value in wrong.items():
        with pytest.raises((KvcompileError, ValueError), match=r"kvcompile|read in one step"):
            EngineArgs(model=folder, max_num_seqs=16, max_model_len=2048, **{option: value}).create_engine_config()
