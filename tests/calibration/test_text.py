"""Protects the offline text: whole clean sentences, always the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompile.calibration.text import LONGEST, SHORTEST, builtin, from_file, from_text, sentences
from kvcompile.errors import KvcompileError


def test_builtin_text_is_plentiful_clean_and_always_the_same() -> None:
    text = builtin()
    assert text == builtin()
    assert len(text) == len(set(text)) > 1000
    assert all(SHORTEST <= len(s) <= LONGEST and s[0].isupper() and s[-1] in ".!?" for s in text)
    assert not [s for s in text if "::" in s or "``" in s or ">>>" in s or "\n" in s or "  " in s]


@pytest.mark.parametrize("name", ["reference", "library", "file"])
def test_halves_of_a_text_have_nothing_in_common_and_make_the_whole(name: str, tmp_path: Path) -> None:
    if name == "file":
        name = str(tmp_path / "a.txt")
        Path(name).write_text("\n\n".join(f"This is sentence number {i} of a text." for i in range(7)))
    first, last = (sentences(f"{name}:{half}") for half in ("first", "last"))
    assert first + last == sentences(name)
    assert not set(first) & set(last)
    assert len(last) - len(first) in (0, 1)


def test_markup_goes_and_words_stay() -> None:
    text = "This is **bold and strong** and *so on* here [3]. A :ref:`section <label>` role with ``code`` in it."
    assert from_text(text) == ["This is bold and strong and so on here.", "A section role with code in it."]


@pytest.mark.parametrize(
    "left_out",
    [
        "Heading of a section\n********************",
        "stmt ::= target and something else that goes on.",
        ">>> print('a long enough line of code')",
        "| Cell of a table | and another cell of it. |",
        "Too short.",
        "A sentence that (never closes its bracket.",
        "Long " + "words " * 100 + "end.",
    ],
)
def test_what_is_no_sentence_is_left_out(left_out: str) -> None:
    kept = "A sentence that is long enough."
    assert from_text(f"{left_out}\n\n{kept}\n\n{kept}") == [kept]


def test_abbreviations_do_not_end_a_sentence() -> None:
    assert from_text("Some names, e.g. Python, are long. They go on, i.e. They do not end.") == [
        "Some names, e.g. Python, are long.",
        "They go on, i.e. They do not end.",
    ]


def test_a_file_is_read_and_bad_ones_are_named(tmp_path) -> None:
    essay = tmp_path / "essay.txt"
    essay.write_text("The first sentence of the essay.\nThe second one is\nbroken over lines.", encoding="utf-8")
    assert sentences(essay) == from_file(essay)
    assert from_file(essay) == ["The first sentence of the essay.", "The second one is broken over lines."]
    empty = tmp_path / "empty.txt"
    empty.write_text("nothing", encoding="utf-8")
    for bad in (empty, tmp_path / "missing.txt"):
        with pytest.raises(KvcompileError, match=bad.name):
            from_file(bad)
