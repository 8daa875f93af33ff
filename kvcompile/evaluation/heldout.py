"""The text that quality is measured on, which nothing is ever trained on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from kvcompile.calibration.text import sentences, split

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.config.schema import Config


def held_out(config: Config, tokenizer: Any) -> Tensor:
    """Token ids `[n]`: a file of the user's, else what is held out of the text that is trained on, offline or not.

    Raises KvcompileError for a text that cannot be read.
    """
    import torch

    given, heal = config.perplexity, config.heal
    if given.source is None and heal.tokens and heal.dataset:
        from kvcompile.heal.corpus import corpus

        return corpus(heal, tokenizer).ids(tokenizer, True, given.windows * (given.context + given.tokens + 1))
    text = sentences(given.source) if given.source else split(sentences())[1]
    return torch.as_tensor(
        tokenizer(" ".join(text), return_tensors="pt")["input_ids"], dtype=torch.int64, device="cpu"
    )[0]


def windows(model: Any, tokenizer: Any, config: Config) -> Tensor:
    """What perplexity is measured on, `[windows, context + tokens + 1]`, no longer than the model knows.

    Raises KvcompileError for a text that cannot be read or is too short.
    """
    from kvcompile.evaluation.perplexity import spread

    given = config.perplexity
    context = min(given.context, longest(model) - given.tokens - 1)
    return spread(held_out(config, tokenizer), context, given.tokens, given.windows)


def longest(model: Any) -> int:
    """Positions that the model knows; where it does not say, more than anything here needs."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)
