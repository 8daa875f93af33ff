"""Protects how files of prompts are read: JSON of one value, of a list, of a value a line; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompile.analysis.files import parsed, rows_of
from kvcompile.errors import KvcompileError


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 2}]', '{"a": 1}\n\n{"a": 2}\n', '[\n{"a": 1},\n{"a": 2}]'])
def test_rows_are_a_list_or_a_line_each(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    assert rows_of(path, "x") == [{"a": 1}, {"a": 2}]


def test_one_object_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"data":\n [1]}')
    assert parsed(path, "x") == {"data": [1]}
    assert rows_of(path, "x") == [{"data": [1]}]


def test_an_absent_file_is_refused_by_the_name_of_its_option(tmp_path: Path) -> None:
    with pytest.raises(KvcompileError, match=r"tasks\.x\.source must be a text, \.json or \.jsonl file"):
        rows_of(tmp_path / "absent.json", "tasks.x.source")
