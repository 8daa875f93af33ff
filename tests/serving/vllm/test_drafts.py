"""Answers with drafts out of their own text (n-grams) are those of the compiled model, in fewer steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
pytestmark = pytest.mark.filterwarnings("ignore")

import vllm_engine as vllm  # noqa: E402 (it imports vLLM's environment)

NEW = 160
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def test_answers_with_drafts_are_those_of_the_compiled_model(served: Callable[[str], Path]) -> None:
    ids = vllm.prompts(1, 110)
    expected = vllm.Reference(vllm.POLICIES["snapkv"])(ids[0], NEW)
    with vllm.engine(served("snapkv"), speculative_config=NGRAM) as running:
        ran = running.run(ids, NEW)
        assert vllm.words(ran) == [expected]
        assert len(ran.steps) < NEW  # some drafts were right
        assert running.pool.get_num_free_blocks() == running.total
