"""`kvcompile board DIR...`: rows of any folders as a table, files, a page and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from kvcompile.errors import KvcompileError
from kvcompile.tasks.rows import SUFFIX, Row, found

if TYPE_CHECKING:
    from kvcompile.board.standings import Board

ROWS = "outputs/rows"  # where `evaluate=` puts them
FILES = ("board.html", "board.md", "board.csv")
PICTURES = (".svg", ".png")
PIPE_WIDTH = 160


def main(arguments: Sequence[str]) -> None:
    """Print the board of the folders that are named; write what is asked for. Raises KvcompileError."""
    options = _options(arguments)
    from kvcompile.board.standings import board

    standings = board(_rows(options))
    from rich.console import Console

    from kvcompile.board.tables import show

    console = Console() if Console().is_terminal else Console(width=PIPE_WIDTH)
    show(standings, console)
    for path in _write(standings, options):
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kvcompile board",
        description="What evaluations measured: rows of any folders as a table, a page, Markdown, CSV, a picture.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders", nargs="*", metavar="DIR", default=[ROWS], help=f"with rows below it (default: {ROWS})"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help=f"write {', '.join(FILES)} into it")
    parser.add_argument("--picture", metavar="FILE", type=Path, help=f"draw one, {' or '.join(PICTURES)}")
    parser.add_argument("--model", metavar="NAME", action="append", help="these models alone; may be repeated")
    parser.add_argument("--task", metavar="NAME", action="append", help="these tasks alone; may be repeated")

    def refuse(message: str) -> NoReturn:
        raise KvcompileError(f"kvcompile board: {message}", fix="kvcompile board --help shows what it takes")

    parser.error = refuse  # type: ignore[method-assign]
    options = parser.parse_args(list(arguments))
    if options.picture and options.picture.suffix not in PICTURES:
        raise KvcompileError(f"kvcompile board --picture draws {' or '.join(PICTURES)}", options.picture.name)
    return options


def _rows(options: argparse.Namespace) -> list[Row]:
    """The rows below the folders, of the models and tasks that are asked for."""
    folders = [Path(folder).expanduser() for folder in options.folders]
    for folder in folders:
        if not folder.is_dir():
            raise KvcompileError(
                "kvcompile board reads folders of rows", f"{folder}: no folder", "kvcompile evaluate=... first"
            )
    rows = list(found(folders))
    if not rows:
        places = ", ".join(map(str, folders))
        raise KvcompileError(
            f"there must be rows, *{SUFFIX}", f"none below {places}", "kvcompile evaluate=... makes them"
        )
    for field, names in (("model", options.model), ("task", options.task)):
        there = sorted({getattr(row, field) for row in rows})
        for name in names or ():
            if name not in there:
                raise KvcompileError(f"--{field} must be one of {', '.join(there)}", repr(name))
        rows = [row for row in rows if not names or getattr(row, field) in names]
    if not rows:
        raise KvcompileError("there must be rows of these models and these tasks", "none")
    return rows


def _write(standings: Board, options: argparse.Namespace) -> list[Path]:
    """Write what is asked for; returns the paths. Raises KvcompileError where nothing can be written."""
    from kvcompile.board import page, tables
    from kvcompile.board.picture import draw

    paths = [options.out / name for name in FILES] if options.out else []
    texts = (page.page, tables.markdown, tables.table)
    try:
        for path, text in zip(paths, texts, strict=False):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(standings), encoding="utf-8")
        if options.picture:
            options.picture.parent.mkdir(parents=True, exist_ok=True)
            draw(standings, options.picture)
            paths.append(options.picture)
    except OSError as error:
        place = error.filename or options.out or options.picture
        raise KvcompileError("a board needs a folder to write into", f"{place}: {error.strerror}") from error
    return paths
