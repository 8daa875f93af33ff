"""Duet, the architecture: what kvcompile must know of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import modeling_duet  # noqa: F401 (makes the model known to transformers)
import torch
from torch import Tensor, nn

from kvcompile.adapters.architecture import Architecture
from kvcompile.adapters.base import Absent, Attention
from kvcompile.adapters.layout import Layout, Weights, linear_of, plain


@dataclass(frozen=True)
class DuetLayout(Layout):
    """Where the rows of each head lie: in `kv_proj` first those of all keys, then those of all values."""

    def read(self) -> Weights:
        """The weights by head, as views."""
        both = self.rows("kv_proj", 2 * self.kv_heads)
        return Weights(
            self.rows("q_proj", self.heads),
            both.map(lambda rows: rows[: self.kv_heads]),
            both.map(lambda rows: rows[self.kv_heads :]),
            self.output(),
        )

    def write(self, new: Weights) -> dict[str, nn.Module]:
        """New modules by name. A layer that reads another layer's cache has no keys and values of its own."""
        modules = {**self.write_output(new), "q_proj": linear_of(plain(self.attention, "q_proj"), [new.query])}
        modules["kv_proj"] = Absent() if new.key is None else linear_of(plain(self.attention, "kv_proj"), new.own)
        return modules


class DuetAdapter(Attention):
    """How queries, keys and values come out of hidden states."""

    layout: ClassVar[type[Layout]] = DuetLayout
    keeps: ClassVar[tuple[str, ...]] = ("q_proj", "kv_proj", "o_proj")
    kv_proj: nn.Module

    def project(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, H, Q, D]` of `states [B, Q, hidden]`, before rotation."""
        keys, values = torch.chunk(self.kv_proj(states), 2, -1)
        return self.heads(self.q_proj(states)), self.heads(keys), self.heads(values)


DUET = Architecture(DuetAdapter)
