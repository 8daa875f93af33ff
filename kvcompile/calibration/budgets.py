"""Which part of one budget each KV head gets where the best entries of all heads stay, in offline text."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvcompile.errors import KvcompileError

if TYPE_CHECKING:
    from kvcompile.plan.policy import Calibrator
    from kvcompile.plan.selection import Selection


def head_shares(
    calibrator: Calibrator, sentences: Sequence[str], selection: Selection, *, samples: int, tokens: int, seed: int
) -> list[list[float]]:
    """Shares `[layers][kv_heads]`, of layers with a cache of their own, that sum to 1.

    share[l, h] = mean over the texts of (kept[l, h] - floor_l) / sum of the same over all heads,

    with kept what `selection` leaves of a head and floor_l the tokens that always stay there: what is shared out is the
    rest. Raises KvcompileError where it leaves nothing but those, or everything.

    Args:
        calibrator: of the model.
        sentences: of the text.
        selection: score, budget and allocation.
        samples: how many pieces of the text are read, spread over it.
        tokens: length of each.
        seed: where they begin.
    """
    drawn = pieces(calibrator.tokenizer, sentences, samples, tokens, seed)
    texts: list[list[list[float]]] = []
    for done, piece in enumerate(drawn):
        calibrator.progress("calibrating budgets", done, len(drawn))
        kept, floors = calibrator.kept(piece, selection)
        free = [[n - floor for n in heads] for heads, floor in zip(kept, floors, strict=True)]
        every = sum(map(sum, free))
        if every <= 0 or all(n >= tokens for heads in kept for n in heads):
            raise KvcompileError(
                "budgets of heads are calibrated where a part of the tokens stays, and more than sinks and recent ones",
                f"{sum(map(sum, kept))} tokens of {tokens} in each head",
                "another budget, or texts of more tokens",
            )
        texts.append([[n / every for n in heads] for heads in free])
    calibrator.progress("calibrating budgets", len(drawn), len(drawn))
    layers = (zip(*rows, strict=True) for rows in zip(*texts, strict=True))
    return [[round(statistics.fmean(head), 6) for head in heads] for heads in layers]


def pieces(tokenizer: Any, sentences: Sequence[str], samples: int, tokens: int, seed: int) -> list[Any]:
    """Pieces of a text as token ids `[1, tokens]`, whole sentences at their beginning, spread over it.

    Raises KvcompileError where the text is shorter than one piece.
    """
    import torch

    first, drawn = random.Random(seed).randrange(len(sentences)), []
    for sample in range(samples):
        start = (first + sample * len(sentences) // samples) % len(sentences)
        ids = tokenizer(" ".join([*sentences[start:], *sentences[:start]]))["input_ids"][:tokens]
        if len(ids) < tokens:
            raise KvcompileError("the text must hold as many tokens as a sample", f"{len(ids)} of {tokens}")
        drawn.append(torch.tensor([ids], dtype=torch.int64, device="cpu"))
    return drawn
