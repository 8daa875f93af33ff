"""The report as files, and on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvcompile import atomic
from kvcompile.errors import KvcompileError, first_line
from kvcompile.report.report import Report

if TYPE_CHECKING:
    from rich.console import Console


FILES = ("report.json", "report.md", "report.png")


def write(report: Report, folder: str | Path) -> list[Path]:
    """Write report.json, report.md and report.png into `folder`, which must exist; returns their paths."""
    from kvcompile.report.plot import draw
    from kvcompile.report.tables import markdown

    paths = [Path(folder) / name for name in FILES]
    paths[0].write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(report), encoding="utf-8")
    draw(report, paths[2])
    return paths


def read(folder: str | Path) -> Report:
    """The report in `folder`. Raises KvcompileError if there is none or it is damaged."""
    path = Path(folder) / FILES[0]
    try:
        return Report.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise KvcompileError(f"{path.name} must be a readable report", str(error)) from error


def show(report: Report, console: Console | None = None) -> None:
    """Print the whole report: losses of quality or speed in red, savings in green."""
    from rich.console import Console

    from kvcompile.report.tables import show as show_tables

    show_tables(report, console or Console())


def keep(report: Report, place: Path, beside: Mapping[str, str]) -> None:
    """Write the report and the texts `beside` it (by file name) into the folder `place`, all at once, for reading only.

    Raises KvcompileError where something else than such a report lies there, or writing fails.
    """
    if place.exists() and not (place.is_dir() and {p.name for p in place.iterdir()} <= {*FILES, *beside}):
        raise KvcompileError(
            "the report of a failed compile replaces nothing but another such report",
            f"{place}: other files",
            "output=<elsewhere>",
        )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic.making(place, ".failing-") as scratch:
            new = scratch / "report"
            new.mkdir()
            write(report, new)
            for name, text in beside.items():
                (new / name).write_text(text, encoding="utf-8")
            atomic.publish(new, place)
    except OSError as error:
        raise KvcompileError(f"the report could not be written to {place}", first_line(error)) from error
