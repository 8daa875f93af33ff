"""A step of a program is captured whole: nothing is read back to Python, nothing moves, one graph for all steps.

That is what CUDA graphs and `torch.compile(fullgraph=True)` ask. `WITHOUT`: recipes that have no programs.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest
import torch
from programs import compiled, planned
from tiny import tiny_ids
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompile.errors import KvcompileError
from kvcompile.exporters.registry import build_exporters, require_open
from kvcompile.exporters.static.capacity import Limits
from kvcompile.exporters.static.lower import Program
from kvcompile.exporters.static.modules import ResidentDecode

RECIPES = sorted(file.name.removesuffix(".yaml") for file in files("kvcompile.recipes.recipe").iterdir())
WITHOUT = {  # recipes that no program of fixed shape can follow, and why
    "adakv_kivi": "heads that share a row hold plain numbers",
    "attention_matching": "a program reads its prompt once",
    "block_transformer": "a block transformer runs in kvcompile alone",
    "block_transformer_heal": "a block transformer runs in kvcompile alone",
    "clusterkv": "each step of a program reads all that a row holds",
    "corm": "must follow from the length of the prompt alone",
    "ghost": "a score must be made of tensor operations",
    "ghost_kivi": "a score must be made of tensor operations",
    "global_topk": "must follow from the length of the prompt alone",
    "head_budgets": "a score must be made of tensor operations",
    "infllm": "each step of a program reads all that a row holds",
    "kvzip": "a program reads its prompt once",
    "leankv": "must hold its tokens in one precision",
    "offload": "must stay on one device",
    "paged": "must hold contiguous rows",
    "quest": "each step of a program reads all that a row holds",
    "random": "a score must be made of tensor operations",
    "recall_held": "encoded tokens are not dropped while decoding",
    "recall_read": "each step of a program reads all that a row holds",
    "retrieval_heads": "moments of queries are taken of the prompt alone",
    "tiers": "must hold its tokens in one precision",
    "zigzag_kivi": "heads that share a row hold plain numbers",
}
TOKENS, STEPS = 48, 3
# what makes a number of Python, or a shape, of a tensor's contents
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique", "allclose")


class Spy(TorchDispatchMode):
    """Counts operators by name, and copies that leave a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def reads(self) -> dict[str, int]:
        """Operators that read a tensor back."""
        return {name: n for name, n in self.seen.items() if name.startswith(READS)}


def _distinct() -> list[str]:
    """Recipes with programs, without those whose steps are another's with other weights."""
    steps: dict[str, str] = {}
    for name in RECIPES:
        if name not in WITHOUT:
            plan, _ = planned("llama", [f"recipe={name}"])
            kinds = [(p.selection, p.storage, p.latent is None, p.owner) for p in plan.layers]
            steps.setdefault(repr(kinds), name)
    return list(steps.values())


DISTINCT = _distinct()


@functools.cache
def _program(recipe: str) -> Program:
    model = compiled("llama", [f"recipe={recipe}"], num_hidden_layers=2)
    return Program(model, Limits(batch=2, prompt=TOKENS, new=40))


@pytest.mark.parametrize("name", RECIPES)
def test_which_recipes_have_programs(name: str) -> None:
    plan, config = planned("llama", [f"recipe={name}"])
    exporters = build_exporters({"torch": {}})
    if name not in WITHOUT:
        return require_open(exporters, plan, config)
    with pytest.raises(KvcompileError, match=WITHOUT[name]):
        require_open(exporters, plan, config)
    return None


@pytest.mark.parametrize("name", DISTINCT)
@torch.no_grad()
def test_a_step_reads_nothing_back_and_nothing_moves(name: str) -> None:
    program, ids = _program(name), tiny_ids(2, TOKENS)
    _, state = program.prefill(ids)
    places = {key: x.data_ptr() for key, x in state.items()}
    for step in range(STEPS):
        before = {key: x.clone() for key, x in state.items()}
        with Spy() as spy:
            program.decode(ids[:, step : step + 1], state)
        assert spy.seen
        assert not spy.reads
        assert {key: x.data_ptr() for key, x in state.items()} == places
        assert any(not torch.equal(before[key], x) for key, x in state.items() if key != "clock")
    # a device without contents: whatever asks for them, or brings a tensor of another device, is an error
    elsewhere = copy.deepcopy(program).to("meta")
    there = {key: x.to("meta") for key, x in state.items()}
    assert elsewhere.decode(ids[:, :1].to("meta"), there).device.type == "meta"


@pytest.mark.parametrize("name", DISTINCT)
@torch.no_grad()
def test_a_step_is_one_graph(name: str) -> None:
    program, ids = _program(name), tiny_ids(2, TOKENS)
    _, state = program.prefill(ids)
    module = ResidentDecode(program)
    for key, buffer in module.cache.named_buffers():
        buffer.copy_(state[key])
    torch._dynamo.reset()
    step = torch.compile(module, fullgraph=True, backend="eager")
    first = step(ids[:, :1])
    torch.testing.assert_close(first, program.decode(ids[:, :1], state), atol=0, rtol=0)
    with torch.compiler.set_stance("fail_on_recompile"):  # the state is another, the graph is the same
        for token in ids[:, 1:STEPS].split(1, 1):
            torch.testing.assert_close(step(token), program.decode(token, state), atol=0, rtol=0)
    torch._dynamo.reset()


@torch.no_grad()
def test_the_spy_sees_what_is_read_back() -> None:
    x, there = torch.arange(3), torch.arange(3, device="meta")
    for read in (lambda: int(x[0]), lambda: bool(x.any()), lambda: x.nonzero(), lambda: x.sum().item()):
        with Spy() as spy:
            read()
        assert spy.reads
    for read in (there.tolist, there.cpu, lambda: there + x, lambda: there[there > 1]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
