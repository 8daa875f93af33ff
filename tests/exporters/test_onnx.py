"""An ONNX graph with the cache as inputs and outputs decodes under onnxruntime like the compiled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from programs import code, compiled, planned, stepped
from tiny import tiny_ids

from kvcompile.errors import KvcompileError
from kvcompile.exporters.onnx import ONNX

NEW = 12
OVERRIDES = ["policy=[mqa,cla]", "stack.cla.pattern=[0,1,0,1]"]


def test_onnxruntime_decodes_alike(tmp_path: Path) -> None:
    """Layers that slide and layers that do not, soft-capped, merged and shared."""
    import onnxruntime

    model = compiled("gemma2", OVERRIDES)
    ONNX().write(model, None, tmp_path)
    usage: dict[str, Any] = {}
    exec(code(ONNX.usage), usage)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()[1:]]
    owners = [p.index for p in model.kvcompile.plan.layers if p.owner == p.index]
    assert names == [f"past_key_values.{i}.{part}" for i in owners for part in ("key", "value")]
    for batch, count in ((1, 1), (1, 30), (2, 7)):
        ids = tiny_ids(batch, count)
        expected, _ = stepped(model, ids, NEW)
        tokens = torch.cat([torch.from_numpy(x) for x in usage["generate"](tmp_path, ids.numpy(), NEW)], 1)
        assert torch.equal(tokens, expected[:, :-1].argmax(-1))
        empty = torch.zeros(batch, model.kvcompile.plan.layers[0].kv_heads, 0, 16).numpy()
        logits, *cache = session.run(None, {"input_ids": ids.numpy(), **dict.fromkeys(names, empty)})
        got = [torch.from_numpy(logits[:, -1])]
        for token in tokens.unbind(1):
            given = {"input_ids": token[:, None].numpy(), **dict(zip(names, cache, strict=True))}
            logits, *cache = session.run(None, given)
            got.append(torch.from_numpy(logits[:, -1]))
        torch.testing.assert_close(torch.stack(got, 1), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "dtype", "reason"),
    [
        (["policy=snapkv"], "float32", "every token"),
        (["policy=kivi"], "float32", "plain numbers"),
        (["policy=mla"], "float32", "latent rows"),
        ([], "bfloat16", "float32"),
    ],
)
def test_refuses_what_the_cache_of_the_caller_cannot_be(overrides: list[str], dtype: str, reason: str) -> None:
    plan, config = planned("llama", overrides, dtype)
    with pytest.raises(KvcompileError, match=reason):
        ONNX().refuse(plan, config)
