"""vLLM says what the compiled model says, token for token, however its requests are batched and shared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
pytestmark = pytest.mark.filterwarnings("ignore")

import vllm_engine as vllm  # noqa: E402 (it imports vLLM's environment)

NEW = 32
POLICIES = {
    "keydiff": ["policy=[keydiff]", "budget=0.25"],
    "knorm": ["policy=[knorm]", "budget=0.25"],
    "snapkv": ["policy=[snapkv]", "budget=0.25"],
    "dropkv": ["policy=[dropkv]", "budget=0.25"],
    "streaming": ["policy=[streaming]", "budget=0.25", "stack.streaming.decode_every=0"],
    "pyramidkv": ["policy=[pyramidkv]", "budget=0.25"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vllm.require_model()
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def ids(place: Path) -> list[list[int]]:
    return [*vllm.prompts(2, 200), *vllm.prompts(1, 90, start=2)]


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[vllm.Engine]:
    running = vllm.Engine(folder, **options)
    try:
        yield running
    finally:
        running.close()


def served(name: str, place: Path) -> Path:
    folder = place / name
    return folder if folder.is_dir() else vllm.export(POLICIES[name], folder)


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_those_of_the_compiled_model(name: str, place: Path, ids: list[list[int]]) -> None:
    reference = vllm.Reference(POLICIES[name])
    expected = [reference(prompt, NEW) for prompt in ids]
    with engine(served(name, place)) as running:
        together = running.run(ids, NEW)
        assert vllm.words(together) == expected
        again = running.run(ids, NEW)  # from cached blocks
        assert vllm.words(again) == expected
        assert all(count > 0 for count in again.cached.values())
        assert vllm.words(running.run(ids[:1], NEW)) == expected[:1]
        assert running.pool.get_num_free_blocks() == running.total
        after = together.steps[2][2]
        assert after < together.peak / 2  # the blocks of what was dropped are free two steps after the prompts


def test_without_the_plugin_the_folder_is_refused(place: Path) -> None:
    code = f"from vllm import LLM; LLM(model={str(served('keydiff', place))!r})"
    environment = {**os.environ, "VLLM_PLUGINS": "none"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "serve with vllm and kvcompile[vllm]" in done.stderr


def test_what_would_see_a_compacted_prompt_as_a_whole_one_is_refused(place: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from kvcompile.errors import KvcompileError

    folder = str(served("snapkv", place))
    wrong = {"async_scheduling": True, "max_num_batched_tokens": 40}
    for option, value in wrong.items():
        with pytest.raises((KvcompileError, ValueError), match=r"kvcompile|read in one step"):
            EngineArgs(model=folder, max_num_seqs=16, max_model_len=2048, **{option: value}).create_engine_config()
