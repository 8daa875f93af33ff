"""A tiny model that has learnt something, text in its words, and the healing of what a conversion does to it."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model, tiny_tokenizer

from kvcompile.compiler import assemble
from kvcompile.config.compose import compose
from kvcompile.models.sharing import shared
from kvcompile.progress import Progress, silent

STEP = 8 * 32  # tokens
QUICK = ["heal.length=32", "heal.batch=8", "perplexity.context=24", "perplexity.tokens=16", "perplexity.windows=4"]


def words(documents: int, tokens: int = 60, seed: int = 0) -> list[str]:
    """Sentences of a small language: a word hangs on the one three places before, so that attention is needed."""
    draw = random.Random(seed)
    found = []
    for _ in range(documents):
        text = [draw.randrange(4, 128) for _ in range(3)]
        while len(text) < tokens:
            text.append(4 + (text[-3] * 3 + draw.randrange(2) * 7) % 124)
        found.append(" ".join(f"w{word}" for word in text))
    return found


def written(folder: Path, documents: int = 80) -> Path:
    """The small language as a text file, one document a line."""
    path = folder / "words.txt"
    path.write_text("\n".join(words(documents)) + "\n", encoding="utf-8")
    return path


@functools.cache
def learnt(steps: int = 240) -> Any:
    """A tiny model that knows the small language, so that a conversion has something to destroy."""
    with torch.random.fork_rng():
        model, tokenizer = tiny_model("llama", initializer_range=0.05), tiny_tokenizer()
        ids = torch.tensor([tokenizer(text)["input_ids"] for text in words(512, seed=1)])
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 6e-3 * min(1.0, step / 20) * (1 - step / steps)
            batch = ids[(step * 16) % 512 :][:16]
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            optimizer.step()
    model.zero_grad()
    return model.eval()


def healed(data: Path, *overrides: str, workspace: Path | None = None, progress: Progress = silent) -> Any:
    """A copy of the learnt model, compiled by these overrides."""
    config = compose([f"heal.dataset={data}", *QUICK, *overrides])
    return assemble(shared(learnt()), config, tiny_tokenizer(), progress, workspace)
