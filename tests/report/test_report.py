"""Protects the report: nothing it is given gets lost or hidden, and a cache that is not as planned is an error."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from kvcompile.errors import KvcompileError
from kvcompile.evaluation.needle import NeedleRecord, NeedleResult
from kvcompile.evaluation.proof import LayerRow, verify
from kvcompile.evaluation.speed import Comparison, Speed
from kvcompile.report.files import read, show, write
from kvcompile.report.report import Report, summary

TOKEN = 512  # bytes of one token of one head


def row(layer: int, kept: list[int], planned: list[int] | None = None, **more: object) -> LayerRow:
    planned_bytes = sum(planned or kept) * TOKEN
    return LayerRow(layer, len(kept), kept, planned, sum(kept) * TOKEN, planned_bytes, len(kept) * 100 * TOKEN, **more)


def needle(*right: bool) -> NeedleResult:
    return NeedleResult(
        tuple(
            NeedleRecord("magic", 100, 99, depth, "1234567", " 1234567." if ok else " [/b] 12|3", ok)
            for depth, ok in zip((0.1, 0.5, 0.9), right, strict=True)
        )
    )


def speed(prefill_s: float, step_s: float, cache_bytes: int) -> Speed:
    return Speed(1, 100, 4, prefill_s, step_s, step_s, cache_bytes, 2 * cache_bytes)


@pytest.fixture
def report() -> Report:
    return Report(
        title="zigzag [a|b] on llama",
        model="tiny_llama",
        recipe="zigzag",
        policies=["zigzag", "adakv"],
        tokens=100,
        rows=[row(0, [20, 20], [20, 20]), row(1, [7, 41]), row(2, [10, 22])],
        planned_total=80,
        machine="one core",
        versions={"torch": "2.13"},
        kernels=["sdpa"] * 3,
        passes={"swap": 3},
        needle=(needle(True, True, True), needle(True, False, True)),
        needle_hidden=(needle(True, True, True), needle(False, False, True)),
        speed=Comparison(
            {"original": speed(2.0, 0.1, 300 * TOKEN), "compiled": speed(2.6, 0.05, 120 * TOKEN)},
            decode_ratio={"original": 1.0, "compiled": 2.0},
            prefill_ratio={"original": 1.0, "compiled": 0.77},
            cache_ratio={"original": 1.0, "compiled": 2.5},
        ),
        perplexity=(15.0, 15.5),
        warnings=["only one [form] was tried"],
    )


def coloured(report: Report) -> str:
    out = io.StringIO()
    show(report, Console(file=out, width=160, force_terminal=True, color_system="standard"))
    return out.getvalue()


def line(text: str, start: str) -> str:
    return next(part for part in text.splitlines() if start in part)


def test_what_a_replay_reads_again_stands_below_the_time_of_a_prefill(report: Report) -> None:
    assert "read again" not in coloured(report)
    assert report.speed is not None
    replayed = replace(report.speed.speeds["compiled"], read_again=130)
    speeds = {**report.speed.speeds, "compiled": replayed}
    lines = coloured(replace(report, speed=replace(report.speed, speeds=speeds))).splitlines()
    at = next(i for i, text in enumerate(lines) if "prefill, 100 tokens" in text)
    assert "130 tokens, 1.30 prefills" in lines[at + 1]


def test_what_is_written_is_read_back(report: Report, tmp_path) -> None:
    paths = write(report, tmp_path)
    assert [p.name for p in paths] == ["report.json", "report.md", "report.png"]
    assert read(tmp_path) == report
    bare = replace(report, needle=None, needle_hidden=None, speed=None, perplexity=None, planned_total=None)
    write(bare, tmp_path)
    assert read(tmp_path) == bare


def test_a_report_of_before_is_read(report: Report, tmp_path) -> None:
    """It told no text, and asked no hidden question."""
    write(report, tmp_path)
    old = json.loads((tmp_path / "report.json").read_text())
    del old["needle_hidden"]
    for result in old["needle"]:
        for record in result["records"]:
            del record["haystack"]
    (tmp_path / "report.json").write_text(json.dumps(old))
    assert read(tmp_path) == replace(report, needle_hidden=None)
    write(read(tmp_path), tmp_path)


def test_the_picture_is_one(report: Report, tmp_path) -> None:
    import matplotlib.image

    write(report, tmp_path)
    wide = matplotlib.image.imread(tmp_path / "report.png")
    write(replace(report, needle=None, needle_hidden=None), tmp_path)
    narrow = matplotlib.image.imread(tmp_path / "report.png")
    assert wide.shape[1] > narrow.shape[1] > 500  # one panel fewer
    assert wide[..., :3].std() > 0.1


def test_markdown_has_every_head_and_marks_the_losses(report: Report, tmp_path) -> None:
    write(report, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "zigzag \\[a\\|b\\] on llama" in text
    assert "only one \\[form\\] was tried" in text
    assert "| 7 41 " in text
    assert "| 20 each " in text
    assert "1 layer: every head, 2 layers: 80 tokens" in text
    assert "**67% (21-94)** (worse)" in line(text, "needle, question seen")
    assert "100% (44-100)" in line(text, "needle, question seen")
    assert "**33% (6-79)** (worse)" in line(text, "needle, question hidden")
    assert line(text, "| all (3 prompts)").count("(worse)") == 2
    assert "**15.500** (worse)" in line(text, "perplexity")
    assert "**2.60 s** (worse)" in line(text, "prefill")
    assert "worse" not in line(text, "decode, 100")
    assert "**\\[/b\\] 12\\|3** (wrong)" in text


def test_a_layer_that_reads_another_is_shown_as_one(report: Report, tmp_path) -> None:
    shared = replace(report, rows=[report.rows[0], row(1, [0, 0], [0, 0], owner=0)])
    write(shared, tmp_path)
    assert read(tmp_path) == shared
    cells = [
        [cell.strip() for cell in part.split("|")[1:4]]
        for part in (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
        if part.startswith(("| 1 ", "| all "))
    ]
    assert cells[-2:] == [["1", "", "reads layer 0"], ["all", "2", ""]]


def recalling(report: Report) -> Report:
    """Two layers that keep all of 100 tokens, one of which reads a tenth of them beside its index."""
    dense = {"read": 202 * TOKEN, "planned_read": 202 * TOKEN, "dense_read": 202 * TOKEN}
    groups = {"index_bytes": 10 * TOKEN, "planned_index": 10 * TOKEN, "recalls": True, "cluster_recall": 0.25}
    part = {**dense, **groups, "read": 32 * TOKEN, "planned_read": 32 * TOKEN}
    return replace(report, rows=[row(0, [100, 100], [100, 100], **dense), row(1, [100, 100], [100, 100], **part)])


def test_what_is_kept_and_what_is_read_stand_side_by_side(report: Report, tmp_path) -> None:
    """Held on the device, held in host memory, read per step: kept whole and read in part is seen at a glance."""
    made = recalling(report)
    write(made, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert read(tmp_path) == made
    assert "kept 100.0%, read 57.9%" in line(text, "kept, and read")
    assert "5 KiB" in line(text, "index of its groups")
    assert "205 KiB" in line(text, "on the device between tokens")
    assert "-42.1%" in line(text, "read per decode step")
    assert [cell.strip() for cell in line(text, "| all  ").split("|")[-5:-1]] == ["5 KiB", "117 KiB", "57.9%", "25.0%"]
    assert "25.0%" in line(text, "cluster recall"), "of the layers that have a choice"
    numbers = summary(made)
    assert (numbers["device_bytes"], numbers["host_bytes"], numbers["read_bytes"]) == (410 * TOKEN, 0, 234 * TOKEN)
    assert (numbers["kept"], numbers["read"], numbers["cluster_recall"]) == (1.0, 234 / 404, 0.25)


def test_reports_without_recall_have_no_columns_of_it(report: Report, tmp_path) -> None:
    write(report, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "index" not in text
    assert "kept, and read" not in text


def test_one_prompt_has_one_size(report: Report) -> None:
    """The cache of the timed prompt is a row of its own only where it is another prompt."""
    assert "cache, 100 tokens" not in coloured(report)
    assert "cache, 100 tokens" in coloured(replace(report, tokens=99))


def test_large_losses_are_factors(report: Report) -> None:
    text = line(coloured(replace(report, perplexity=(15.835, 240201.3))), "perplexity")
    assert "240,201" in text
    assert "15,169x" in text


def test_the_screen_shows_losses_in_red_and_savings_in_green(report: Report) -> None:
    text = coloured(report)
    red, green = "\x1b[1;31m", "\x1b[32m"
    for loss in ("needle, question seen", "needle, question hidden", "depth 50%", "perplexity", "prefill"):
        assert red in line(text, loss)
    for gain in ("cache after 100", "decode, 100"):
        assert green in line(text, gain)
        assert red not in line(text, gain)
    assert "zigzag [a|b] on llama" in text
    assert "only one [form] was tried" in text


def test_equal_scores_and_noise_are_neither(report: Report) -> None:
    same = needle(True, True, True)
    noisy = replace(report.speed, prefill_ratio={"original": 1.0, "compiled": 0.97})
    text = coloured(
        replace(
            report, needle=(same, same), needle_hidden=(same, same), speed=noisy, perplexity=(15.0, 15.0), warnings=[]
        )
    )
    assert "\x1b[1;31m" not in text


def test_a_perplexity_that_is_no_number_is_a_loss(report: Report) -> None:
    text = coloured(replace(report, perplexity=(15.0, float("nan"))))
    assert "\x1b[1;31m" in line(text, "perplexity")


def test_summary_has_the_numbers_of_a_sweep(report: Report) -> None:
    got = summary(report)
    assert got["kept"] == pytest.approx(120 / 600)
    assert (got["needle_before"], got["needle_after"]) == (1.0, pytest.approx(2 / 3))
    assert (got["decode_tokens_s_before"], got["decode_tokens_s_after"]) == (pytest.approx(10), pytest.approx(20))
    assert (got["needle_hidden_before"], got["needle_hidden_after"]) == (1.0, pytest.approx(1 / 3))
    empty = summary(replace(report, needle=None, needle_hidden=None, speed=None, perplexity=None))
    assert empty.keys() == got.keys()
    assert empty["needle_after"] is None


def test_a_cache_as_planned_passes(report: Report) -> None:
    verify(report.rows, report.planned_total)
    verify([*report.rows, row(3, [50, 90], threshold=True)], report.planned_total)


@pytest.mark.parametrize(
    ("planted", "total", "named"),
    [
        (row(4, [20, 21], [20, 20]), None, "layer 4, head 1 must hold the planned tokens, got 21 where 20"),
        (replace(row(4, [20, 20], [20, 20]), bytes=1), None, "layer 4 must hold the planned bytes, got 1 where"),
        (replace(row(4, [20, 20], [20, 20]), kv_heads=3), None, "layer 4 must hold its KV heads"),
        (row(4, [20, 20], [20]), None, "layer 4 must have a plan"),
        (row(4, [20, 20]), 41, "layers 4 together must hold the planned tokens, got 40 where 41"),
        (row(4, [90, 111], threshold=True), None, "layer 4 must not hold more than uncompressed"),
    ],
)
def test_a_planted_mismatch_is_named(planted: LayerRow, total: int | None, named: str) -> None:
    with pytest.raises(KvcompileError, match=named):
        verify([row(0, [5, 5], [5, 5]), planted], total)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rows": [{"layer": 1}]}', '{"rows": 3}'])
def test_damaged_reports_are_one_error(text: str, tmp_path) -> None:
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(KvcompileError, match="report"):
        read(tmp_path)


def test_a_missing_report_is_one_error(tmp_path) -> None:
    with pytest.raises(KvcompileError, match=r"report\.json"):
        read(tmp_path)
