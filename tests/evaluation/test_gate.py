"""A compile that loses too much fails, leaves its report and no artifact; what is good enough passes."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import tiny_model, tiny_tokenizer

import kvcompile
from kvcompile import compiler, job
from kvcompile.build import plan_of
from kvcompile.config.compose import compose
from kvcompile.config.schema import GateConfig
from kvcompile.config.sweep import collect, run_job, summary_table
from kvcompile.errors import KvcompileError, QualityError
from kvcompile.evaluation.needle import NeedleRecord, NeedleResult, NeedleTask
from kvcompile.evaluation.proof import LayerRow
from kvcompile.heal.record import HealRecord
from kvcompile.job import compile_and_report, judge
from kvcompile.progress import silent
from kvcompile.report import files, report
from kvcompile.report.report import Report

QUICK = ["needle.enabled=false", "speed.enabled=false"]
SMALL = ["perplexity.context=40", "perplexity.tokens=8", "perplexity.windows=2"]


def needle(right: int, of: int = 4) -> NeedleResult:
    return NeedleResult(tuple(NeedleRecord("magic", 9, 9, 0.5, "1", "1", i < right) for i in range(of)))


@pytest.fixture
def made() -> Report:
    row = LayerRow(0, 1, [9], [9], 90, 90, 90)
    scores = (needle(4), needle(3))
    hidden = (needle(4), needle(1))
    return Report(
        "t",
        "m",
        "r",
        ["p"],
        9,
        [row],
        needle=scores,
        needle_hidden=hidden,
        perplexity=(10.0, 11.0),
        parameters=(100, 90),
    )


def compiled(folder: Path, *overrides: str) -> Any:
    config = compose([*QUICK, *SMALL, f"output={folder}", *overrides])
    return compile_and_report(tiny_model(), tiny_tokenizer(), config, silent)


@pytest.mark.parametrize(
    "wanted", [GateConfig(), GateConfig(max_ppl_increase=0.1), GateConfig(min_needle=0.75), GateConfig(0.2, 0.5, 0.25)]
)
def test_what_is_good_enough_passes(made: Report, wanted: GateConfig, tmp_path: Path) -> None:
    judge(made, wanted, tmp_path / "out", "recipe")
    judge(replace(made, perplexity=(10.0, 10.0)), GateConfig(0.0), tmp_path / "out", "recipe")  # nothing is lost
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "wanted", "said"),
    [
        ({}, GateConfig(max_ppl_increase=0.09), r"10.000 -> 11.000 \(\+10.0%\)"),
        ({"perplexity": (10.0, math.nan)}, GateConfig(max_ppl_increase=9), "max_ppl_increase"),
        ({}, GateConfig(min_needle=0.8), "80% of the uncompressed model's needle score must be left, got 100% -> 75%"),
        ({}, GateConfig(0.2, 0.5, 0.3), "gate.min_needle_hidden: 30% .* with the question hidden, .* 100% -> 25%"),
        ({"needle": (needle(0), needle(0))}, GateConfig(min_needle=0.1), "must answer some"),
        ({}, GateConfig(0.01, 0.9), "max_ppl_increase.*; gate.min_needle"),
    ],
)
def test_what_is_not_fails_and_keeps_its_report(
    made: Report, change: dict[str, Any], wanted: GateConfig, said: str, tmp_path: Path
) -> None:
    made = replace(made, **change)
    with pytest.raises(QualityError, match=said) as caught:
        judge(made, wanted, tmp_path / "out", "the recipe")
    place = tmp_path / "out-failed"
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["out-failed"]
    assert files.read(place).parameters == made.parameters
    assert (place / "recipe.yaml").read_text() == "the recipe"
    assert caught.value.summary["perplexity_before"] == 10.0


def test_a_second_failure_replaces_the_first_and_nothing_else(made: Report, tmp_path: Path) -> None:
    for tokens in (9, 8):
        with pytest.raises(QualityError):
            judge(replace(made, tokens=tokens), GateConfig(0.0), tmp_path / "out", "r")
    assert files.read(tmp_path / "out-failed").tokens == 8
    (tmp_path / "out-failed" / "mine.txt").write_text("x")
    with pytest.raises(KvcompileError, match="other files"):
        judge(made, GateConfig(0.0), tmp_path / "out", "r")
    assert (tmp_path / "out-failed" / "mine.txt").read_text() == "x"


def test_a_compile_reports_parameters_bytes_and_perplexity_before_and_after(tmp_path: Path) -> None:
    outcome = compiled(tmp_path / "out", "policy=[mqa]")
    row, made = outcome.summary, files.read(tmp_path / "out")
    before = tiny_model().num_parameters()
    assert (row["parameters_before"], row["parameters_after"]) == (before, before - 4 * 2 * 16 * 64)
    assert row["bytes_per_token_before"] == 4 * 2 * 2 * 16 * 4  # layers, K and V, heads, dim, fp32; positions on top
    assert row["bytes_per_token_after"] * 2 == row["bytes_per_token_before"]
    assert row["perplexity_before"] != row["perplexity_after"]
    text = (tmp_path / "out" / "report.md").read_text()
    for name in ("parameters", "cache per prompt token", "perplexity, cached"):
        assert f"| {name}" in text
    assert made.perplexity == (row["perplexity_before"], row["perplexity_after"])
    kvcompile.load(tmp_path / "out")


def test_a_conversion_that_hurts_says_how_to_heal_it(made: Report) -> None:
    plan = plan_of(tiny_model().config, "float32", compose([]), compose(["policy=[cla]"]).policies())
    model = SimpleNamespace(kvcompile=SimpleNamespace(plan=plan), device=torch.device("cpu"))
    for after, said in ((11.5, ["cla: the weights were converted"]), (math.nan, ["cla"]), (10.5, [])):
        found = job.warnings(model, replace(made, perplexity=(10.0, after)))
        assert len(found) == len(said)
        assert all(text in one for text, one in zip(said, found, strict=True))
    healed = HealRecord("lm", "full", "text", 1, 1, 1.0, 1, (10.0, 12.0, 11.5))
    assert job.warnings(model, replace(made, perplexity=(10.0, 11.5), healed=healed)) == []


def test_a_block_transformer_is_called_useless_until_it_is_healed(made: Report) -> None:
    """Whatever its perplexity, which a few windows do not tell."""
    policies = compose(["policy=[block_transformer,snapkv]"]).policies()
    plan = plan_of(tiny_model().config, "float32", compose([]), policies)
    model = SimpleNamespace(kvcompile=SimpleNamespace(plan=plan), device=torch.device("cpu"))
    note, warning = job.warnings(model, replace(made, perplexity=(10.0, 10.0)))
    assert "layers 0 to 1 is a block of 4 tokens, also where snapkv counts tokens" in note
    assert "useless" in warning
    assert "recipe=block_transformer_heal" in warning
    healed = HealRecord("lm", "full", "text", 1, 1, 1.0, 1, (10.0, 12.0, 11.5))
    assert job.warnings(model, replace(made, perplexity=(10.0, 11.5), healed=healed)) == [note]


def test_queries_that_are_turned_on_beyond_the_trained_length_are_told_of(made: Report) -> None:
    config = tiny_model().config  # 512 positions
    plan = plan_of(config, "float32", compose([]), compose(["policy=[ghost,global_topk]"]).policies())
    model = SimpleNamespace(kvcompile=SimpleNamespace(plan=plan), device=torch.device("cpu"), config=config)
    (warning,) = job.warnings(model, replace(made, tokens=100))
    assert warning.startswith("ghost: queries of 100 tokens, turned on by 512 positions, stand beyond the 512 that")
    plan = plan_of(config, "float32", compose([]), compose(["policy=[ghost]", "stack.ghost.shift=400"]).policies())
    model.kvcompile = SimpleNamespace(plan=plan)
    assert job.warnings(model, replace(made, tokens=100)) == []


def test_a_dense_compile_has_the_perplexity_of_the_model(tmp_path: Path) -> None:
    before, after = files.read(Path(compiled(tmp_path / "out").path)).perplexity or (0, 1)
    assert after == pytest.approx(before, rel=1e-4)


def test_a_failed_compile_leaves_no_artifact_and_an_earlier_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(tmp_path / "out", "policy=[random]", "budget=0.5")
    kept = (tmp_path / "out" / "manifest.json").read_bytes()
    monkeypatch.setattr(job, "_perplexity", lambda *_: (10.0, 11.0))  # of random weights it may fall
    with pytest.raises(QualityError):
        compiled(tmp_path / "out", "policy=[random]", "budget=0.1", "gate.max_ppl_increase=0")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == kept
    with pytest.raises(KvcompileError, match=r"manifest\.json"):
        kvcompile.load(tmp_path / "out-failed")


def test_a_text_of_the_users_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long.txt").write_text(" ".join(f"W{i} is followed by w5 and then by w6 here." for i in range(40)))
    (tmp_path / "short.txt").write_text("One sentence is far too little.")
    own = compiled(tmp_path / "own", f"perplexity.source={tmp_path / 'long.txt'}").summary["perplexity_before"]
    assert own != compiled(tmp_path / "offline").summary["perplexity_before"]
    monkeypatch.setattr(compiler, "assemble", lambda *_: pytest.fail("told after the work"))
    with pytest.raises(KvcompileError, match="the text must hold"):
        compiled(tmp_path / "out", f"perplexity.source={tmp_path / 'short.txt'}")
    monkeypatch.setattr(NeedleTask, "prompts", lambda *_: pytest.fail("asked"))
    with pytest.raises(pytest.fail.Exception, match="asked"):
        compiled(tmp_path / "out", "needle.enabled=true")


def test_a_place_that_is_taken_is_told_before_the_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for output, said in (("thesis.tex", "a file"), ("thesis.tex/out", "can be written to"), (".", "other files")):
        with pytest.raises(KvcompileError, match=said):
            job.compile_config(compose(["model.pretrained=/nowhere", f"output={tmp_path / output}"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gate.max_ppl_increase=-1"], "gate.max_ppl_increase must be 0 or more"),
        (["gate.min_needle=2"], "gate.min_needle must be in"),
        (["gate.min_needle=0.5", "needle.enabled=false"], "a gate needs .*Fix: needle.enabled=true"),
        (["gate.min_needle_hidden=2"], "gate.min_needle_hidden must be in"),
        (["gate.min_needle_hidden=0.5", "needle.enabled=false"], "a gate needs .*Fix: needle.enabled=true"),
        (["needle.haystacks=[]"], "needle.haystacks must be one or more"),
        (["gate.max_ppl_increase=0.5", "perplexity.enabled=false"], "Fix: perplexity.enabled=true"),
        (["perplexity.tokens=0"], "perplexity.tokens must be 1 or more"),
    ],
)
def test_gates_that_make_no_sense_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(KvcompileError, match=message):
        compose(overrides)


def test_a_sweep_shows_the_numbers_of_a_job_that_failed_the_gate(made: Report, tmp_path: Path) -> None:
    def fail() -> Any:
        judge(made, GateConfig(max_ppl_increase=0.01), tmp_path / "out", "r")

    run_job(tmp_path / "0", 0, ["recipe=a"], lambda: ("out", report.summary(replace(made, perplexity=(10.0, 10.0)))))
    run_job(tmp_path / "1", 1, ["recipe=b"], fail)
    out = io.StringIO()
    Console(file=out, width=200).print(summary_table(collect(tmp_path)))
    assert "perplexity" in out.getvalue()
    assert "10 > 11" in out.getvalue()
    assert collect(tmp_path)[1].output == str(tmp_path / "out-failed")
