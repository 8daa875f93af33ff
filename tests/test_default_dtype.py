"""torch's default dtype is the user's: nothing that kvcompile makes takes it, so no result or memory depends on it."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_table import DIVIDED, STORED, STRUCTURES, TABLE, Options, dense, plan_of
from test_contract import steps
from tiny import tiny_ids
from torch import Tensor

from kvcompile.compiler import compile_plan
from kvcompile.models.sharing import shared

ROOT = Path(__file__).parents[1]
MAKERS = {"arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand"}
MAKERS |= {"randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"}
STACKS: dict[str, Options] = {
    **{name: row.fields(24, decode_every=2) for name, row in TABLE.items()},
    **{name: stack for name, (stack, _) in STORED.items()},
    **STRUCTURES,
    **DIVIDED,
}


@contextlib.contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def logits(name: str, kernels: str) -> Tensor:
    """Of a prompt in chunks, and of decoded tokens, by a model that is compiled for it."""
    model: Any = compile_plan(shared(dense()), plan_of(STACKS[name], prefill_chunk=32), kernels)
    found, _ = steps(model, tiny_ids(1, 65), 60)
    return found


@pytest.mark.parametrize("name", STACKS)
def test_the_default_dtype_changes_nothing(name: str) -> None:
    """Compiling and running, to the bit: half as wide (memory of kernels would be too short), and twice as wide."""
    for kernels, dtypes in (("auto", (torch.bfloat16, torch.float64)), ("sdpa", (torch.float16,))):
        expected = logits(name, kernels)
        for dtype in dtypes:
            with default(dtype):
                got = logits(name, kernels)
            assert got.dtype == torch.float32
            assert torch.equal(got, expected), (kernels, dtype)


@pytest.mark.parametrize("package", ["kvcompile", "kernels", "policies"])
def test_every_tensor_is_made_with_dtype_and_device(package: str) -> None:
    """A tensor that is made without them takes torch's defaults, which a user may have set."""
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "torch"
                and node.func.attr in MAKERS
                and not {"dtype", "device"} <= {k.arg for k in node.keywords}
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)
