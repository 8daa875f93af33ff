"""The module on the page about attending to a part, written down elsewhere, decodes over part of a cache."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model
from torch import Tensor

import kvcompile
from kvcompile.kernels import reference
from kvcompile.kernels.layout import DenseView, Queries
from kvcompile.kernels.spec import KernelSpec, plain
from kvcompile.runtime.layer import LayerCache

PAGE = Path(__file__).resolve().parents[2] / "docs" / "attend-to-a-part.md"


@pytest.fixture
def toy(tmp_path: Path) -> Any:
    """The page's second module, from a folder outside of the project."""
    _, block = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    path = tmp_path / "largest_keys.py"
    path.write_text(block, "utf-8")
    spec = importlib.util.spec_from_file_location("largest_keys", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gathered(layer: LayerCache, queries: Tensor, positions: Tensor, count: int) -> Tensor:
    """The float64 reference over copies of each row's `count` entries with the largest keys, the newest included."""
    p = layer.plan
    spec = KernelSpec(plain("dense", "float32"), p.group, p.head_dim, p.head_dim, p.scale)
    out = torch.empty_like(queries)
    for r, (keys, values, at) in enumerate(layer.held.rows()):
        b, h = divmod(r, p.kv_heads)
        largest = torch.argsort(keys[:-1].norm(dim=-1), descending=True)[: count - 1]
        kept = torch.cat((largest.sort().values, torch.tensor([len(at) - 1])))
        heads = slice(h * p.group, (h + 1) * p.group)
        view = DenseView(keys[None, None, kept], values[None, None, kept], at[None, None, kept])
        out[b, heads] = reference.attend(Queries(queries[b : b + 1, heads], positions[b : b + 1]), view, spec)[0]
    return out


OPTIONS = {
    "plain": [],
    "paged": ["policy=paged"],
    "int8": ["policy=int8", "stack.int8.residual=8"],
    "adakv": ["policy=adakv", "budget=0.5"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_module_elsewhere_reads_part_of_it(options: list[str], toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the layout; a padded batch has rows of several lengths, two query heads share a row."""
    model = kvcompile.compile(tiny_model(), overrides=[*options, "kernels=sdpa"])
    asked = []
    attend = LayerCache.attend

    def checked(
        self: LayerCache, queries: Tensor, step: Any, layer: int, chosen: Any = None, sinks: Any = None
    ) -> Tensor:
        out = attend(self, queries, step, layer, chosen, sinks)
        if chosen is not None:
            wanted = gathered(self, queries, step.positions, toy.LargestKeys.count)
            torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(out, attend(self, queries, step, layer), atol=1e-3)
            asked.append([len(row) for row in chosen])
        return out

    monkeypatch.setattr(LayerCache, "attend", checked)
    ids = tiny_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    cache = toy.recalling(model.new_cache())
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert asked == [[8] * 4] * 4 * 3, "four layers of two sequences and two heads, three decoded tokens"
