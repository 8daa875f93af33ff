"""Files that prompts are read from: text, and JSON of several shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcompile.errors import KvcompileError, first_line


def read_text(path: Path, option: str) -> str:
    """The text of a file. Raises KvcompileError that names `option` where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KvcompileError(
            f"{option} must be a text, .json or .jsonl file in UTF-8", f"{str(path)!r} ({first_line(error)})"
        ) from error


def parsed(path: Path, option: str) -> Any:
    """The value of a JSON file, or a list of its lines' values. Raises KvcompileError for anything else."""
    text = read_text(path, option)
    try:
        return json.loads(text)
    except ValueError:
        lines = [line for line in text.splitlines() if line.strip()]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise KvcompileError(
            f"{path.name} must be a JSON list, or one JSON object a line", first_line(error)
        ) from error


def rows_of(path: Path, option: str) -> list[Mapping[str, Any]]:
    """The rows of a JSON list, or of a file of one JSON object a line. Raises KvcompileError for anything else."""
    data = parsed(path, option)
    rows = data if isinstance(data, list) else [data]
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise KvcompileError(
                f"{path.name}: every row must be a JSON object", f"row {i + 1}, a {type(row).__name__}"
            )
    return rows
