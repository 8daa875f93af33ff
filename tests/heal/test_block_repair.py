"""Healing a block transformer closes the gap, trains what it should, and resumes exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks_reference import logits_of
from healing import QUICK, STEP, learnt, written
from healing import healed as by_recipe
from tiny import tiny_tokenizer
from torch.nn.functional import cross_entropy

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.config.compose import compose
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.heldout import windows
from kvcompile.evaluation.perplexity import cached_perplexity
from kvcompile.heal.corpus import Blocks as Sequences
from kvcompile.heal.corpus import held_out
from kvcompile.heal.record import HealRecord
from kvcompile.heal.repair import repair
from kvcompile.job import compile_and_report
from kvcompile.models.sharing import shared
from kvcompile.plan.blocks import Blocks
from kvcompile.progress import Progress, silent
from kvcompile.report import files
from kvcompile.structure.convert import convert

BLOCKS = Blocks(length=4, split=2)
QUICK_BLOCKS = [*QUICK, "heal.layers=0", "heal.scope=all", "heal.lr=5e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("data"))


def healed(
    data: Path, *overrides: str, workspace: Path | None = None, progress: Progress = silent
) -> tuple[Any, HealRecord]:
    """The learnt model as a block transformer, uncompiled, trained by these overrides."""
    original, model = shared(learnt()), shared(learnt())
    plan = replace(describe(model.config), blocks=BLOCKS)
    convert(model, plan)
    config = compose([f"heal.dataset={data}", *QUICK_BLOCKS, *overrides])
    return model, repair(model, original, plan, config, tiny_tokenizer(), progress, workspace)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unhealed() -> dict[str, torch.Tensor]:
    model = shared(learnt())
    convert(model, replace(describe(model.config), blocks=BLOCKS))
    return weights(model)


@pytest.mark.parametrize(
    ("how", "share"),
    [
        ((), 0.8),
        (("heal.loss=lm", "heal.layers=0.3", "heal.pad_first_block=false"), 0.8),
        (("heal.hidden=0", "heal.bf16=true"), 0.8),
        (("heal.weights=lora", "heal.rank=32", "heal.lr=2e-2"), 0.6),
    ],
    ids=str,
)
def test_the_loss_falls_and_the_gap_closes(data: Path, how: tuple[str, ...], share: float) -> None:
    _, record = healed(data, f"heal.tokens={100 * STEP}", *how)
    losses = [p.loss for p in record.curve if p.loss is not None]
    assert min(losses[-3:]) < losses[0]
    assert record.perplexity[1] > 2 * record.perplexity[0], "there must be a gap to close"
    assert record.gap_closed > share
    assert {p.stage for p in record.curve} == {"model"}


def test_what_the_record_says_is_what_the_definition_gives(data: Path) -> None:
    model, record = healed(data, f"heal.tokens={5 * STEP}")
    config = compose([f"heal.dataset={data}", *QUICK, f"heal.tokens={5 * STEP}"])
    ids = held_out(config, tiny_tokenizer())
    losses = []
    with torch.no_grad():
        for row in windows(model, ids, config.perplexity):
            losses.append(cross_entropy(logits_of(model, BLOCKS, row)[-17:-1], row[-16:]))
    assert math.exp(torch.stack(losses).mean().item()) == pytest.approx(record.perplexity[2], rel=1e-4)


@pytest.mark.parametrize(
    ("how", "kept", "changed"),
    [
        (("heal.scope=attention",), ("mlp.up_proj", "embed_tokens", "norm"), ("q_proj", "block_")),
        ((), (), ("q_proj", "mlp.up_proj", "embed_tokens", "norm", "block_")),
        (("heal.weights=lora",), ("embed_tokens", "norm"), ("q_proj", "mlp.up_proj", "block_")),
        (("heal.weights=lora", "heal.scope=attention"), ("mlp.up_proj", "embed_tokens"), ("q_proj", "block_")),
    ],
    ids=str,
)
def test_the_new_modules_are_always_trained_the_rest_by_its_scope(
    data: Path, how: tuple[str, ...], kept: tuple[str, ...], changed: tuple[str, ...]
) -> None:
    before, original = unhealed(), weights(learnt())
    model, _ = healed(data, f"heal.tokens={3 * STEP}", *how)
    after = weights(model)
    assert before.keys() == after.keys()
    for name in before:
        if any(part in name for part in changed):
            assert not torch.equal(before[name], after[name]), name
        if any(part in name for part in kept):
            assert torch.equal(before[name], after[name]), name
    assert all(torch.equal(original[name], weight) for name, weight in weights(learnt()).items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_interrupted_training_resumes_to_the_same_weights(data: Path, tmp_path: Path) -> None:
    """Also what is drawn for each sequence: how much of its first block is empty."""
    stack = [f"heal.tokens={10 * STEP}", "heal.checkpoint_minutes=0"]
    whole, first = healed(data, *stack)

    def stop(what: str, done: int, total: int) -> None:
        if what == "healing" and done >= 600:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        healed(data, *stack, workspace=tmp_path / "w", progress=stop)
    (kept,) = (tmp_path / "w").glob("checkpoint-*")
    assert 0 < int(kept.name.split("-")[1]) < 10
    resumed, second = healed(data, *stack, workspace=tmp_path / "w")
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], weight, rtol=0, atol=0)
    assert (first.steps, first.tokens, first.perplexity) == (second.steps, second.tokens, second.perplexity)


def test_the_time_budget_is_kept(data: Path) -> None:
    _, record = healed(data, f"heal.tokens={10_000 * STEP}", "heal.minutes=0.02")
    assert 0 < record.steps < 10_000


def test_padding_is_drawn_by_the_seed_alone_and_moves_nothing_else() -> None:
    ids = torch.arange(1000, dtype=torch.int64, device="cpu")
    plain, padded = Sequences(ids, 50, 200, seed=3), Sequences(ids, 50, 200, seed=3, pads=3)
    assert all(torch.equal(plain[i]["input_ids"], padded[i]["input_ids"]) for i in range(200))
    drawn = [int(padded[i]["padding"]) for i in range(200)]
    assert set(drawn) == {0, 1, 2, 3}
    assert drawn == [int(Sequences(ids, 50, 200, seed=3, pads=3)[i]["padding"]) for i in range(200)]
    assert "padding" not in plain[0]


def test_attentions_alone_are_refused(data: Path) -> None:
    with pytest.raises(KvcompileError, match=r"cannot learn alone.*heal\.layers=0\.3\. Fix: heal\.layers=0"):
        healed(data, f"heal.tokens={2 * STEP}", "heal.layers=0.3")


STACKS = (["block_transformer"], ["gqa", "block_transformer"], ["cla", "block_transformer"])


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_what_is_trained_is_what_runs(data: Path, stack: list[str]) -> None:
    """Through the policy: token by token over the cache, the compiled model is as good as its record says."""
    overrides = [f"policy=[{','.join(stack)}]", f"heal.tokens={20 * STEP}", "heal.layers=0", "heal.scope=all"]
    compiled = by_recipe(data, *overrides, "heal.lr=5e-3")
    record = compiled.kvcompile.healed
    config = compose([f"heal.dataset={data}", *QUICK, f"heal.tokens={20 * STEP}"])
    ids = held_out(config, tiny_tokenizer())
    assert record.perplexity[2] < 0.7 * record.perplexity[1]
    assert cached_perplexity(compiled, ids, 24, 16, 4) == pytest.approx(record.perplexity[2], rel=1e-3)


def test_the_recipe_ends_in_an_artifact_with_what_was_learnt(data: Path, tmp_path: Path) -> None:
    settings = [f"heal.tokens={5 * STEP}", "needle.enabled=false", "speed.tokens=8", "speed.context=32"]
    recipe = ["recipe=block_transformer_heal", f"heal.dataset={data}", f"output={tmp_path / 'out'}"]
    config = compose([*recipe, *QUICK, *settings])
    compile_and_report(shared(learnt()), tiny_tokenizer(), config, silent)
    loaded = kvcompile.load(tmp_path / "out")
    report = files.read(tmp_path / "out")
    assert report.healed is not None
    ids = held_out(config, tiny_tokenizer())
    assert cached_perplexity(loaded, ids, 24, 16, 4) == pytest.approx(report.healed.perplexity[2], rel=1e-3)
    assert not (tmp_path / "out-heal").exists()
