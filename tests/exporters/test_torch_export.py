"""Saved torch.export programs, stepped by PyTorch alone in another process, are the compiled model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import code, compiled, stepped
from tiny import tiny_ids

from kvcompile.exporters.torch_export import TorchProgram

NEW = 20
LENGTHS = (2, 19, 48)  # traced with another one; the last two are past the budget
STACK = ["policy=[gqa,cla,snapkv]", "stack.snapkv.budget=12", "stack.snapkv.window=8", "stack.snapkv.decode_every=4"]
DRIVER = """
import sys
sys.modules["kvcompile"] = sys.modules["transformers"] = None  # importing either now fails
{usage}
folder, count = sys.argv[1], int(sys.argv[2])
prefill, decode = load(folder)
with torch.no_grad():
    alone = decode(torch.full((2, 1), 7))  # on an empty cache
    found = []
    for prompt in torch.load(folder + "/prompts"):
        tokens = torch.cat(list(generate(prefill, decode, prompt, count)), 1)
        logits = [prefill(prompt), *(decode(token[:, None]) for token in tokens.unbind(1))]
        found.append(torch.cat(logits, 1))
torch.save((alone, found), folder + "/logits")
"""


@pytest.fixture(scope="module")
def model() -> Any:
    return compiled("llama", STACK)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("torch")
    TorchProgram(batch=2, prompt=64, new=24).write(model, None, made)
    return made


def test_another_process_without_us_decodes_alike(model: Any, folder: Path) -> None:
    prompts = [tiny_ids(2, count) for count in LENGTHS]
    torch.save(prompts, folder / "prompts")
    driver = DRIVER.format(usage=code(TorchProgram.usage))
    subprocess.run([sys.executable, "-c", driver, str(folder), str(NEW)], check=True, cwd=folder)
    alone, found = torch.load(folder / "logits")
    for ids, got in zip(prompts, found, strict=True):
        expected, _ = stepped(model, ids, NEW)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
        assert (got[:, 1] - alone[:, 0]).abs().max() > 0.1  # what is compared depends on the cache


@pytest.mark.parametrize(
    "stack",
    [
        [
            "policy=[mla,snapkv]",
            "stack.mla.factor=weights",
            "stack.mla.select=high",
            "stack.snapkv.window=8",
            "budget=16",
        ],
        ["policy=[cla,adakv]"],
        ["recipe=zigzag", "stack.zigzag.share_cap=0.6"],
        ["policy=zigzag", "stack.zigzag.scope=head", "stack.zigzag.score=knorm"],
    ],
    ids=["latents", "heads that share a row", "layers that share a budget", "all heads share a budget"],
)
def test_rows_of_other_kinds_are_traced(stack: list[str], tmp_path: Path) -> None:
    model, ids = compiled("llama", [*stack, "budget=16"], num_hidden_layers=2), tiny_ids(2, 48)
    TorchProgram(batch=2, prompt=64, new=24).write(model, None, tmp_path)
    usage: dict[str, Any] = {}
    exec(code(TorchProgram.usage), usage)
    prefill, decode = usage["load"](tmp_path)
    expected, _ = stepped(model, ids, NEW)
    with torch.no_grad():
        got = [prefill(ids), *(decode(token[:, None]) for token in expected[:, :-1].argmax(-1).unbind(1))]
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=2e-4, rtol=1e-4)


def test_facts_tell_what_the_program_holds(folder: Path) -> None:
    facts = json.loads((folder / "program.json").read_text())
    buffers = dict(torch.export.load(folder / "decode.pt2").named_buffers())
    assert [x["layer"] for x in facts["layers"]] == [0, 2]
    assert [x["capacity"] for x in facts["layers"]] == [16, 16]  # the budget, and tokens until the next selection
    assert [x["readers"] for x in facts["layers"]] == [[0, 1], [2, 3]]
    assert [(x["kept"], x["every"], x["ring"]) for x in facts["layers"]] == [([12], 4, False)] * 2
    assert (facts["batch"], facts["prompt"], facts["new"], facts["dtype"]) == (2, [2, 64], 24, "float32")
    for held in facts["cache"]:
        assert list(buffers[f"cache.{held['name']}"].shape) == held["shape"]
        assert not buffers[f"cache.{held['name']}"].clamp(min=0).any()  # saved empty
    assert facts["cache_bytes"] == sum(x.nbytes for name, x in buffers.items() if name.startswith("cache."))


def test_the_shortest_prompt_there_is(tmp_path: Path) -> None:
    """Two tokens, no more and no less: a program of one shape."""
    model, ids = compiled("llama", [], num_hidden_layers=1), tiny_ids(1, 3)
    TorchProgram(prompt=2, new=1).write(model, None, tmp_path)
    prefill = torch.export.load(tmp_path / "prefill.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(prefill(ids[:, :2])[:, -1], model(ids[:, :2]).logits[:, -1], atol=2e-4, rtol=1e-4)
        with pytest.raises(AssertionError):
            prefill(ids)
