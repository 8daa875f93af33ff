"""Healing closes the gap, stays in its budget, resumes exactly, merges LoRA exactly, and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from healing import QUICK, STEP, healed, learnt, words, written
from tiny import tiny_ids, tiny_model, tiny_tokenizer

import kvcompile
from kvcompile.compiler import assemble
from kvcompile.config.compose import compose
from kvcompile.errors import KvcompileError
from kvcompile.heal import optional
from kvcompile.heal.budget import Pace
from kvcompile.heal.corpus import Blocks, corpus
from kvcompile.job import compile_and_report
from kvcompile.progress import silent
from kvcompile.report import files


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("data"))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("stack", "share"),
    [
        (["policy=[mqa]"], 0.5),
        (["policy=[mlkv]"], 0.3),  # merges heads and shares layers
        (["policy=[mqa]", "heal.weights=lora", "heal.layers_lr=5e-3", "heal.lr=5e-3"], 0.5),
        (["policy=[mqa]", "heal.loss=lm"], 0.5),
        (["policy=[cla]", "heal.scope=all", "heal.layers=0", "heal.bf16=true"], 0.4),
    ],
    ids=lambda value: " ".join(value[0:2]) if isinstance(value, list) else None,
)
def test_the_loss_falls_and_the_gap_closes(data: Path, stack: list[str], share: float) -> None:
    model = healed(data, *stack, f"heal.tokens={80 * STEP}", "heal.lr=2e-3", "heal.layers_lr=3e-3")
    record = model.kvcompile.healed
    original, converted, after = record.perplexity
    assert converted > 1.2 * original, "there must be a gap to close"
    assert after < converted
    assert record.gap_closed > share
    for stage in {p.stage for p in record.curve}:
        losses = [p.loss for p in record.curve if p.stage == stage and p.loss is not None]
        assert min(losses[-3:]) < losses[0]
    assert record.steps == 80
    assert record.tokens == 80 * STEP


@pytest.mark.parametrize("how", [(), ("heal.lr=0.3",), ("heal.weights=lora",)], ids=str)
def test_what_the_record_says_is_what_the_model_does(data: Path, how: tuple[str, ...]) -> None:
    """The end is what counts, where it was better before too; whatever was frozen on the way is not any more."""
    from kvcompile.evaluation.perplexity import cached_perplexity
    from kvcompile.heal.corpus import held_out

    model = healed(data, "policy=[mqa]", f"heal.tokens={10 * STEP}", *how)
    record = model.kvcompile.healed
    if "heal.lr=0.3" in how:
        assert min(p.perplexity for p in record.curve if p.perplexity) < 0.9 * record.perplexity[2]
    config = compose([f"heal.dataset={data}", *QUICK, f"heal.tokens={10 * STEP}"])
    ids = held_out(config, tiny_tokenizer())
    assert cached_perplexity(model, ids, 24, 16, 4) == pytest.approx(record.perplexity[2], rel=1e-3)
    assert cached_perplexity(learnt(), ids, 24, 16, 4) == pytest.approx(record.perplexity[0], rel=1e-3)
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_of_one_layer_is_healed(data: Path) -> None:
    """It has no hidden states between layers to learn."""
    config = compose([f"heal.dataset={data}", *QUICK, "policy=[mqa]", f"heal.tokens={4 * STEP}"])
    model = assemble(tiny_model(num_hidden_layers=1), config, tiny_tokenizer())
    assert {p.stage for p in model.kvcompile.healed.curve} == {"layers", "model"}


def test_the_original_is_not_disturbed(data: Path) -> None:
    before = weights(learnt())
    healed(data, "policy=[mqa]", f"heal.tokens={3 * STEP}", "heal.scope=all", "heal.layers=0")
    after = weights(learnt())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad and p.grad is None for p in learnt().parameters())


def test_only_attention_is_trained_unless_all_is_asked_for(data: Path) -> None:
    plain = weights(kvcompile.compile(tiny_model(), overrides=["policy=[mqa]"]))
    for scope in ("attention", "all"):
        config = compose(
            [f"heal.dataset={data}", *QUICK, "policy=[mqa]", f"heal.tokens={2 * STEP}", f"heal.scope={scope}"]
        )
        trained = weights(assemble(tiny_model(), config, tiny_tokenizer()))
        changed = {name for name in plain if not torch.equal(plain[name], trained[name])}
        assert {name for name in plain if "_proj" in name and "self_attn" in name} <= changed
        assert ("model.embed_tokens.weight" in changed) == (scope == "all")


@pytest.mark.parametrize("how", ["full", "lora"])
def test_of_latents_every_matrix_is_trained_and_by_lora_those_of_linear_layers(data: Path, how: str) -> None:
    fitted = weights(healed(data, "policy=[mla]", "heal.tokens=0"))
    trained = weights(healed(data, "policy=[mla]", f"heal.tokens={8 * STEP}", f"heal.weights={how}"))
    changed = {name.split(".", 4)[-1] for name, x in trained.items() if not torch.equal(x, fitted[name])}
    per_head = {name.split(".", 4)[-1] for name in fitted if "absorb.weight" in name or "up.weight" in name}
    assert len(per_head) == 2
    assert per_head & changed == (per_head if how == "full" else set())
    assert any("down.weight" in name for name in changed)


def test_nothing_is_trained_without_tokens(data: Path) -> None:
    model = healed(data, "policy=[mqa]")
    assert model.kvcompile.healed is None


def test_an_interrupted_training_resumes_to_the_same_weights(data: Path, tmp_path: Path) -> None:
    stack = ["policy=[mqa]", f"heal.tokens={12 * STEP}", "heal.checkpoint_minutes=0", "heal.layers=0.4"]
    whole = healed(data, *stack)

    def stop(what: str, done: int, total: int) -> None:
        if what == "healing" and done >= 600:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        healed(data, *stack, workspace=tmp_path / "w", progress=stop)
    (kept,) = (tmp_path / "w").glob("checkpoint-*")
    assert 0 < int(kept.name.split("-")[1]) < 12
    (tmp_path / "w" / "checkpoint-99").mkdir()  # a save that was cut off
    resumed = healed(data, *stack, workspace=tmp_path / "w")
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], weight, rtol=0, atol=0)
    first, second = whole.kvcompile.healed, resumed.kvcompile.healed
    assert (first.steps, first.tokens, first.perplexity) == (second.steps, second.tokens, second.perplexity)
    assert second.curve[0].step == 0


def test_another_training_does_not_resume(data: Path, tmp_path: Path) -> None:
    stack = ["policy=[mqa]", f"heal.tokens={2 * STEP}"]
    healed(data, *stack, workspace=tmp_path / "w")
    assert healed(data, *stack, "heal.lr=1e-9", "heal.layers_lr=1e-9", workspace=tmp_path / "w").kvcompile.healed.steps
    fresh = healed(data, *stack, "heal.lr=1e-9", "heal.layers_lr=1e-9").kvcompile.healed
    again = healed(data, *stack, "heal.lr=1e-9", "heal.layers_lr=1e-9", workspace=tmp_path / "w").kvcompile.healed
    assert again.perplexity == fresh.perplexity
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(KvcompileError, match="folder of their own"):
        healed(data, *stack, workspace=tmp_path / "other")


def test_lora_merged_is_lora_beside() -> None:
    from kvcompile.adapters.architectures import describe
    from kvcompile.heal.lora import inject, merge
    from kvcompile.heal.student import student
    from kvcompile.models.sharing import shared

    model, ids = tiny_model(), tiny_ids(2, 20)
    base = shared(model)
    inject(base, [n for n, m in base.named_modules() if n.endswith(("q_proj", "v_proj"))], 4)
    pupil = student(base, describe(model.config), 1.0, 1.0)
    adapters = [p for n, p in pupil.named_parameters() if "lora_" in n]
    assert {s for m in pupil.modules() for s in getattr(m, "scaling", {}).values()} == {2.0}, "alpha is twice the rank"
    assert {id(p) for p in pupil.parameters() if p.requires_grad} == {id(p) for p in adapters}
    with torch.no_grad():
        for p in adapters:
            p.normal_(std=0.1)
        beside = pupil.kvcompile.graph(ids, None, torch.arange(20).expand(2, 20), pupil.new_cache(), slice(None))
        untouched = model(ids).logits
        assert merge(pupil) == 8
        merged = model(ids).logits
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(untouched, merged, atol=1e-2)


def test_budgets_of_time_and_tokens_are_kept(data: Path) -> None:
    model = healed(data, "policy=[mqa]", f"heal.tokens={10_000 * STEP}", "heal.minutes=0.03")
    record = model.kvcompile.healed
    assert 0 < record.steps < 10_000
    assert 1.8 <= record.seconds < 20
    assert {p.stage for p in record.curve} == {"layers", "model"}, "stages are shares of the time too"
    assert healed(data, "policy=[mqa]", f"heal.tokens={4 * STEP + 5}").kvcompile.healed.tokens == 4 * STEP
    two = healed(data, "policy=[mqa]", f"heal.tokens={4 * STEP}", "heal.accumulate=2").kvcompile.healed
    assert (two.steps, two.tokens) == (2, 4 * STEP), "a step is as many batches as are accumulated"


def test_accumulated_batches_are_one_batch(data: Path) -> None:
    stack = ["policy=[mqa]", "heal.loss=lm", f"heal.tokens={4 * STEP}"]
    one, four = (weights(healed(data, *stack, *how)) for how in ([], ["heal.batch=2", "heal.accumulate=4"]))
    for name, weight in one.items():
        torch.testing.assert_close(four[name], weight, rtol=1e-3, atol=1e-4)


def test_settings_reach_the_trainer() -> None:
    from kvcompile.heal.trainer import arguments

    heal = compose(["heal.bf16=true", "heal.batch=3", "heal.accumulate=5", "heal.lr=0.25", "heal.seed=11"]).heal
    made = arguments(heal, torch.device("cpu"))
    assert (made.bf16, made.per_device_train_batch_size, made.gradient_accumulation_steps) == (True, 3, 5)
    assert (made.learning_rate, made.seed, made.max_grad_norm) == (0.25, 11, 1.0)


def test_the_learning_rate_warms_up_and_falls_in_each_stage() -> None:
    pace = Pace(1000, None, 0.5)
    pace.start(0.0, 0)
    rates = []
    for step in range(1000):
        pace.at(step)
        rates.append(pace.rate(2.0, 1.0))
    for stage, peak in ((rates[:500], 2.0), (rates[500:], 1.0)):
        assert max(stage) == pytest.approx(peak)
        top = stage.index(max(stage))
        assert 20 <= top <= 30
        assert stage[:top] == sorted(stage[:top])
        assert stage[top:] == sorted(stage[top:], reverse=True)
        assert stage[-1] < 0.03 * peak


def test_a_slow_clock_ends_what_tokens_would_not() -> None:
    now = [0.0]
    pace = Pace(1000, 1.0, 0.3, clock=lambda: now[0])
    pace.start(20.0, 0)  # of an earlier session
    now[0] = 10.0
    pace.at(1)
    assert (pace.fraction, pace.stage, pace.spent) == (0.5, "model", False)
    assert pace.trained == "model", "a resumed training says what it is at, not what it began with"
    now[0] = 41.0
    pace.at(2)
    assert pace.spent


def test_blocks_cover_the_text_and_depend_on_the_seed_alone() -> None:
    ids = torch.arange(1000)
    blocks = Blocks(ids, 50, 38, seed=3)
    rows = [blocks[i]["input_ids"] for i in range(len(blocks))]
    assert all(len(row) == 50 and torch.equal(row, torch.arange(int(row[0]), int(row[0]) + 50)) for row in rows)
    once = {int(t) for row in rows[: blocks.each] for t in row}
    assert len(once) == blocks.each * 50, "no token twice in a round"
    assert [int(r[0]) for r in rows] == [int(Blocks(ids, 50, 38, seed=3)[i]["input_ids"][0]) for i in range(38)]
    rounds = [[divmod(int(row[0]), 50) for row in rows[i : i + blocks.each]] for i in (0, blocks.each)]
    first, second = ({offset for _, offset in found} for found in rounds)
    assert len(first) == len(second) == 1
    assert first != second, "another round is cut at other places"
    assert all(found != sorted(found) for found in rounds), "and read in an order of its own"
    assert [int(r[0]) for r in rows] != [int(Blocks(ids, 50, 38, seed=4)[i]["input_ids"][0]) for i in range(38)]
    with pytest.raises(KvcompileError, match="longer than two sequences"):
        Blocks(ids, 501, 1, 0)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "folder"])
def test_texts_of_any_format_are_read_and_their_end_is_held_out(kind: str, tmp_path: Path) -> None:
    import datasets

    rows = words(40)
    column = "text" if kind == "txt" else "body"
    made = datasets.Dataset.from_dict({"body": rows})
    path = tmp_path / f"data.{kind}"
    if kind == "txt":
        path.write_text("\n".join(rows) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    elif kind == "parquet":
        made.to_parquet(str(path))
    else:
        made.save_to_disk(str(path))
    heal = compose([f"heal.dataset={path}", f"heal.column={column}"]).heal
    found = corpus(heal, tiny_tokenizer())
    assert list(found.held_out) == rows[35:]
    assert sorted(found.train) == sorted(rows[:35])


def test_rows_without_a_text_are_skipped_and_what_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    heal = compose([f"heal.dataset={path}"]).heal
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("w5 w6", None, "w7", "w8")))
    found = corpus(heal, tiny_tokenizer())
    assert (sorted(found.train), list(found.held_out)) == (["w5 w6", "w7"], ["w8"])
    path.write_text('{"text": [{"role": "user", "content": "w5"}]}\n' * 2)
    with pytest.raises(KvcompileError, match=r"heal\.column must hold text, got 'text' with a list"):
        list(corpus(heal, tiny_tokenizer()).train)


def test_offline_text_is_split_and_nothing_held_out_is_trained_on() -> None:
    found = corpus(compose().heal, tiny_tokenizer())
    train, held = set(found.train), set(found.held_out)
    assert not train & held
    assert len(train) > 6 * len(held) > 600


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policy=[streaming]", "budget=12"], "healing needs a policy that converts weights"),
        (["policy=[mqa]", "heal.column=body"], "heal.column must be a column .* 'body'. Fix: one of text"),
        (["policy=[mqa]", "heal.dataset=/nowhere/x.json"], "no such path"),
        (["policy=[mqa]", "heal.batch=1000"], "heal.tokens must be enough for one step of training"),
        (["policy=[mqa]", "heal.length=5000", "heal.batch=1", "heal.tokens=5000"], "longer than two sequences"),
    ],
)
def test_mistakes_are_one_line(data: Path, overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(KvcompileError, match=message) as caught:
        healed(data, f"heal.tokens={2 * STEP}", *overrides, workspace=tmp_path / "outputs" / "w")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_missing_tokenizer_is_refused_before_a_weight_is_converted() -> None:
    model = tiny_model()
    before, attention = weights(model), model.model.layers[0].self_attn
    with pytest.raises(KvcompileError, match=r"healing needs a tokenizer, got none\. Fix: pass tokenizer="):
        kvcompile.compile(model, overrides=["policy=[mqa]", f"heal.tokens={2 * STEP}"])
    after = weights(model)
    assert model.model.layers[0].self_attn is attention
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("name", "override"), [("peft", "heal.weights=lora"), ("datasets", "heal.weights=full")])
def test_a_missing_package_is_one_line(name: str, override: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = optional.importlib.util.find_spec
    monkeypatch.setattr(optional.importlib.util, "find_spec", lambda n: None if n == name else found(n))
    with pytest.raises(KvcompileError, match=rf"needs the {name} package.*pip install kvcompile\[heal\]"):
        healed(data, "policy=[mqa]", f"heal.tokens={2 * STEP}", override)


@pytest.mark.parametrize(
    "wrong", ["heal.loss=kl", "heal.weights=half", "heal.layers=2", "heal.minutes=0", "heal.rank=0"]
)
def test_settings_out_of_range_are_refused(wrong: str) -> None:
    with pytest.raises(KvcompileError, match=wrong.split("=")[0]):
        compose([wrong])


def test_the_report_shows_the_way_and_the_artifact_holds_the_healed_weights(data: Path, tmp_path: Path) -> None:
    from kvcompile.models.sharing import shared

    config = compose(
        [
            *QUICK,
            f"heal.dataset={data}",
            "policy=[mqa,streaming]",
            "budget=20",
            f"heal.tokens={20 * STEP}",
            "needle.enabled=false",
            "speed.enabled=false",
            f"output={tmp_path / 'out'}",
        ]
    )
    outcome = compile_and_report(shared(learnt()), tiny_tokenizer(), config, silent)
    made = files.read(tmp_path / "out")
    assert made.healed is not None
    assert made.healed.curve[0].perplexity == made.healed.perplexity[1] == outcome.summary["perplexity_converted"]
    assert made.perplexity[0] == pytest.approx(made.healed.perplexity[0], rel=1e-3)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Healing" in text
    assert "of the gap closed" in text
    assert not (tmp_path / "out-heal").exists(), "checkpoints go when the artifact is there"
    loaded = kvcompile.load(tmp_path / "out")
    plain = weights(kvcompile.compile(shared(learnt()), overrides=["policy=[mqa]"]))
    assert not torch.equal(
        loaded.model.layers[0].self_attn.k_proj.weight, plain["model.layers.0.self_attn.k_proj.weight"]
    )
