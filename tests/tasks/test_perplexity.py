"""Task `perplexity`: windows spread over each text, of which the end is scored."""

from __future__ import annotations

from pathlib import Path

import pytest
from tasks.characters import Characters

from kvcompile.calibration.text import sentences, split
from kvcompile.errors import KvcompileError
from kvcompile.tasks.perplexity import Perplexity

TOKENIZER = Characters()


def test_windows_are_pieces_of_texts_that_nothing_is_trained_on() -> None:
    samples = Perplexity(tokens=100, scored=20, windows=3).make_samples(TOKENIZER, 4096)
    assert [sample.name for sample in samples] == [f"{t} {i}" for t in ("reference", "library") for i in (1, 2, 3)]
    held_out = " ".join(split(sentences())[1])
    for sample in samples:
        assert (len(sample.context), len(sample.rest), sample.turns) == (100, 21, ())
        window = TOKENIZER.decode((*sample.context, *sample.rest)).replace("\x02", "")
        assert (window in held_out) == (sample.part == "reference")


def test_a_file_is_a_text_called_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("This is a sentence that is long enough. " * 3 + "And another one that is long, too.")
    samples = Perplexity(tokens=20, scored=5, windows=1, texts=(str(path),)).make_samples(TOKENIZER, 4096)
    assert [sample.part for sample in samples] == ["own.txt"]
    with pytest.raises(KvcompileError, match="the text must hold context"):
        Perplexity(tokens=2000, texts=(str(path),)).make_samples(TOKENIZER, 4096)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(KvcompileError, match="scored must be 2 or more"):
        Perplexity(scored=1)
    with pytest.raises(KvcompileError, match="must not be longer than the 512 tokens"):
        Perplexity().make_samples(TOKENIZER, 512)
