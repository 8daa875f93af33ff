"""Programs of fixed shape compute what the compiled model does: any prompt length, past the budget, in batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import compiled, stepped
from tiny import tiny_ids

from kvcompile.exporters.static.cache import PrefillCache
from kvcompile.exporters.static.capacity import Limits
from kvcompile.exporters.static.lower import Program
from kvcompile.exporters.static.quantized import entries_of
from kvcompile.exporters.static.selection import Entries
from kvcompile.graph.ops import rope

NEW = 34  # old tokens are encoded every 32
SNAPKV = ["stack.snapkv.window=8", "stack.snapkv.budget=0.3"]
KIVI = ["stack.kivi.group=4", "stack.kivi.residual=8"]
MLA = ["stack.mla.factor=weights", "stack.mla.select=high", "stack.mla.rope=8", "stack.mla.rank=20"]
ZIGZAG = [  # layers of the tiny models differ most like this
    "policy=zigzag",
    *(f"stack.zigzag.{x}" for x in ("score=expected_attention", "budget=0.4", "mass=0.3", "floor=0", "window=8")),
]
RETRIEVAL = [f"stack.retrieval_heads.{x}" for x in ("heads=[[0,1],[2,0]]", "recent=8", "budget=12", "decode_every=5")]
SHARES = "stack.head_budgets.shares=[[0.3,0.1],[0.0,0.2],[0.2,0.0],[0.1,0.1]]"
STACKS: dict[str, tuple[str, list[str]]] = {
    "dense": ("llama", []),
    "norms and sliding layers": ("gemma3_text", []),
    "soft-cap and sliding layers": ("gemma2", []),
    "all layers slide": ("mistral", []),
    "fused projections, partial rotation": ("phi3", []),
    "interleaved projections": ("gpt_neox", []),
    "layers without positions": ("smollm3", []),
    "streaming": ("llama", ["policy=streaming", "stack.streaming.budget=20"]),
    "streaming by share": (
        "llama",
        ["policy=streaming", "stack.streaming.budget=0.4", "stack.streaming.decode_every=3"],
    ),
    "snapkv": ("llama", ["policy=snapkv", *SNAPKV]),
    "snapkv while decoding": ("llama", ["policy=snapkv", *SNAPKV, "stack.snapkv.decode_every=4"]),
    "pyramidkv": ("llama", ["policy=pyramidkv", "stack.pyramidkv.budget=0.4"]),
    "knorm": ("llama", ["policy=knorm", "stack.knorm.budget=0.3"]),
    "keydiff": ("llama", ["policy=keydiff", "stack.keydiff.budget=24", "stack.keydiff.decode_every=6"]),
    "tova": ("llama", ["policy=tova", "stack.tova.budget=20"]),
    "h2o": ("llama", ["policy=h2o", "stack.h2o.budget=0.4", "stack.h2o.decode_every=5"]),
    "expected attention": ("llama", ["policy=expected_attention", "stack.expected_attention.budget=0.4"]),
    "expected attention, rotated": ("qwen3", ["policy=[expected_attention,rotate]"]),
    "heads of different lengths": ("llama", ["policy=retrieval_heads", *RETRIEVAL]),
    "heads as calibrated": ("llama", ["policy=[snapkv,head_budgets]", *SNAPKV, SHARES]),
    "heads that compete": ("llama", ["policy=[snapkv,adakv]", "stack.snapkv.window=8", "budget=0.3"]),
    "heads that compete, by expectation": ("qwen3", ["policy=[cla,adakv,rotate]", "stack.adakv.budget=16"]),
    "heads that compete under windows": ("mistral", ["policy=[adakv]", "stack.adakv.budget=9"]),
    "layers by uncertainty": ("llama", [*ZIGZAG, "stack.zigzag.scope=layer"]),
    "layers by uncertainty, capped": ("qwen3", [*ZIGZAG, "stack.zigzag.scope=layer", "stack.zigzag.share_cap=0.27"]),
    "heads by uncertainty": ("llama", [*ZIGZAG, "stack.zigzag.scope=head", "stack.zigzag.share_cap=0.15"]),
    "layers by uncertainty, their heads compete": (
        "llama",
        [*ZIGZAG, "stack.zigzag.scope=adaptive", "stack.zigzag.share_cap=0.3"],
    ),
    "layers by uncertainty, their heads compete for all": ("qwen3", [*ZIGZAG, "stack.zigzag.scope=adaptive"]),
    "layers by uncertainty, shared and rotated": ("llama", ["policy=[cla,zigzag,rotate]", *ZIGZAG[1:]]),
    "layers by uncertainty, some under windows": ("gemma3_text", [*ZIGZAG, "stack.zigzag.budget=0.5"]),
    "layers by uncertainty, in 4 bits": ("llama", ["policy=[zigzag,kivi]", *ZIGZAG[1:], *KIVI]),
    "selection under windows": ("gemma2", ["policy=snapkv", *SNAPKV, "stack.snapkv.decode_every=4"]),
    "8 bits": ("llama", ["policy=int8", "stack.int8.residual=5"]),
    "8 bits per channel, rotated": ("llama", ["policy=[rotate,kivi]", *KIVI, "stack.kivi.bits=8"]),
    "8 bits per channel, centred": ("qwen2", ["policy=[center,rotate,kivi]", *KIVI, "stack.kivi.bits=8"]),
    "4 bits after a selection": ("llama", ["policy=[snapkv,kivi]", *SNAPKV, *KIVI]),
    "8-bit floats": ("llama", ["policy=fp8"]),
    "structure": ("qwen3", ["policy=[mqa,cla]"]),
    "latents": ("smollm3", ["policy=mla", *MLA]),
    "latents under soft-cap and windows": ("gemma2", ["policy=mla", *MLA]),
    "latents after a selection": ("llama", ["policy=[mla,snapkv]", *MLA, *SNAPKV, "stack.snapkv.decode_every=4"]),
    "latents, expected attention": ("llama", ["policy=[mla,expected_attention]", *MLA]),
    "structure and selection": ("llama", ["policy=[gqa,mlkv,snapkv,rotate]", "stack.gqa.kv_heads=1", *SNAPKV]),
}


@pytest.mark.parametrize("name", STACKS)
def test_equal_to_the_compiled_model(name: str) -> None:
    model = compiled(*STACKS[name])
    program = Program(model, Limits(batch=2, prompt=48, new=NEW))
    for count in (3, 48):
        ids = tiny_ids(2, count)
        expected, kept = stepped(model, ids, NEW)
        logits, state = program.prefill(ids)
        _like_what_was_promised(program, state)
        if count == 48:
            assert _entries(program, state) == kept
        got = [logits[:, -1]]
        for token in expected[:, :-1].argmax(-1).unbind(1):
            got.append(program.decode(token[:, None], state)[:, -1])
        # encoding rounds: numbers that differ by float error may get neighbouring codes, a step of some value's range
        atol = 3e-2 if model.kvcompile.plan.layers[0].storage.quantized else 2e-4
        torch.testing.assert_close(torch.stack(got, 1), expected, atol=atol, rtol=1e-4)


def _like_what_was_promised(program: Program, state: dict[str, Any]) -> None:
    promised = program.empty()
    assert set(state) == set(promised)
    for name, tensor in promised.items():
        assert (state[name].shape, state[name].dtype) == (tensor.shape, tensor.dtype), name


def _entries(program: Program, state: dict[str, Any]) -> list[list[int]]:
    """Entries per row and layer that can be seen."""
    if program.rooms[0].shared:
        return [
            F.one_hot(state[f"heads_{r.plan.index}"][:, 0].long(), r.plan.kv_heads + 1)[..., :-1]
            .sum(1)
            .flatten()
            .tolist()
            for r in program.rooms
        ]
    names = [("positions", "code_positions") if r.codes else ("positions",) for r in program.rooms]
    return [
        sum((state[f"{name}_{r.plan.index}"] >= 0).sum(-1) for name in mine).flatten().tolist()  # type: ignore[union-attr]
        for r, mine in zip(program.rooms, names, strict=True)
    ]


def test_codes_are_those_of_the_compiled_model() -> None:
    model = compiled("llama", ["policy=[snapkv,kivi]", *SNAPKV, *KIVI, "stack.kivi.bits=8"])
    program, ids = Program(model, Limits(batch=2, prompt=64, new=40)), tiny_ids(2, 64)
    _, state = program.prefill(ids)
    layers = model(ids).past_key_values.layers
    for room in program.rooms:
        i = room.plan.index
        mine = {name.removesuffix(f"_{i}"): x for name, x in state.items() if name.endswith(f"_{i}")}
        held = entries_of(room, mine, Entries(mine["keys"], mine["values"], mine["positions"]))
        there = (held.positions >= 0).flatten()
        for got, column in ((held.keys, 0), (held.values, 1), (held.positions, 2)):
            expected = torch.cat([row[column] for row in layers[i].held.rows()])
            wrong = (got.flatten(0, 2)[there] - expected).abs() > 1e-3
            assert wrong.float().mean() < 1e-3  # float error may tip a code over, rarely


def test_queries_to_come_begin_at_the_next_position() -> None:
    """Over the long horizon of expected attention one position more or less would not show in what is kept."""
    program = Program(compiled("llama", ["policy=expected_attention"]), Limits(batch=1, prompt=8, new=2))
    cache = PrefillCache(program.plan, program.rooms, {}, program.rotaries, tiny_ids(1, 5))
    cos, sin = (x.mean(0) for x in program.rotaries[0](torch.tensor([5, 6])))
    row = torch.randn(16, generator=torch.Generator().manual_seed(0))
    turned = row @ cache._mean_rotation(program.plan.layers[0], 2)
    torch.testing.assert_close(turned, rope(row.view(1, 1, 1, 16), cos.view(1, 1, 16), sin.view(1, 1, 16)).flatten())


def test_a_full_cache_is_an_error_and_not_a_wrong_answer() -> None:
    program = Program(compiled("llama", []), Limits(batch=1, prompt=8, new=2))
    logits, state = program.prefill(tiny_ids(1, 8))
    for _ in range(2):
        logits = program.decode(logits[:, -1].argmax(-1, keepdim=True), state)
    with pytest.raises((IndexError, RuntimeError)):
        program.decode(logits[:, -1].argmax(-1, keepdim=True), state)


def test_encoded_rows_take_what_they_are_made_for_and_no_more() -> None:
    """A residual as long as can be before a flush; then a block past the limit, which would go where nobody reads."""
    program = Program(compiled("llama", ["policy=kivi", *KIVI]), Limits(batch=1, prompt=47, new=60))
    logits, state = program.prefill(tiny_ids(1, 47))
    read = state["code_positions_0"][..., : program.rooms[0].codes], state["positions_0"]
    seen = [47]

    def decode() -> None:
        for _ in range(80):
            program.decode(logits[:, -1].argmax(-1, keepdim=True), state)
            seen.append(sum(int((x[:, 0] >= 0).sum()) for x in read))

    with pytest.raises((IndexError, RuntimeError)):
        decode()
    assert seen == list(range(47, 47 + 60 + 1))


def test_capacity_follows_the_budget() -> None:
    over = ["policy=snapkv", "stack.snapkv.budget=0.25", "stack.snapkv.window=8"]
    program = Program(compiled("llama", over), Limits(batch=1, prompt=64, new=10))
    assert [r.capacity for r in program.rooms] == [26] * 4


@pytest.mark.parametrize(("scope", "cap"), [("layer", 25 / 80), ("head", 25 / 160), ("adaptive", 25 / 80)])
def test_room_is_what_the_cap_lets_a_layer_have(scope: str, cap: float) -> None:
    over = [*ZIGZAG, f"stack.zigzag.scope={scope}", "stack.zigzag.budget=20", f"stack.zigzag.share_cap={cap}"]
    program = Program(compiled("llama", over), Limits(batch=1, prompt=64, new=10))
    assert [r.shared for r in program.rooms] == [scope == "adaptive"] * 4
    assert [r.capacity // (2 if r.shared else 1) for r in program.rooms] == [25 + 10] * 4
    assert [r.budgets[64] for r in program.rooms] == [20] * 4
