"""The graph: K/V as explicit edges, passes that do what the plan says or name themselves, safe in threads."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.fx as fx
from tiny import ARCHITECTURES, tiny_ids, tiny_model
from torch import Tensor

from kvcompile.adapters.architectures import architecture_of, describe
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.graph import ops
from kvcompile.graph.passes import DropObservers, InsertCompression, Pass, TrimSliding, rewrite
from kvcompile.graph.tracer import trace
from kvcompile.graph.wiring import appends, attends, observes, verify, wiring
from kvcompile.plan.plan import Plan
from kvcompile.plan.selection import Allocation, Budget, LayerScores, Selection, Traits
from kvcompile.policies.snapkv import SnapKV, WindowAttention


@dataclass(frozen=True)
class Across(Allocation):
    """A budget shared by all layers (never run here)."""

    traits = Traits(cross_layer=True)

    def allot(self, layers: Sequence[LayerScores]) -> list[Tensor]:
        return [x.lengths for x in layers]


PLAIN = Selection("plain", WindowAttention(4), Budget(0.5))
SHARED = Selection("shared", WindowAttention(4), Budget(0.5), Across())


def select(plan: Plan, s: Selection, layers: Sequence[int]) -> Plan:
    return plan.map(lambda p: replace(p, selection=s), layers)


def traced(name: str = "llama") -> tuple[fx.GraphModule, Plan]:
    model = tiny_model(name)
    plan = describe(model.config)
    architecture_of(model.config).swap(model, describe(model.config))
    return trace(model), plan


def names(graph: fx.Graph) -> list[Any]:
    """Graph ops by name and layer in order of execution."""
    places = {ops.kv_append: 4, ops.observe: 4, ops.attend: 3, ops.compress: 3, ops.trim: 2, ops.allocate: 1}
    return [(ops.NAMES[n.target], n.args[places[n.target]]) for n in graph.nodes if n.target in places]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_layer_is_seen_whole(name: str) -> None:
    module, plan = traced(name)
    graph = module.graph
    graph.lint()
    assert [n.target for n in graph.nodes if n.target in ops.NAMES].count(ops.begin) == 1
    layers = list(range(4))
    assert list(appends(graph)) == list(attends(graph)) == list(observes(graph)) == layers
    assert verify(graph, plan) == {i: i for i in layers}
    rotated = sum(n.target is ops.rope for n in graph.nodes)
    assert rotated == 2 * (3 if name == "smollm3" else 4)  # smollm3 has one layer without positions
    modules = [str(n.target) for n in graph.nodes if n.op == "call_module"]
    for i in layers:
        own = [m for m in modules if f"layers.{i}." in m]
        assert sum(m.endswith(("q_proj", "qkv_proj", "query_key_value")) for m in own) == 1
        assert sum(m.endswith(("o_proj", "dense")) for m in own) == 1
        assert any(m.endswith("mlp") for m in own), "the MLP is one node"


def test_edges_run_from_projection_to_attention() -> None:
    graph = traced()[0].graph
    for index, node in attends(graph).items():
        stored = node.args[1]
        assert stored is appends(graph)[index]
        queries, keys, values = node.args[0], *stored.args[1:3]
        assert (queries.target, keys.target) == (ops.rope, ops.rope)

        def source(x: fx.Node) -> str:
            while x.op != "call_module":
                x = x.args[0]
            return str(x.target)

        for edge, projection in ((queries, "q_proj"), (keys, "k_proj"), (values, "v_proj")):
            assert source(edge) == f"model.model.layers.{index}.self_attn.{projection}"


def test_code_is_readable() -> None:
    module = compile_plan(tiny_model(), SnapKV(window=4).apply(describe(tiny_model().config))).kvcompile.graph
    assert type(module).__name__ == "LlamaForCausalLM"
    for line in ("layers_3_self_attn_q_proj", "kv_append", "observe", "attend", "compress", "o_proj"):
        assert line in module.code
    assert re.search(
        r"def forward\(self, input_ids.*, attention_mask.*, position_ids.*, cache.*, logits_to_keep", module.code
    )
    assert len(module.code.splitlines()) < 40 * 4 + 40


def test_identity_needs_no_observer() -> None:
    module, plan = traced()
    assert rewrite(module, plan).changes == {"DropObservers": 4}
    assert not observes(module.graph)


def test_compression_comes_after_the_last_reader() -> None:
    module, plan = traced()
    changes = rewrite(module, select(plan, PLAIN, [1, 3])).changes
    assert changes == {"DropObservers": 2, "InsertCompression": 2}
    expected: list[Any] = [("kv_append", 0), ("attend", 0)]
    for i in (1, 2, 3):
        expected += (
            [("kv_append", i), ("attend", i)]
            if i == 2
            else [
                ("kv_append", i),
                ("attend", i),
                ("observe", i),
                ("compress", i),
            ]
        )
    assert names(module.graph) == expected
    for node in module.graph.nodes:
        if node.target is ops.compress:
            assert node.args[0] is appends(module.graph)[node.args[3]]
            assert node.args[1] is observes(module.graph)[node.args[3]]


def test_layers_that_share_a_budget_meet_in_one_node() -> None:
    module, plan = traced()
    changes = rewrite(module, select(plan, SHARED, [0, 2])).changes
    assert changes == {"DropObservers": 2, "InsertCompression": 2}
    order = names(module.graph)
    assert order.index(("allocate", (0, 2))) == order.index(("observe", 2)) + 1
    node = next(n for n in module.graph.nodes if n.target is ops.allocate)
    assert node.args[2:] == tuple(observes(module.graph)[i] for i in (0, 2))


def rewire(graph: fx.Graph, reader: int, owner: int) -> None:
    attends(graph)[reader].update_arg(1, appends(graph)[owner])


def test_a_shared_cache_is_compressed_after_its_last_reader() -> None:
    """Layer 3 reads layer 0's keys: neither `compress` nor `allocate` may come before it has."""
    for s in (PLAIN, SHARED):
        module, plan = traced()
        plan = select(plan.map(lambda p: replace(p, owner=0), [3]), s, [0, 1])
        rewire(module.graph, 3, 0)
        rewrite(module, plan, (InsertCompression,))
        verify(module.graph, plan)
        order = names(module.graph)
        done = ("compress", 0) if s is PLAIN else ("allocate", (0, 1))
        assert order.index(done) > order.index(("attend", 3))


def test_sliding_layers_are_trimmed() -> None:
    module, plan = traced("gemma2")
    assert rewrite(module, plan).changes == {"DropObservers": 4, "TrimSliding": 2}
    order = names(module.graph)
    for i in (0, 2):
        assert order.index(("trim", i)) == order.index(("attend", i)) + 1
    module, plan = traced("gemma2")
    changes = rewrite(module, select(plan, PLAIN, range(4))).changes
    assert changes == {"InsertCompression": 4}, "a selection frees what has left the window itself"


def test_wiring_is_read_from_the_edges() -> None:
    module, plan = traced()
    rewire(module.graph, 2, 1)
    assert wiring(module.graph) == {0: 0, 1: 1, 2: 1, 3: 3}
    with pytest.raises(KvcompileError, match="layer 2 must read the KV of layer 2, got layer 1 in the graph"):
        verify(module.graph, plan)
    verify(module.graph, plan.map(lambda p: replace(p, owner=1), [2]))


def test_a_missing_attention_is_noticed() -> None:
    module, plan = traced()
    attends(module.graph)[3].target = torch.neg
    with pytest.raises(KvcompileError, match="layer 3 must read"):
        verify(module.graph, plan)


class Idle(Pass):
    """Finds nothing."""

    def run(self, module: fx.GraphModule) -> int:
        return 0


class Forgetful(InsertCompression):
    """Forgets the last layer."""

    def run(self, module: fx.GraphModule) -> int:
        changed = super().run(module)
        module.graph.erase_node([n for n in module.graph.nodes if n.target is ops.compress][-1])
        return changed


def test_a_pass_that_matches_nothing_names_itself() -> None:
    module, plan = traced()
    with pytest.raises(KvcompileError, match=r"pass Idle \(after \['DropObservers'\]\).*embed_tokens") as error:
        rewrite(module, plan, (DropObservers, TrimSliding, Idle))
    assert "\n" not in str(error.value)


def test_a_pass_that_breaks_its_word_names_itself() -> None:
    module, plan = traced()
    with pytest.raises(KvcompileError, match=r"pass Forgetful \(after none\).*compressed once.*\[0, 1, 2\]"):
        rewrite(module, select(plan, PLAIN, range(4)), (Forgetful,))


def test_graph_runs_after_every_pass() -> None:
    """What is dead goes, what has an effect stays, and the result is a working module."""
    for s in (PLAIN, SHARED):
        model = compile_plan(tiny_model(), select(describe(tiny_model().config), s, [0, 2]))
        model.kvcompile.graph.graph.lint()
        with torch.no_grad():
            cache = model(tiny_ids(1, 12)).past_key_values
        assert cache.evictions.events == 2
        unused = [n.name for n in model.kvcompile.graph.graph.nodes if not n.users and n.op == "call_module"]
        assert not unused


def test_a_copied_graph_is_independent() -> None:
    module, plan = traced()
    twin = copy.deepcopy(module)
    rewrite(twin, plan)
    assert len(observes(module.graph)) == 4
    assert not observes(twin.graph)


def test_compiling_in_threads_disturbs_nobody() -> None:
    """A trace patches `Module.__call__` for the whole process: other threads compile, and run models, meanwhile."""
    ids = tiny_ids(1, 8)
    with torch.no_grad():
        expected = {name: tiny_model(name)(ids).logits for name in ("llama", "qwen3")}
    plain, failures, stop = tiny_model(), [], threading.Event()
    models = {name: [tiny_model(name) for _ in range(4)] for name in expected}
    call = torch.nn.Module.__call__

    def compile_and_run(name: str) -> None:
        try:
            for model in models[name]:
                built = compile_plan(model, describe(model.config))
                with torch.no_grad():
                    torch.testing.assert_close(built(ids).logits, expected[name], atol=1e-5, rtol=1e-5)
        except Exception as error:
            failures.append(error)

    def run() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    assert torch.equal(plain(ids).logits, expected["llama"])
        except Exception as error:
            failures.append(error)

    runner = threading.Thread(target=run)
    compilers = [threading.Thread(target=compile_and_run, args=(name,)) for name in expected]
    runner.start()
    for thread in compilers:
        thread.start()
    for thread in compilers:
        thread.join()
    stop.set()
    runner.join()
    assert not failures, failures[0]
    assert torch.nn.Module.__call__ is call
