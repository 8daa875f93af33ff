"""A short evaluation of a tiny model: its folder, its command line, its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

from kvcompile.config.compose import compose
from kvcompile.tasks import rows
from kvcompile.tasks.run import Measured, trials
from kvcompile.tasks.stacks.subject import of_config

WORDS = " ".join(f"W{4 + (7 * i * i + i) % 120} w5 w6 w7 w8 w9 w10 w11." for i in range(400))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and a text for it."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "words.txt").write_text(WORDS)
    return folder


def job(place: Path, *words: str) -> list[str]:
    """Overrides of a short evaluation."""
    text = place / "words.txt"
    return [
        "evaluate=[needle,perplexity]",
        f"model.pretrained={place / 'model'}",
        "kernels=sdpa",
        "tasks.needle.tokens=[128]",
        f"tasks.needle.haystacks=['{text}']",
        "tasks.needle.forms=[magic]",
        "tasks.needle.samples=2",
        "tasks.perplexity.tokens=40",
        "tasks.perplexity.scored=6",
        "tasks.perplexity.windows=2",
        f"tasks.perplexity.texts=['{text}']",
        *words,
    ]


def measured(place: Path, folder: Path, *words: str) -> tuple[Measured, list[rows.Row]]:
    config = compose(job(place, *words))
    subject = of_config(config)
    measuring = Measured(folder, poll=0.01)
    return measuring, measuring.all(trials(subject, config.built_tasks(), config.questions, config.evaluate.part))
