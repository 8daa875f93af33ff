"""The cache of a block transformer: that of its block decoder, the current block, and tokens that wait for theirs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels.backend import Backend
from kvcompile.kernels.dispatch import SDPA
from kvcompile.kernels.pointers import opaque
from kvcompile.plan.plan import Plan
from kvcompile.runtime.blocks.division import Division, Windows
from kvcompile.runtime.blocks.layer import LocalLayer
from kvcompile.runtime.cache import KVCache, Rotary, Step


@dataclass(frozen=True, kw_only=True)
class DividedStep(Step):
    """A pass over new tokens, and where they stand in blocks."""

    division: Division


@dataclass(frozen=True, kw_only=True)
class BlockStep(Step):
    """The same pass to the block decoder, whose tokens are the blocks that it completes, `[B, M]`.

    read `[B, M, L]`: their tokens, in rows of (waiting ones `[B (L - 1)]`; new ones `[B Q]`).
    """

    read: Tensor


@dataclass(frozen=True, kw_only=True)
class TokenStep(Step):
    """The same pass to the token decoder, whose sequences are blocks `[N]` and whose positions are places in them."""

    windows: Windows


class BlockCache(KVCache):
    """Keys and values of a block transformer.

    `decoder` is the cache of the block decoder, whose tokens are blocks; its layers are the first of this one's. The
    others hold the current block of each sequence. `waiting [B, L - 1, F]` is what the embedder will read of it: the
    tokens of a block are embedded together, once the last one has come.
    """

    def __init__(self, plan: Plan, rotaries: list[Rotary] | None = None, backend: Backend = SDPA) -> None:
        if plan.blocks is None:
            raise RuntimeError("the plan of a block transformer has blocks")
        self.decoder = KVCache(plan.decoder, rotaries, backend)
        super().__init__(plan, rotaries, backend)
        self.blocks, split = plan.blocks, plan.blocks.split
        self.layers = [*self.decoder.layers, *(LocalLayer(p, plan.blocks.local) for p in plan.layers[split:])]

    def _start(self) -> None:
        self.decoder._start()
        super()._start()
        self.evictions = self.decoder.evictions
        self.waiting: Tensor | None = None
        self.prompted: list[bool] = []  # sequences that have completed blocks in the prompt that is being read
        self.columns = 0

    @property
    def reads(self) -> dict[int, int] | None:
        """Bytes that attention reads, by layer, of both decoders; None: they are not counted."""
        return self.decoder.reads

    @reads.setter
    def reads(self, counted: dict[int, int] | None) -> None:
        self.decoder.reads = counted

    @property
    def local(self) -> list[LocalLayer]:
        """The layers of the token decoder with a cache of their own."""
        return [layer for layer in self.layers[self.blocks.split :] if layer.plan.owner == layer.plan.index]

    @opaque
    def stays_inside(self, tokens: Tensor, attention_mask: Tensor | None) -> bool:
        """Whether no sequence completes a block with these new `tokens [B, Q]`: the block decoder need not run."""
        batch, count = tokens.shape[:2]
        new = [count] * batch
        if attention_mask is not None and attention_mask.ndim == 2 and len(attention_mask) == batch:
            new = attention_mask[:, -count:].ne(0).sum(1).tolist()
        seen = self.seen or [0] * batch
        return all(n % self.blocks.length + more < self.blocks.length for n, more in zip(seen, new, strict=False))

    def begin(self, tokens: Tensor, attention_mask: Tensor | None) -> DividedStep:
        """Open a forward pass as any cache does. Raises KvcompileError as it does."""
        step = super().begin(tokens, attention_mask)
        self.columns += tokens.shape[1]
        self.croppable = 0  # a block forgets its tokens
        division = Division(self.blocks, self.seen, tokens.shape[1], step.valid)
        return DividedStep(**_fields(step), division=division)

    def block_step(self, step: DividedStep) -> BlockStep:
        """The blocks that a pass completes, which are the new tokens of the block decoder."""
        decoder, division, length, device = self.decoder, step.division, self.blocks.length, step.positions.device
        coming = None
        if step.coming is not None:
            ends = [n + more for n, more in zip(self.seen, step.coming, strict=True)]
            coming = [end // length - n // length for end, n in zip(ends, self.seen, strict=True)]
        decoder.seen = division.complete.tolist()
        last = step.last or (coming is not None and not any(coming))
        valid = division.blocks_valid()
        positions = division.first.unsqueeze(1) + torch.arange(division.most, dtype=torch.int64, device="cpu")
        return BlockStep(
            cache=decoder,
            positions=positions.to(device),
            valid=None if valid is None else valid.to(device),
            prefill=step.prefill,
            last=last,
            tick=-(-step.tick // length),  # of each sequence its own k-th block since the prompt, in any batch
            shift=decoder.shift,
            coming=coming,
            concerned=self._concerned(division, step.prefill, last),
            read=division.blocks_read().to(device),
        )

    def _concerned(self, division: Division, prefill: bool, last: bool) -> list[bool] | None:
        """Sequences that complete blocks in this pass; of a prompt in pieces, in this one or one before. None: all."""
        before = self.prompted if prefill and self.prompted else [False] * len(self.seen)
        came = [new > 0 or old for new, old in zip(division.completed.tolist(), before, strict=True)]
        self.prompted = came if prefill and not last else []
        return None if all(came) else came

    def token_step(self, step: DividedStep, wanted: Tensor) -> TokenStep:
        """The blocks that the token decoder reads: those of the `wanted [K]` columns' logits, and the current ones."""
        windows = step.division.windows(wanted).to(step.positions.device)
        if len(windows.rows) > len(self.seen):
            for layer in self.local:
                layer.select(windows.rows)
        facts = {**_fields(step), "positions": windows.places, "valid": windows.valid}
        return TokenStep(**facts, windows=windows)

    def close(self, layer: LocalLayer, windows: Windows) -> None:
        """Of all blocks that a layer has read only the current one of each sequence stays."""
        if len(windows.rows) > len(self.seen):
            layer.select(windows.current)

    def gather(self, features: Tensor, at: Tensor) -> Tensor:
        """`[*at, F]` in rows of what waits, then the new tokens' `features [B, Q, F]`."""
        if self.waiting is None:
            self.waiting = features.new_zeros(len(features), self.blocks.length - 1, features.shape[-1])
        return torch.cat((self.waiting.flatten(0, 1), features.flatten(0, 1)))[at]

    def wait(self, features: Tensor, step: DividedStep) -> None:
        """Let the tokens of the current block wait for its end."""
        self.waiting = self.gather(features, step.division.waiting().to(features.device))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included (what transformers slices by)."""
        return self.columns

    def allocated(self) -> int:
        """Bytes of everything allocated for the cache, tokens that wait among it."""
        return super().allocated() + self._waiting_bytes()

    def resident(self) -> int:
        """Bytes allocated on the compute device, tokens that wait among it."""
        return super().resident() + self._waiting_bytes()

    def _waiting_bytes(self) -> int:
        return 0 if self.waiting is None else self.waiting.numel() * self.waiting.element_size()

    @property
    def is_croppable(self) -> bool:
        """False: the tokens of a block are forgotten once it is embedded."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, but for 0 tokens. Raises KvcompileError."""
        if tokens_to_remove:
            raise KvcompileError(
                "tokens of a block transformer cannot be taken back: once a block is complete, it forgets them",
                f"crop({tokens_to_remove})",
                "start a new cache, or fork() one before",
            )

    def _select(self, sequences: Tensor) -> None:
        super()._select(sequences)
        self.decoder.seen = [n // self.blocks.length for n in self.seen]
        self.prompted = [self.prompted[int(b)] for b in sequences] if self.prompted else []
        if self.decoder.shift is not None:
            self.decoder.shift = self.decoder.shift[sequences]
        if self.waiting is not None:
            self.waiting = self.waiting[sequences.to(self.waiting.device)]


def _fields(step: Step) -> dict[str, Any]:
    """The fields of a step, whatever more it has."""
    return {f.name: getattr(step, f.name) for f in fields(Step)}
