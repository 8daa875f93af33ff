"""The names of vLLM that have no promise to stay: all in one module, and each as it was when this was written."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcompile.errors import KvcompileError
from kvcompile.serving.vllm import plugin
from kvcompile.serving.vllm.served import TESTED

PACKAGE = Path(plugin.__file__).parent
PUBLIC = {"plugin": {"vllm"}}  # its version alone, before anything private is touched


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_one_module_holds_every_name_of_vllm(path: Path) -> None:
    if path.stem == "private":
        return
    nodes = [
        node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = {node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert {name for name in names if name.split(".")[0] == "vllm"} <= PUBLIC.get(path.stem, set())


def test_another_vllm_than_the_tested_one_is_refused() -> None:
    with pytest.raises(KvcompileError, match=f"serves with vLLM {TESTED}"):
        plugin._require_tested("0.99.0")


def test_a_prompt_that_comes_in_pieces_is_refused_of_a_served_model_alone() -> None:
    """More of it would change its length, and with that which blocks every process takes for free."""

    def stock(self: Any, resumable: bool = False) -> bool:
        return resumable

    process = plugin._in_one_piece(stock)
    for facts, refused in (({"served": "digest"}, True), ({}, False)):
        engine = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(kvcompile=facts)))
        assert process(engine) is False
        if refused:
            with pytest.raises(KvcompileError, match="in pieces"):
                process(engine, resumable=True)
        else:
            assert process(engine, resumable=True) is True


def test_no_private_name_has_moved() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
    from kvcompile.serving.vllm import private

    assert private.version.startswith(f"{TESTED}.")
    assert private.moved() == []


def test_a_name_that_moved_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
    from kvcompile.serving.vllm import private

    def other(self: Any, something: Any) -> None:
        pass

    monkeypatch.setattr(private.FullAttentionManager, "cache_blocks", other)
    monkeypatch.delattr(private.Scheduler, "_mamba_block_aligned_split")
    assert private.moved() == ["FullAttentionManager.cache_blocks", "Scheduler._mamba_block_aligned_split"]
    with pytest.raises(KvcompileError, match="names that kvcompile touches"):
        plugin._require_tested(private.version)
