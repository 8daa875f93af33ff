"""Protects `kvcompile board`: what it prints and writes, and one line for each thing that a user can mend."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from board_rows import row

from kvcompile import cli
from kvcompile.board.command import main
from kvcompile.errors import KvcompileError
from kvcompile.tasks.rows import write


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two folders, one row in both."""
    write(tmp_path / "a", row(scores=[1, 1]))
    write(tmp_path / "a" / "deep", row("snapkv", [1, 0], 0.25))
    write(tmp_path / "b", row(scores=[1, 1]))
    write(tmp_path / "b", row(scores=[2.0, 3.0], losses=True, model="Qwen2-0.5B"))
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_rows_of_several_folders_are_one_board(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["kvcompile", "board", *folders, "--out", str(tmp_path / "new" / "board")])
    cli.main()
    out = capsys.readouterr().out
    assert "SmolLM2-135M, needle: right answers" in out
    assert "Qwen2-0.5B, perplexity" in out
    assert out.count("dense ") >= 2
    assert {path.name for path in (tmp_path / "new" / "board").iterdir()} == {"board.html", "board.md", "board.csv"}
    assert (tmp_path / "new" / "board" / "board.csv").read_text("utf-8").count("\n") == 4


def test_one_model_or_task_alone(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*folders, "--model", "Qwen2-0.5B"])
    assert "needle" not in capsys.readouterr().out
    main([*folders, "--task", "needle"])
    assert "Qwen2" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_picture_is_the_same_each_time(folders: list[str], tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{n}{suffix}" for n in range(2)]
    for path in paths:
        main([*folders, "--picture", str(path)])
    first, again = (path.read_bytes() for path in paths)
    assert first == again
    assert len(first) > 5000


def test_what_is_wrong_is_said_on_one_line(folders: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    damaged = write(tmp_path / "damaged", row())
    damaged.write_text(damaged.read_text("utf-8")[:-40])
    older = write(tmp_path / "older", row())
    older.write_text(older.read_text("utf-8").replace('"format": 1', '"format": 0'))
    for arguments, said in (
        ([str(tmp_path / "nowhere")], "no folder"),
        ([str(tmp_path / "file")], "no folder"),
        ([str(tmp_path / "empty")], "there must be rows"),
        ([str(tmp_path / "damaged")], f"remove {damaged}"),
        ([str(tmp_path / "older")], "one of this version of kvcompile"),
        ([*folders, "--model", "gpt"], "--model must be one of Qwen2-0.5B, SmolLM2-135M"),
        ([*folders, "--model", "Qwen2-0.5B", "--task", "needle"], "--task must be one of perplexity"),
        ([*folders, "--picture", "board.jpg"], ".svg or .png"),
        ([*folders, "--out", str(tmp_path / "file")], "a board needs a folder to write into"),
        ([*folders, "--out"], "expected one argument"),
        ([*folders, "--sort"], "unrecognized arguments: --sort"),
    ):
        with pytest.raises(KvcompileError) as error:
            main(arguments)
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("DIR", "--out", "--picture", "--model", "--task"))
