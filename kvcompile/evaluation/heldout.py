"""The text that quality is measured on, which nothing is ever trained on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.config.schema import PerplexityConfig


def windows(model: Any, ids: Tensor, wanted: PerplexityConfig) -> Tensor:
    """What perplexity is measured on, `[windows, context + tokens + 1]`, no longer than the model knows.

    ids: the text `[n]`. Raises KvcompileError for one that is too short.
    """
    from kvcompile.evaluation.perplexity import spread

    context = min(wanted.context, longest(model) - wanted.tokens - 1)
    return spread(ids, context, wanted.tokens, wanted.windows)


def longest(model: Any) -> int:
    """Positions that the model knows; where it does not say, more than anything here needs."""
    return longest_of(model.config)


def longest_of(config: Any) -> int:
    """The same, of a model's configuration."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)
