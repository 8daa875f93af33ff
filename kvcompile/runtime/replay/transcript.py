"""Which tokens a cache has read since they were last repeated."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError


class Transcript:
    """Token ids of each sequence that no replay has repeated yet, and the `overlap` tokens before them.

    Its tokens are the newest ones that a sequence has seen, without gaps.
    """

    def __init__(self, overlap: int) -> None:
        self.overlap = overlap
        self.ids: list[Tensor] = []  # per sequence [n], int64
        self.repeated: list[int] = []  # of these, the first ones, which stand there for what they say before the others

    def add(self, tokens: Tensor, valid: Tensor | None) -> None:
        """Add the new `tokens [B, Q]` of a pass, those that are `valid [B, Q]` (None: all).

        Raises KvcompileError for embeddings, which say nothing that a model could be asked to repeat.
        """
        if tokens.ndim != 2:
            raise KvcompileError(
                "a replay repeats token ids", "inputs_embeds", "pass input_ids, or take a policy that reads a text once"
            )
        if not self.ids:
            self.ids, self.repeated = [tokens.new_empty(0)] * len(tokens), [0] * len(tokens)
        new = [row if valid is None else row[valid[b]] for b, row in enumerate(tokens)]
        self.ids = [torch.cat(pair) for pair in zip(self.ids, new, strict=True)]

    def unrepeated(self, b: int) -> Tensor:
        """The ids of sequence b that no replay has repeated, `[n]`."""
        return self.ids[b][self.repeated[b] :]

    def before(self, b: int) -> Tensor:
        """The ids before them, `[overlap]`; fewer at the start of a text, none where nothing comes before."""
        return self.ids[b][: self.repeated[b]]

    def done(self, b: int) -> None:
        """All of sequence b has been repeated."""
        kept = min(self.overlap, len(self.ids[b]))
        self.ids[b], self.repeated[b] = self.ids[b][len(self.ids[b]) - kept :].clone(), kept

    def select(self, sequences: Tensor) -> None:
        """Follow the cache when its sequences are kept, repeated or reordered."""
        chosen = [int(b) for b in sequences] if self.ids else []
        self.ids, self.repeated = [self.ids[b] for b in chosen], [self.repeated[b] for b in chosen]

    def drop_last(self, count: int) -> None:
        """Take back the newest `count` tokens of every sequence."""
        self.ids = [ids[: len(ids) - count] for ids in self.ids]


__all__ = ["Transcript"]
