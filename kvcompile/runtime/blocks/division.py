"""Where the new tokens of a pass stand in blocks: every sequence counts from its own first token.

All of it is arithmetic of token counts, on the CPU; what comes out are indices into rows that are put one after the
other, as `torch.cat` of flattened tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kvcompile.plan.blocks import Blocks


@dataclass(frozen=True)
class Windows:
    """The blocks that the token decoder reads in a pass: one row each, `[N]`, of them the current one of each sequence.

    A block of L tokens has P + L places: P for the prefix, one for the start, one for each token but the last. What
    stands at the place of a token predicts the next one, so that token t has its logits in block (t + 1) // L.

    rows: the sequence of each, `[N]`, ascending. current: which of them goes on, `[B]`. inputs `[N, W]`: what enters,
    in rows of (start; prefixes of the new blocks; new tokens `[B Q]`). places `[N, W]`: of these in their block; valid
    `[N, W]`: which are real (None: all). contexts `[O]`: what conditions each new block, in rows of (the virtual
    first output; outputs of the completed blocks `[B M]`). outputs `[B, K]`: where the logits that are wanted stand, in
    rows `[N W]`.
    """

    rows: Tensor
    current: Tensor
    inputs: Tensor
    places: Tensor
    valid: Tensor | None
    contexts: Tensor
    outputs: Tensor

    def to(self, device: torch.device) -> Windows:
        """The same on a device."""
        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in own.items()}
        return Windows(**moved)


class Division:
    """The tokens that each sequence had `before [B]` a pass and has `after [B]` it, and where the new ones stand.

    valid `[B, Q]`: which of the columns are real tokens (None: all).
    """

    def __init__(self, blocks: Blocks, after: list[int], count: int, valid: Tensor | None) -> None:
        self.blocks, self.count, self.valid = blocks, count, None if valid is None else valid.cpu()
        self.after = torch.tensor(after, dtype=torch.int64, device="cpu")
        self.before = self.after - (count if self.valid is None else self.valid.sum(1))
        self.first, self.complete = (n // blocks.length for n in (self.before, self.after))
        self._order = None if self.valid is None else (~self.valid).int().argsort(dim=1, stable=True)

    @property
    def completed(self) -> Tensor:
        """Blocks that each sequence completes, `[B]`."""
        return self.complete - self.first

    @property
    def most(self) -> int:
        """The largest of these numbers."""
        return int(self.completed.max())

    def _column(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """In rows of all new tokens `[B Q]`, where token number `tokens` of sequence `rows` stands."""
        nth = (tokens - self.before[rows]).clamp(0, self.count - 1)
        return rows * self.count + (nth if self._order is None else self._order[rows, nth])

    def _held(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The same in rows of (waiting tokens `[B (L - 1)]`; new ones)."""
        waiting = self.blocks.length - 1
        old = rows * waiting + (tokens % self.blocks.length).clamp(max=waiting - 1)
        new = len(self.after) * waiting + self._column(rows, tokens)
        return torch.where(tokens < self.before[rows], old, new)

    def blocks_read(self) -> Tensor:
        """Where the tokens of the completed blocks stand, `[B, M, L]`, in rows of (waiting tokens; new ones).

        Sequences that complete fewer have anything in their last ones.
        """
        length = self.blocks.length
        rows = torch.arange(len(self.after), dtype=torch.int64, device="cpu").unsqueeze(1)
        tokens = self.first.unsqueeze(1) * length + torch.arange(self.most * length, dtype=torch.int64, device="cpu")
        return torch.unflatten(self._held(rows, tokens), 1, (self.most, length))

    def blocks_valid(self) -> Tensor | None:
        """Which of them are real, `[B, M]`; None: all."""
        if bool((self.completed == self.most).all()):
            return None
        return torch.arange(self.most, dtype=torch.int64, device="cpu") < self.completed.unsqueeze(1)

    def waiting(self) -> Tensor:
        """Where the tokens of the current block stand, `[B, L - 1]`, in the same rows; anything past its newest."""
        rows = torch.arange(len(self.after), dtype=torch.int64, device="cpu").unsqueeze(1)
        inside = torch.arange(self.blocks.length - 1, dtype=torch.int64, device="cpu")
        return self._held(rows, self.complete.unsqueeze(1) * self.blocks.length + inside)

    def windows(self, wanted: Tensor) -> Windows:
        """What the token decoder reads to give logits for the columns `wanted [K]`, and to go on."""
        length, prefix = self.blocks.length, self.blocks.prefix
        block, place = self._logits_at(wanted)  # [B, K], block counted from that of the first new token
        needed = torch.zeros(len(self.after), self.most + 1, dtype=torch.bool, device="cpu")
        needed.scatter_(1, torch.cat((block, self.completed.unsqueeze(1)), 1), True)
        rows, ahead = needed.nonzero(as_tuple=True)
        opens = (ahead > 0) | (self.before[rows] == 0)
        begin = (self.first[rows] + ahead) * length  # the first token of each
        first = torch.where(opens, 0, prefix + 1 + self.before[rows] % length)
        stop = prefix + 1 + (self.after[rows] - begin).clamp(max=length - 1)
        width = int((stop - first).max())
        places = first.unsqueeze(1) + torch.arange(width, dtype=torch.int64, device="cpu")
        valid = places < stop.unsqueeze(1)
        number = needed.flatten().cumsum(0).view_as(needed) - 1
        numbers = number.gather(1, block)
        return Windows(
            rows=rows,
            current=number[:, -1],
            inputs=self._inputs(rows, begin, opens, places),
            places=places,
            valid=None if bool(valid.all()) else valid,
            contexts=torch.where(ahead > 0, 1 + rows * self.most + ahead - 1, 0)[opens],
            outputs=numbers * width + (place - first[numbers]).clamp(0, width - 1),
        )

    def _inputs(self, rows: Tensor, begin: Tensor, opens: Tensor, places: Tensor) -> Tensor:
        """What stands at each of the `places [N, W]`: see `Windows.inputs`."""
        prefix = self.blocks.prefix
        opened = (opens.cumsum(0) - 1).unsqueeze(1)
        tokens = begin.unsqueeze(1) + places - prefix - 1
        columns = 1 + int(opens.sum()) * prefix + self._column(rows.unsqueeze(1), tokens)
        before = torch.where(places == prefix, 0, 1 + opened * prefix + places)
        return torch.where(places > prefix, columns, before)

    def _logits_at(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """In which block, counted from that of the first new token, and where in it the wanted columns have logits.

        Both `[B, K]`; of padding where the newest token has.
        """
        ranks = wanted.expand(len(self.after), -1) if self.valid is None else (self.valid.cumsum(1) - 1)[:, wanted]
        following = self.before.unsqueeze(1) + ranks + 1
        if self.valid is not None:
            following = torch.where(self.valid[:, wanted], following, self.after.unsqueeze(1))
        block = following // self.blocks.length - self.first.unsqueeze(1)
        return block, self.blocks.prefix + following % self.blocks.length
